"""The picture of a run: loss over training, and loss over size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

#: Okabe and Ito's colours, told apart by colour-blind readers; full precision is black.
_COLOURS = ("#0072B2", "#009E73", "#E69F00", "#D55E00", "#CC79A7", "#56B4E9")
_INK, _QUIET = "#222222", "#888888"


def plot(report: dict[str, Any], path: Path) -> None:
    """Draw ``report`` (see `report.write`) into a PNG file."""
    figure = Figure(figsize=(12, 5.2), dpi=150, layout="constrained")
    over_steps, over_size = figure.subplots(1, 2, width_ratios=(1.75, 1))
    _draw_steps(over_steps, report)
    _draw_sizes(over_size, report)
    for axes in (over_steps, over_size):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.set_ylabel("bits per byte, held-out text")
    figure.savefig(path)


def _name(row: dict[str, Any]) -> str:
    return f"{row['bits']:g} bit" + ("" if row["bits"] == 1 else "s")


def _draw_steps(axes: Axes, report: dict[str, Any]) -> None:
    curves, first, rows = report["curves"], report["full_precision"], report["rows"]
    start = first["steps"]
    x, y = zip(*curves["fp"]["held_out"], strict=True)
    axes.plot(x, y, color=_INK, linewidth=2, label="full precision")
    axes.axhline(first["full_precision"], color=_INK, linewidth=0.8, linestyle=(0, (4, 4)), zorder=1)
    ends = []
    for row, colour in zip(rows, _COLOURS * 2, strict=False):
        points = curves[row["phase"]]["held_out"]
        x, y = zip(*((start + step, loss) for step, loss in points), strict=True)
        axes.plot(x[1:], y[1:], color=colour, linewidth=2)
        axes.plot(x[:2], y[:2], color=colour, linewidth=1, linestyle=":")
        axes.plot(x[0], y[0], marker="D", color=colour, markersize=6, markeredgecolor="white", linestyle="none")
        ends.append((y[-1], f"{_name(row)}  {y[-1]:.2f}", colour, x[-1]))
    axes.plot([], [], marker="D", color=_QUIET, linestyle="none", label="round-to-nearest, before QAT")
    axes.plot([], [], color=_QUIET, linewidth=2, label="QAT")
    _label_ends(axes, ends)
    axes.axvline(start, color=_QUIET, linewidth=0.8)
    axes.set_xlabel("training steps (QAT starts at the line, from the same weights)")
    axes.set_title("Loss over training", loc="left", fontweight="bold")
    axes.legend(frameon=False, loc="upper right", bbox_to_anchor=(0.72, 1.0))


def _label_ends(axes: Axes, ends: list[tuple[float, str, str, float]]) -> None:
    """Write each curve's name at its end, pushed up where the one below would touch it."""
    low, high = axes.get_ylim()
    gap, free = (high - low) * 0.05, -1.0
    for y, text, colour, x in sorted(ends):
        free = max(y, free + gap)
        axes.annotate(text, (x, y), (8, 0), textcoords="offset points", color=colour, va="center", fontweight="bold",
                      annotation_clip=False)  # fmt: skip


def _draw_sizes(axes: Axes, report: dict[str, Any]) -> None:
    rows = sorted(report["rows"], key=lambda row: row["model_bytes"])
    sizes = [row["model_bytes"] / 1e3 for row in rows]
    for name, key, marker, style in (("round-to-nearest", "round_to_nearest", "D", ":"), ("QAT", "qat", "o", "-")):
        axes.plot(sizes, [row[key] for row in rows], style, marker=marker, color=_INK if key == "qat" else _QUIET, label=name)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.set_xlabel("whole model, kilobytes")
    axes.set_title("Loss over size", loc="left", fontweight="bold")
    axes.legend(frameon=False)
