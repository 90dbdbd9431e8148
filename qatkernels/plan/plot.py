"""Pictures of a plan, and of the runs that a law was fitted to."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np

from .. import plotting
from ..extras import missing
from ..plotting import COLOURS, INK, QUIET, tidy
from .charts import bits_text, charts
from .fit import LossFit
from .formula import ExtrapolationWarning, PlanError, optimal_qat_fraction, tokens_per_parameter_byte
from .law import LossLaw

try:
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
    drawn = charts(params, tokens, bits, law)
    figure = Figure(figsize=(12 if law else 6.6, 4.8), dpi=150, layout="constrained")
    for panel, chart in zip(figure.subplots(1, len(drawn), squeeze=False)[0], drawn, strict=True):
        plotting.draw(panel, chart)
    figure.savefig(path)


def draw_optima(path: str | Path, fit: LossFit) -> None:
    """Draw measured and predicted optimal fractions of the runs that a law was fitted to."""
    figure = Figure(figsize=(12, 4.8), dpi=150, layout="constrained")
    against, over = figure.subplots(1, 2)  # measured against predicted optima, and optima over S
    widths = sorted({group["bits"] for group in fit.optima})
    for colour, bits in zip(COLOURS * len(widths), widths, strict=False):
        for edge, marker in ((False, "o"), (True, "x")):
            groups = [g for g in fit.optima if g["bits"] == bits and bool(g["edge"]) == edge]
            predicted, measured = ([g[key] for g in groups] for key in ("predicted", "measured"))
            label = None if edge else bits_text(bits)
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
