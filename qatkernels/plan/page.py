"""A plan as an HTML page (`qatkernels.page`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..page import Markup, Page, figure, figures, paragraph, table, tag
from ..units import human
from .charts import charts
from .law import LossLaw

_HOW_LOSSES = (
    "Each curve is the loss that the law expects for a share of quantized tokens. The mark at its bottom is the plan, "
    "the other one 10%. A flat bottom says that the exact share matters little."
)
_HOW_FRACTIONS = (
    "The more tokens a byte of weights sees, the larger the best share of quantized tokens. Marks are the plan. Where "
    "the fitted law and the paper's formula part, the law knows your runs, and the formula those of the paper."
)


def page(
    answer: Mapping[str, Any], rows: Sequence[Sequence[tuple[str, str]]], notes: Sequence[str], law: LossLaw | None
) -> bytes:
    """Return the page of a plan.

    Args:
        answer: the plan as data.
        rows: what is said about each of its bit widths, names with values.
        notes: warnings.
        law: the law that it was made with; None for the formula alone.
    """
    params, tokens, plans = answer["params"], answer["tokens"], answer["plans"]
    drawn = Page(
        f"Plan for {human(params)} parameters and {human(tokens)} tokens",
        "How many tokens to train in full precision, and how many quantized, at each bit width",
    )
    names = list(dict.fromkeys(name for row in rows for name, _ in row))
    columns = [dict(row) for row in rows]
    head = ["", *(f"{one['bits']:g} bit" + ("" if one["bits"] == 1 else "s") for one in plans)]
    lines = [[name, *(column.get(name) for column in columns)] for name in names]
    drawn.add("Plan", *(tag("p", note, "note") for note in notes), table(head, lines, words=len(head)))
    pictures = charts(params, tokens, [one["bits"] for one in plans], law)
    hows = [_HOW_LOSSES, _HOW_FRACTIONS][-len(pictures) :]
    drawn.add("Pictures", figures(*(figure(chart, how) for chart, how in zip(pictures, hows, strict=True))))
    if "memory" in answer:
        drawn.add("Bit widths for the same memory", *_memory(answer["memory"]))
    if "fit" in answer:
        drawn.add("Fitted law", *_fit(answer["fit"]))
    return drawn.encode()


def _memory(memory: Mapping[str, Any]) -> list[Markup]:
    head = ("bits", "parameters", "tokens", "quantized", "loss")
    rows = [
        (f"{c['bits']:g}", human(c["params"]), human(c["tokens"]), f"{c['fraction']:.1%}", f"{c['loss']:.4g}")
        for c in memory["choices"]
    ]
    how = f"Weights that fill {human(memory['bytes'], 'B')} at the same compute, 6·N·D; the lowest loss comes first."
    return [paragraph(how), table(head, rows, words=0)]


def _fit(fit: Mapping[str, Any]) -> list[Markup]:
    mae = fit["optimum_mae"]
    optima = "not measured" if mae is None else f"off by {mae:.3f} on average"
    head, rows = ("coefficient", "value", f"interval at {fit['confidence']:.0%}", "remark"), []
    for name, value in fit["coefficients"].items():
        limits = fit["intervals"][name]
        interval = None if limits is None else f"{limits[0]:.4g} to {limits[1]:.4g}"
        remark = "at its limit: the runs do not determine it" if name in fit["undetermined"] else None
        rows.append((name.rstrip("_"), f"{value:.4g}", interval, remark))
    return [
        paragraph(f"Fitted to {fit['runs']} runs: R² {fit['r2']:.4f}; best shares {optima}. A wide interval says that "
                  "the runs hardly determine a coefficient."),
        table(head, rows, words=len(head)),
    ]  # fmt: skip
