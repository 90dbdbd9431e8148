"""Colours and style of all plots. Needs matplotlib (extra ``plot``)."""

from __future__ import annotations

from .extras import missing

try:
    from matplotlib.axes import Axes
except ImportError as error:
    raise missing("a picture", "plot", error) from error

#: The colours of Okabe and Ito, which colour-blind readers can tell apart. Full precision is drawn in ``INK``.
COLOURS = ("#0072B2", "#009E73", "#E69F00", "#D55E00", "#CC79A7", "#56B4E9")
INK, QUIET = "#222222", "#8a8a8a"


def tidy(axes: Axes) -> None:
    """Apply the common style to a panel."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#ebebeb", linewidth=0.8)
    axes.set_axisbelow(True)
