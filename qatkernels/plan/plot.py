"""Plots of a plan: the loss over the QAT fraction, and the best fraction over the tokens per parameter byte."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np

from ..extras import missing
from ..plotting import COLOURS, INK, QUIET, tidy
from ..units import human
from .decide import wasted_tokens
from .fit import LossFit
from .formula import ExtrapolationWarning, PlanError, optimal_qat_fraction, tokens_per_parameter_byte
from .law import LossLaw

try:
    from matplotlib.axes import Axes
    from matplotlib.backend_bases import FigureCanvasBase
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter
except ImportError as error:
    raise missing("a picture", "plot", error) from error


def draw(path: str | Path, params: float, tokens: float, bits: list[float], law: LossLaw | None = None) -> None:
    """Draw a plan into a PNG or SVG file.

    Args:
        path: the file; its suffix chooses the format.
        params: N, parameters.
        tokens: D, tokens of both phases.
        bits: bit widths; each gets a curve.
        law: a fitted law; without one only the paper's formula is drawn.

    Raises:
        PlanError: if matplotlib does not write that format.
    """
    ending, formats = Path(path).suffix, FigureCanvasBase.get_supported_filetypes()
    if ending and ending[1:].lower() not in formats:
        raise PlanError(f"{path} ends in {ending}, must end in one of {', '.join(f'.{name}' for name in formats)}")
    figure = Figure(figsize=(12 if law else 6.6, 4.8), dpi=150, layout="constrained")
    axes = figure.subplots(1, 2 if law else 1, squeeze=False)[0]
    if law:
        _loss(axes[0], params, tokens, bits, law)
    _fraction(axes[-1], params, tokens, bits, law)
    for panel in axes:
        tidy(panel)
    figure.savefig(path)


def _loss(axes: Axes, params: float, tokens: float, bits: list[float], law: LossLaw) -> None:
    fractions, highest, lowest = np.linspace(0.005, 0.9, 400), 0.0, np.inf
    for colour, b in zip(COLOURS * len(bits), bits, strict=False):
        best = law.optimal_fraction(params, tokens, b)
        axes.plot(fractions, law.at_fraction(params, tokens, b, fractions), color=colour, linewidth=2)
        axes.plot(best, law.minimum(params, tokens, b), "o", color=colour, markersize=8, markeredgecolor="white",
                  label=f"{_bits(b)}: best at {best:.1%}")  # fmt: skip
        waste = wasted_tokens(law, params, tokens, b, 0.1)
        axes.plot(0.1, law.at_fraction(params, tokens, b, 0.1), "D", color=colour, markersize=6,
                  markeredgecolor="white", label=f"10% wastes {human(waste)} tokens")  # fmt: skip
        lowest = min(lowest, law.minimum(params, tokens, b))
        highest = max(highest, law.at_fraction(params, tokens, b, 0.02), law.at_fraction(params, tokens, b, 0.7))
    axes.set_ylim(lowest - 0.1 * (highest - lowest), highest + 0.4 * (highest - lowest))  # 0.4: for the legend
    axes.xaxis.set_major_formatter(PercentFormatter(1))
    axes.set_xlabel("fraction of quantized tokens")
    axes.set_ylabel("loss of the fitted law")
    axes.set_title(f"{human(params)} parameters, {human(tokens)} tokens", loc="left", fontweight="bold")
    axes.legend(frameon=False, ncols=2, loc="upper left", fontsize=9)


def _bits(bits: float) -> str:
    return f"{bits:g} bit" + ("" if bits == 1 else "s")


def _fraction(axes: Axes, params: float, tokens: float, bits: list[float], law: LossLaw | None) -> None:
    s_of_plans = [tokens_per_parameter_byte(params, tokens, b) for b in bits]
    s = np.geomspace(min(2.0, *s_of_plans), max(1e4, *s_of_plans), 300)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExtrapolationWarning)
        axes.plot(s[s > 1], optimal_qat_fraction(8.0, s[s > 1], 1.0), color=INK, linewidth=2, label="formula [paper]")
    for colour, b, s_of_plan in zip(COLOURS * len(bits), bits, s_of_plans, strict=False):
        if law:
            axes.plot(s, law.optimal_fraction(params, s * params * b / 8, b), color=colour, linewidth=2,
                      label=f"fitted law, {_bits(b)}")  # fmt: skip
            best = law.optimal_fraction(params, tokens, b)
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ExtrapolationWarning)
                best = optimal_qat_fraction(params, tokens, b)
        label = f"{_bits(b)}: {best:.1%}"
        axes.plot(s_of_plan, best, "o", color=colour, markersize=8, markeredgecolor="white", label=label)
    axes.set_xscale("log")
    axes.set_ylim(0, None)
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.set_xlabel("S, tokens per parameter byte")
    axes.set_ylabel("best fraction of quantized tokens")
    axes.set_title("Best fraction", loc="left", fontweight="bold")
    axes.legend(frameon=False)


def draw_optima(path: str | Path, fit: LossFit) -> None:
    """Draw measured and predicted optimal fractions of the runs that a law was fitted to."""
    figure = Figure(figsize=(12, 4.8), dpi=150, layout="constrained")
    against, over = figure.subplots(1, 2)  # measured against predicted optima, and optima over S
    widths = sorted({group["bits"] for group in fit.optima})
    for colour, bits in zip(COLOURS * len(widths), widths, strict=False):
        for edge, marker in ((False, "o"), (True, "x")):
            groups = [g for g in fit.optima if g["bits"] == bits and bool(g["edge"]) == edge]
            predicted, measured = ([g[key] for g in groups] for key in ("predicted", "measured"))
            label = None if edge else _bits(bits)
            style: dict[str, Any] = {"color": colour, "markersize": 8, "linestyle": "none"}
            against.plot(predicted, measured, marker, label=label, **style)
            s_of_groups = [tokens_per_parameter_byte(g["params"], g["tokens"], bits) for g in groups]
            over.plot(s_of_groups, measured, marker, label=label, **style)
    highest = 1.1 * max(max(g["measured"], g["predicted"]) for g in fit.optima)
    against.plot((0, highest), (0, highest), color=QUIET, linewidth=0.9, linestyle=(0, (5, 4)))
    against.plot([], [], "x", color=QUIET, label="best at the end of the grid")
    limits = over.get_xlim()
    over.set_xscale("log")
    s = np.geomspace(1.05, max(limits[1], 10.0), 300)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExtrapolationWarning)
        over.plot(s, optimal_qat_fraction(8.0, s, 1.0), color=INK, linewidth=2, label="formula [paper]")
    against.set_xlabel("optimum of the fitted law")
    over.set_xlabel("S, tokens per parameter byte")
    for axes, title in ((against, "Measured against predicted"), (over, "Measured over S")):
        axes.set_ylabel("measured optimal fraction of quantized tokens")
        axes.yaxis.set_major_formatter(PercentFormatter(1))
        axes.set_ylim(-0.02 * highest, 1.05 * highest)
        axes.set_title(title, loc="left", fontweight="bold")
        tidy(axes)
        axes.legend(frameon=False)
    against.xaxis.set_major_formatter(PercentFormatter(1))
    figure.savefig(path)
