"""Charts as SVG text, for pages: lines over an axis, and histograms. Needs the standard library alone.

Colours and fonts are those of the page (`qatkernels.page`), so that a chart is readable on light and on dark ground:
a line has a class ``c0`` to ``c5``, or ``ink``, and is drawn in ``currentColor``.
"""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from .units import human

#: The colours of Okabe and Ito, which colour-blind readers can tell apart.
COLOURS = ("#0072B2", "#009E73", "#E69F00", "#D55E00", "#CC79A7", "#56B4E9")

#: Size of a chart in its own units, and the margins for the labels. It scales with the page; letters are 12 units high.
WIDTH, HEIGHT = 400, 240
_LEFT, _RIGHT, _TOP, _BOTTOM = 54, 14, 12, 26
#: Points that a line may have; of longer ones the smallest and the largest value of each piece are drawn.
MOST_POINTS = 400
#: Bars that a histogram may have; neighbours share one beyond that.
MOST_BARS = 64

Point = tuple[float, float]


@dataclass(frozen=True)
class Line:
    """One line of a chart.

    Attributes:
        label: its name in the legend; empty for none.
        points: ``(x, y)``; the line has a gap where one is not finite, has no logarithm on a logarithmic axis, or is
            beyond the limits of the chart.
        colour: index of its colour; None for that of the text.
        dash: how it is drawn.
        marks: whether points have marks, which show their values under the pointer.
        ranges: ``(x, low, high)``, drawn as bars behind the line.
    """

    label: str
    points: Sequence[Point]
    colour: int | None = None
    dash: Literal["", "dashed", "dotted"] = ""
    marks: bool = False
    ranges: Sequence[tuple[float, float, float]] = ()

    @property
    def classes(self) -> str:
        """The classes of the page's style that say how the line looks."""
        colour = "ink" if self.colour is None else f"c{self.colour % len(COLOURS)}"
        return f"{colour} {self.dash}".strip()


@dataclass(frozen=True)
class Chart:
    """Lines over a common axis.

    Attributes:
        title: what the chart shows.
        lines: the lines; a later one is drawn over an earlier one.
        x: name of the horizontal axis, with its unit.
        y: name of the vertical axis, with its unit.
        log_x: whether the horizontal axis is logarithmic.
        log_y: whether the vertical axis is logarithmic.
        percent: whether vertical values are fractions that are shown in percent.
        percent_x: whether horizontal values are.
        verticals: where vertical lines are drawn.
        x_ticks: labels of the horizontal axis by position; None to choose them.
        y_limits: least and greatest value that the vertical axis shows; None for those of the lines.
    """

    title: str
    lines: Sequence[Line]
    x: str
    y: str
    log_x: bool = False
    log_y: bool = False
    percent: bool = False
    percent_x: bool = False
    verticals: Sequence[float] = ()
    x_ticks: Sequence[tuple[float, str]] | None = None
    y_limits: tuple[float, float] | None = None

    def shown(self) -> list[Line]:
        """Return the lines that have a point to draw."""
        return [line for line in self.lines if self.points(line)]

    def points(self, line: Line) -> list[Point]:
        """Return the points of a line that can be drawn."""
        return [point for piece in self.pieces(line) for point in piece]

    def pieces(self, line: Line) -> list[list[Point]]:
        """Return the points of a line between its gaps."""
        low, high = self.y_limits or (-math.inf, math.inf)
        pieces: list[list[Point]] = [[]]
        for x, y in line.points:
            if _can_be_drawn(x, self.log_x) and _can_be_drawn(y, self.log_y) and low <= y <= high:
                pieces[-1].append((x, y))
            elif pieces[-1]:
                pieces.append([])
        return [piece for piece in pieces if piece]


def _can_be_drawn(value: float, log: bool) -> bool:
    """Whether an axis can hold a value: beyond 10^±300 its own arithmetic would overflow. NaN is beyond."""
    return 1e-300 <= value <= 1e300 if log else abs(value) <= 1e300


