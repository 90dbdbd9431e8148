"""Charts of a plan: the loss over the QAT fraction, and the best fraction over the tokens per parameter byte."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np

from ..charts import Chart, Line
from ..units import human
from .decide import wasted_tokens
from .formula import ExtrapolationWarning, optimal_qat_fraction, tokens_per_parameter_byte
from .law import LossLaw

#: The fraction that the loss of the best one is compared with.
_USUAL = 0.1


def bits_text(bits: float) -> str:
    """Return a bit width with its unit."""
    return f"{bits:g} bit" + ("" if bits == 1 else "s")


def charts(params: float, tokens: float, bits: Sequence[float], law: LossLaw | None = None) -> list[Chart]:
    """Return the charts of a plan.

    Args:
        params: N, parameters.
        tokens: D, tokens of both phases.
        bits: bit widths; each gets a curve.
        law: a fitted law; without one there is only the chart of the paper's formula.
    """
    best_fractions = _best_fractions(params, tokens, bits, law)
    return [best_fractions] if law is None else [_losses(params, tokens, bits, law), best_fractions]


def _losses(params: float, tokens: float, bits: Sequence[float], law: LossLaw) -> Chart:
    fractions, highest, lowest, lines = np.linspace(0.005, 0.9, 180), 0.0, np.inf, []
    for index, b in enumerate(bits):
        best, least = law.optimal_fraction(params, tokens, b), law.minimum(params, tokens, b)
        usual, waste = law.at_fraction(params, tokens, b, _USUAL), wasted_tokens(law, params, tokens, b, _USUAL)
        losses = law.at_fraction(params, tokens, b, fractions)
        lines += [
            Line("", list(zip(fractions.tolist(), losses.tolist(), strict=True)), index),
            Line(f"{bits_text(b)}: best at {best:.1%}; {_USUAL:.0%} wastes {human(waste)} tokens",
                 [(float(best), float(least))], index, marks=True),
            Line("", [(_USUAL, float(usual))], index, marks=True),
        ]  # fmt: skip
        lowest = min(lowest, least)
        highest = max(highest, law.at_fraction(params, tokens, b, 0.02), law.at_fraction(params, tokens, b, 0.7))
    room = highest - lowest  # above: for the legend of a picture
    return Chart(
        f"{human(params)} parameters, {human(tokens)} tokens", lines, "fraction of quantized tokens",
        "loss of the fitted law", percent_x=True, y_limits=(float(lowest - 0.1 * room), float(highest + 0.4 * room)),
    )  # fmt: skip


def _best_fractions(params: float, tokens: float, bits: Sequence[float], law: LossLaw | None) -> Chart:
    s_of_plans = [tokens_per_parameter_byte(params, tokens, b) for b in bits]
    s = np.geomspace(min(2.0, *s_of_plans), max(1e4, *s_of_plans), 180)
    lines = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExtrapolationWarning)
        formula = np.asarray(optimal_qat_fraction(8.0, s[s > 1], 1.0))
        lines.append(Line("formula [paper]", list(zip(s[s > 1].tolist(), formula.tolist(), strict=True))))
        for index, (b, s_of_plan) in enumerate(zip(bits, s_of_plans, strict=True)):
            if law:
                fractions = np.asarray(law.optimal_fraction(params, s * params * b / 8, b))
                label = f"fitted law, {bits_text(b)}"
                lines.append(Line(label, list(zip(s.tolist(), fractions.tolist(), strict=True)), index))
                best = law.optimal_fraction(params, tokens, b)
            else:
                best = optimal_qat_fraction(params, tokens, b)
            lines.append(Line(f"{bits_text(b)}: {best:.1%}", [(s_of_plan, float(best))], index, marks=True))
    return Chart(
        "Best fraction", lines, "S, tokens per parameter byte (logarithmic)", "best fraction of quantized tokens",
        log_x=True, percent=True,
    )  # fmt: skip
