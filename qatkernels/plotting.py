"""How our pictures look. Needs matplotlib (extra ``plot``)."""

from __future__ import annotations

from .extras import missing

try:
    from matplotlib.axes import Axes
except ImportError as error:
    raise missing("a picture", "plot", error) from error

#: Okabe and Ito's colours, which colour-blind readers can tell apart; full precision is in ``INK``.
COLOURS = ("#0072B2", "#009E73", "#E69F00", "#D55E00", "#CC79A7", "#56B4E9")
INK, QUIET = "#222222", "#8a8a8a"


def tidy(axes: Axes) -> None:
    """Give a panel the look of all of ours."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#ebebeb", linewidth=0.8)
    axes.set_axisbelow(True)
