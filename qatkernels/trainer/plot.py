"""The plot of a run: loss over training, and the loss of rounding to nearest beside that of QAT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FuncFormatter, NullFormatter, NullLocator

from ..plotting import COLOURS, INK, QUIET

_TICKS = (1, 1.25, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 12, 16, 24, 32)


def plot(report: dict[str, Any], path: Path) -> None:
    """Draw ``report`` (see `report.write`) into a PNG file."""
    figure = Figure(figsize=(12, 5.4), dpi=150, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.08)  # type: ignore[union-attr, call-arg]
    training, rounding = figure.subplots(1, 2, width_ratios=(1.6, 1), sharey=True)
    _draw_training(training, report)
    _draw_rounding(rounding, report)
    training.set_yscale("log")
    low, high = training.get_ylim()
    low *= 0.97
    training.set_ylim(low, high)
    training.set_yticks([tick for tick in _TICKS if low <= tick <= high])
    training.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    training.yaxis.set_minor_locator(NullLocator())
    training.yaxis.set_minor_formatter(NullFormatter())
    training.set_ylabel("bits per byte on held-out text (log scale)")
    for axes in (training, rounding):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#ebebeb", linewidth=0.8)
        axes.set_axisbelow(True)
    figure.savefig(path)


def _name(row: dict[str, Any]) -> str:
    return f"{row['bits']:g} bit" + ("" if row["bits"] == 1 else "s")


def _colours(report: dict[str, Any]) -> list[str]:
    return [COLOURS[i % len(COLOURS)] for i in range(len(report["rows"]))]


def _draw_training(axes: Axes, report: dict[str, Any]) -> None:
    """Draw the held-out loss over the steps: full precision, and each bit width from the step where its QAT starts."""
    curves, first, quantized = report["curves"], report["full_precision"], {row["phase"] for row in report["rows"]}
    for i, name in enumerate(name for name in curves if name not in quantized):
        start = report["starts"][name][1]
        steps, losses = zip(*((start + step, loss) for step, loss in curves[name]["held_out"]), strict=True)
        axes.plot(steps, losses, color=INK, linewidth=2, label="" if i else "full precision")
    axes.axhline(first["full_precision"], color=INK, linewidth=0.9, linestyle=(0, (5, 4)), zorder=1)
    for start in {row["first"] for row in report["rows"]}:
        axes.axvline(start, color=QUIET, linewidth=0.9, zorder=1)
    for row, colour in zip(report["rows"], _colours(report), strict=True):
        start = row["first"]
        steps, losses = zip(*((start + step, loss) for step, loss in curves[row["phase"]]["held_out"]), strict=True)
        axes.plot(steps[:2], losses[:2], color=colour, linewidth=1.2, linestyle=":")
        axes.plot(steps[1:], losses[1:], color=colour, linewidth=2, label=f"QAT, {_name(row)}")
        axes.plot(steps[0], losses[0], "D", color=colour, markersize=7, markeredgecolor="white", clip_on=False)
    axes.plot([], [], "D", color=QUIET, label="rounded to nearest, untrained")
    axes.set_xlabel("training steps (at a line, quantization starts from the full-precision weights)")
    axes.set_title("Training", loc="left", fontweight="bold")
    axes.margins(x=0.02)
    axes.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.45, 1.0))


def _draw_rounding(axes: Axes, report: dict[str, Any]) -> None:
    """Draw for each bit width the loss of rounding to nearest, the loss after QAT and the size of the model."""
    first, rows = report["full_precision"], report["rows"]
    axes.axhline(first["full_precision"], color=INK, linewidth=0.9, linestyle=(0, (5, 4)), zorder=1)
    axes.plot(0, first["full_precision"], "o", color=INK, markersize=9)
    _number(axes, 0, first["full_precision"], above=True)
    for x, (row, colour) in enumerate(zip(rows, _colours(report), strict=True), start=1):
        rounded, trained = row["round_to_nearest"], row["qat"]
        axes.plot((x, x), (rounded, trained), color=colour, linewidth=2, linestyle=":")
        axes.plot(x, rounded, "D", color=colour, markersize=8, markeredgecolor="white")
        axes.plot(x, trained, "o", color=colour, markersize=9, markeredgecolor="white")
        _number(axes, x, rounded, above=True)
        _number(axes, x, trained, above=False)
    labels = [f"{_name(row)}\n{row['model_bytes'] / 1e6:.2f} MB" for row in (first, *rows)]
    axes.set_xticks(range(len(labels)), labels)
    axes.set_xlim(-0.5, len(labels) - 0.3)
    axes.tick_params(axis="y", labelleft=False, length=0)
    axes.plot([], [], "D", color=QUIET, label="rounded to nearest")
    axes.plot([], [], "o", color=QUIET, label="after QAT")
    axes.set_xlabel("width of the quantized weights, size of the whole model")
    axes.set_title("Rounding against QAT", loc="left", fontweight="bold")
    axes.legend(frameon=False, loc="upper left")


def _number(axes: Axes, x: float, y: float, above: bool) -> None:
    """Write a value above its marker, or to the right of it."""
    offset, alignment = ((0, 9), "center") if above else ((8, -4), "left")
    note = axes.annotate(f"{y:.2f}", (x, y), offset, textcoords="offset points", ha=alignment, color=INK)
    note.set_path_effects([withStroke(linewidth=3, foreground="white")])