class _Axis:
    """Maps values to positions along one side of a chart, and chooses ticks.

    Args:
        values: the values that it must hold, at least one.
        log: whether it is logarithmic.
        begin: position of the least value.
        end: position of the greatest.
        margin: free space at both ends, as a fraction of the range.
    """

    def __init__(self, values: Sequence[float], log: bool, begin: float, end: float, margin: float) -> None:
        self._log, self._begin, self._end = log, begin, end
        low, high = (self._scaled(v) for v in (min(values), max(values)))
        room = margin * (high - low) or (0.1 if log else max(abs(low) * 0.1, 1e-12) if margin else 0.5)
        self._low, self._high = (low - room, high + room) if margin or high == low else (low, high)
        if log:  # ticks are powers of ten that float has
            self._low, self._high = max(self._low, -307.0), min(self._high, 307.0)

    def _scaled(self, value: float) -> float:
        return math.log10(value) if self._log else value

    def at(self, value: float) -> float:
        """Return the position of a value; one beyond the axis is put at its end."""
        share = (self._scaled(value) - self._low) / (self._high - self._low)
        return self._begin + min(max(share, 0.0), 1.0) * (self._end - self._begin)

    def ticks(self, most: int) -> list[float]:
        """Return about ``most`` round values between the ends."""
        if not self._log:
            return _even(self._low, self._high, most)
        low, high = 10**self._low, 10**self._high
        if high > 1e3 * low:
            first, last = math.ceil(self._low - 1e-9), math.floor(self._high + 1e-9)
            return [10.0**power for power in range(first, last + 1, -(-(last - first + 1) // most))]
        for parts in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 4, 6, 8), (1, 1.2, 1.4, 1.7, 2, 2.5, 3, 3.5, 4, 5, 6, 8)):
            powers = range(math.floor(self._low), math.ceil(self._high) + 1)
            found = [part * 10.0**power for power in powers for part in parts if low <= part * 10.0**power <= high]
            if len(found) >= 3:
                return found[:: -(-len(found) // (most + 2))]
        return _even(low, high, most)


def _even(low: float, high: float, most: int) -> list[float]:
    step = 10.0 ** math.floor(math.log10((high - low) / most))
    step *= next(factor for factor in (1, 2, 2.5, 5, 10) if high - low <= step * factor * most)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [index * step for index in range(first, last + 1)]


def number(value: float) -> str:
    """Return a value as a short label: ``0.25``, ``12k``, ``1e-5``."""
    if abs(value) >= 1e4:
        return human(value)
    text = f"{value:.4g}"
    return text if "e" not in text else f"{float(text.split('e')[0]):g}e{int(text.split('e')[1])}"


def percent(value: float) -> str:
    """Return a fraction as a short label in percent."""
    return f"{100 * value:.3g}%"


def svg(chart: Chart) -> str:
    """Return a chart as an SVG element; an empty text if there is nothing to draw."""
    shown = chart.shown()
    if not shown:
        return ""
    points = [point for line in shown for point in chart.points(line)]
    bounds = [
        bound for line in shown for _, *both in line.ranges for bound in both if _can_be_drawn(bound, chart.log_y)
    ]
    x = _Axis([p[0] for p in points] + list(chart.verticals), chart.log_x, _LEFT, WIDTH - _RIGHT, 0.0)
    y = _Axis(chart.y_limits or [p[1] for p in points] + bounds, chart.log_y, HEIGHT - _BOTTOM, _TOP, 0.05)
    parts = [f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{html.escape(chart.title)}">']
    shows_x, shows_y = (percent if shares else number for shares in (chart.percent_x, chart.percent))
    for value in y.ticks(5):
        label = shows_y(value)
        parts.append(f'<path class="grid" d="M{_LEFT} {y.at(value):.1f}H{WIDTH - _RIGHT}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y.at(value) + 4:.1f}" text-anchor="end">{html.escape(label)}</text>')
    for value, label in chart.x_ticks or [(value, shows_x(value)) for value in x.ticks(6)]:
        parts.append(f'<path class="grid" d="M{x.at(value):.1f} {HEIGHT - _BOTTOM}v4"/>')
        parts.append(f'<text x="{x.at(value):.1f}" y="{HEIGHT - 8}" text-anchor="middle">{html.escape(label)}</text>')
    parts += [f'<path class="stop" d="M{x.at(value):.1f} {_TOP}V{HEIGHT - _BOTTOM}"/>' for value in chart.verticals]
    parts += [_drawn(line, chart.pieces(line), x, y, shows_x, shows_y) for line in shown]
    return "".join(parts) + "</svg>"


def _drawn(
    line: Line, pieces: list[list[Point]], x: _Axis, y: _Axis, shows_x: Callable[[float], str],
    shows_y: Callable[[float], str],
) -> str:  # fmt: skip
    """Return the elements of one line."""
    parts = [f'<g class="{line.classes}">']
    for at, low, high in line.ranges:
        parts.append(f'<path class="range" d="M{x.at(at):.1f} {y.at(low):.1f}V{y.at(high):.1f}"/>')
    path = "".join(f"M{'L'.join(f'{x.at(a):.1f} {y.at(b):.1f}' for a, b in thinned(piece))}" for piece in pieces)
    parts.append(f'<path class="line" d="{path}"/>')
    if line.marks:
        parts += [
            f'<circle cx="{x.at(a):.1f}" cy="{y.at(b):.1f}" r="3.5"><title>'
            f"{html.escape(f'{line.label}: {shows_y(b)} at {shows_x(a)}')}</title></circle>"
            for piece in pieces for a, b in piece
        ]  # fmt: skip
    return "".join(parts) + "</g>"


def thinned(points: Sequence[Point], most: int = MOST_POINTS) -> Sequence[Point]:
    """Return points in order, of which there are at most ``most``: the least and the greatest of each piece."""
    if len(points) <= most:
        return points
    size = -(-2 * len(points) // most)
    kept: list[Point] = []
    for begin in range(0, len(points), size):
        piece = points[begin : begin + size]
        lowest, highest = (choose(range(len(piece)), key=lambda i: piece[i][1]) for choose in (min, max))
        kept += [piece[i] for i in sorted({lowest, highest})]
    return kept


def histogram(counts: Sequence[float], before: Sequence[float] | None = None) -> str:
    """Return a small histogram as an SVG element: bars, and earlier counts as a line around them.

    Args:
        counts: counts by code, at least one.
        before: earlier counts of the same codes; None for none.
    """
    per_bar = -(-len(counts) // MOST_BARS)
    bars, earlier = ([sum(row[i : i + per_bar]) for i in range(0, len(row), per_bar)] for row in (counts, before or ()))
    highest = max([*bars, *earlier, 1e-300])
    size = 120 / len(bars)
    outline = "".join(f"V{40 - 36 * count / highest:.1f}h{size:.2f}" for count in earlier)
    shape = "".join(
        f"M{i * size + 0.1 * size:.2f} 40v{-36 * count / highest:.1f}h{0.8 * size:.2f}V40z"
        for i, count in enumerate(bars) if count
    )  # fmt: skip
    return (
        '<svg class="histogram" viewBox="0 0 120 41" preserveAspectRatio="none" role="img" '
        f'aria-label="histogram of codes"><path class="bars" d="{shape}"/>'
        + (f'<path class="before" d="M0 40{outline}V40"/>' if earlier else "")
        + '<path class="grid" d="M0 40.5H120"/></svg>'
    )
