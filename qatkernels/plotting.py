"""Colours and style of all pictures, and charts as pictures. Needs matplotlib (extra ``plot``)."""

from __future__ import annotations

from typing import Any

from .charts import COLOURS, Chart
from .extras import missing

try:
    from matplotlib.axes import Axes
    from matplotlib.ticker import PercentFormatter
except ImportError as error:
    raise missing("a picture", "plot", error) from error

__all__ = ["COLOURS", "INK", "QUIET", "draw", "tidy"]

#: Full precision is drawn in ``INK``.
INK, QUIET = "#222222", "#8a8a8a"


def tidy(axes: Axes) -> None:
    """Apply the common style to a panel."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#ebebeb", linewidth=0.8)
    axes.set_axisbelow(True)


def draw(axes: Axes, chart: Chart) -> None:
    """Draw a chart into a panel: what :func:`qatkernels.charts.svg` draws for a page."""
    for line in chart.shown():
        colour = INK if line.colour is None else COLOURS[line.colour % len(COLOURS)]
        style = {"": "-", "dashed": "--", "dotted": ":"}[line.dash]
        marks: dict[str, Any] = {"marker": "o", "markersize": 8, "markeredgecolor": "white"} if line.marks else {}
        for i, piece in enumerate(chart.pieces(line)):
            label = line.label if line.label and not i else None
            axes.plot(*zip(*piece, strict=True), style, color=colour, linewidth=2, label=label, **marks)
    axes.set_xscale("log" if chart.log_x else "linear")
    axes.set_yscale("log" if chart.log_y else "linear")
    if chart.y_limits:
        axes.set_ylim(*chart.y_limits)
    for axis, shares in ((axes.xaxis, chart.percent_x), (axes.yaxis, chart.percent)):
        if shares:
            axis.set_major_formatter(PercentFormatter(1))
    axes.set_xlabel(chart.x)
    axes.set_ylabel(chart.y)
    axes.set_title(chart.title, loc="left", fontweight="bold")
    axes.legend(frameon=False)
    tidy(axes)
