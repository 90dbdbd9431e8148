"""Pages and charts: what they show, and that nothing in them is taken for HTML."""

from __future__ import annotations

import math
import re

import pytest

from qatkernels.charts import MOST_BARS, MOST_POINTS, Chart, Line, histogram, number, svg, thinned
from qatkernels.page import Markup, Page, facts, figure, figures, folded, joined, paragraph, table, tag, text
from tests.pages import read_page

HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=y>&amp;\udc80"


def test_everything_is_escaped() -> None:
    line = Line(HOSTILE, [(1, 1), (2, 3)], 0, marks=True)
    page = Page(HOSTILE, HOSTILE)
    page.add(
        HOSTILE, HOSTILE, paragraph(HOSTILE), tag("p", HOSTILE), facts({HOSTILE: HOSTILE}), folded(HOSTILE, HOSTILE),
        table([HOSTILE], [[HOSTILE]]), joined(HOSTILE),
        figures(figure(Chart(HOSTILE, [line], HOSTILE, HOSTILE, x_ticks=[(1, HOSTILE)]), HOSTILE)),
    )  # fmt: skip
    found = read_page(page.encode())
    assert found.text.count("<script>alert(1)</script>") == 20 + 2, (
        "each of them (two in some), and a title for each mark"
    )
    assert "&amp;?" in found.text, "the text itself, and ? for what UTF-8 does not have"


def test_a_page_that_is_not_escaped_is_found() -> None:
    page = Page("x")
    for wrong in ("<b>", "</b>", "<script></script>", '<img src="x"/>', '<a href="x"></a>', '<p onclick="x"></p>'):
        page = Page("x")
        page.add("y", Markup(wrong))
        with pytest.raises(AssertionError):
            read_page(page.encode())


def test_values_in_cells() -> None:
    assert text(None) == ""
    assert text(Markup("<b>")) == "<b>"
    assert table(["a", "b"], [["x", 1]], bad=[0]) == (
        '<div class="box" tabindex="0"><table><thead><tr><th>a</th><th class="n">b</th></tr></thead>'
        '<tbody><tr class="bad"><td>x</td><td class="n">1</td></tr></tbody></table></div>'
    )


def positions(chart: str, name: str) -> list[float]:
    """Return the vertical positions of the marks of a chart, or the horizontal ones."""
    return [float(value) for value in re.findall(rf'{name}="([\d.]+)" ', chart)]


def test_points_are_where_their_values_are() -> None:
    line = Line("a", [(0, 1), (5, 10), (10, 100)], marks=True)
    linear = svg(Chart("t", [line], "x", "y"))
    assert positions(linear, "cx") == [54, 220, 386]
    low, middle, high = positions(linear, "cy")
    assert (low - middle) / (low - high) == pytest.approx(9 / 99, abs=1e-3)
    low, middle, high = positions(svg(Chart("t", [line], "x", "y", log_y=True)), "cy")
    assert (low - middle) / (low - high) == pytest.approx(0.5, abs=1e-3)
    shares = svg(Chart("t", [Line("a", [(0.5, 0.25)], marks=True)], "x", "y", percent=True, percent_x=True))
    assert "a: 25% at 50%" in shares


def test_what_cannot_be_drawn_is_a_gap() -> None:
    points = [(1, 1.0), (2, 2.0), (3, math.nan), (4, 1.0), (5, math.inf), (6, 0.0), (7, 3.0)]
    chart = Chart("t", [Line("a", points)], "x", "y")
    assert [len(piece) for piece in chart.pieces(chart.lines[0])] == [2, 1, 2]
    assert svg(chart).count("M") - svg(chart).count('class="grid"') == 3
    logarithmic = Chart("t", [Line("a", points)], "x", "y", log_y=True, y_limits=(1.0, 2.0))
    assert [len(piece) for piece in logarithmic.pieces(logarithmic.lines[0])] == [2, 1]
    nothing = Chart("t", [Line("a", [(0, math.nan)])], "x", "y")
    assert svg(nothing) == ""
    assert "Nothing was measured" in figure(nothing, "how")


@pytest.mark.parametrize(
    ("points", "log"),
    [
        ([(0, 5.0)], False), ([(0, 0.0), (1, 0.0)], False), ([(0, 5.0)], True), ([(3, -2.0), (3, 4.0)], False),
        ([(0, 1e-12), (1, 1e12)], True), ([(0, 1.0), (1, 1.0000001)], True), ([(0, 1e300), (1, -1e300)], False),
        ([(0, 1e-300), (1, 1e300)], True), ([(0, 7.9), (9, 8.0)], True), ([(0, 1e-9), (1, 2e-9)], False),
    ],
)  # fmt: skip
def test_every_range_has_an_axis_with_labels(points: list[tuple[float, float]], log: bool) -> None:
    drawn = svg(Chart("t", [Line("a", points, marks=True)], "x", "y", log_y=log))
    labels = re.findall(r'text-anchor="end">([^<]+)<', drawn)
    assert 1 <= len(labels) <= 9
    assert len(set(labels)) == len(labels) or points[-1][1] == 1.0000001, "labels have four digits"
    assert all(12 <= y <= 214 for y in positions(drawn, "cy"))


def test_long_lines_keep_their_extremes() -> None:
    points = [(float(i), math.sin(i / 500)) for i in range(20_000)]
    points[7_777] = (7_777.0, 9.0)
    kept = thinned(points)
    assert len(kept) <= MOST_POINTS
    assert kept == sorted(kept)
    assert (7_777.0, 9.0) in kept
    assert min(y for _, y in kept) == min(y for _, y in points)
    assert thinned(points[:MOST_POINTS]) == points[:MOST_POINTS]


def test_histograms() -> None:
    drawn = histogram([1, 3, 0], [2, 2, 0])
    bars = re.findall(r"v(-[\d.]+)", drawn)
    assert [float(bar) for bar in bars] == [-12, -36], "in proportion; none for an empty code"
    assert 'class="before"' in drawn
    assert 'class="before"' not in histogram([1, 2])
    wide = histogram(range(1, 257))
    assert wide.count("v-") == MOST_BARS
    read_page_with(histogram([0, 0]))


def read_page_with(content: str) -> None:
    page = Page("x")
    page.add("y", Markup(content))
    read_page(page.encode())


@pytest.mark.parametrize(
    ("value", "label"), [(0.25, "0.25"), (12_000, "12k"), (1e-5, "1e-5"), (2.5e-6, "2.5e-6"), (0, "0"), (-3, "-3")]
)
def test_numbers_are_short(value: float, label: str) -> None:
    assert number(value) == label
