"""Self-contained HTML pages for reports: tables, charts and facts in one style. Needs the standard library alone.

A page is one file that opens anywhere: it loads nothing, runs no script, follows the reader's light or dark setting,
and fits a telephone. Everything that is put into it is escaped; only :class:`Markup`, which the functions here return,
is taken as it is.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from .charts import COLOURS, Chart, svg


class Markup(str):
    """Text that is HTML already."""

    __slots__ = ()


def text(value: Any) -> Markup:
    """Return a value as HTML that shows it; markup stays as it is, None is shown as nothing."""
    if isinstance(value, Markup):
        return value
    return Markup("" if value is None else html.escape(str(value)))


def joined(*blocks: Any) -> Markup:
    """Return blocks one after the other; those that are not markup are escaped."""
    return Markup("\n".join(text(block) for block in blocks))


def tag(name: str, content: Any, kind: str = "") -> Markup:
    """Return an element with a content, which is escaped if it is not markup.

    Args:
        name: name of the element, such as ``p``.
        content: what it holds.
        kind: its class in the style of the page.
    """
    opening = f'<{name} class="{kind}">' if kind else f"<{name}>"
    return Markup(f"{opening}{text(content)}</{name}>")


def paragraph(content: Any) -> Markup:
    """Return a paragraph."""
    return tag("p", content)


def table(head: Sequence[Any], rows: Iterable[Sequence[Any]], *, words: int = 1, bad: Sequence[int] = ()) -> Markup:
    """Return a table, in a box of its own that scrolls where the window is narrow.

    Args:
        head: names of the columns.
        rows: the cells of each row; None is an empty cell.
        words: leading columns that hold words, aligned to the left; the others hold numbers.
        bad: indices of the rows that show a problem.
    """

    def cells(name: str, row: Sequence[Any]) -> str:
        return "".join(tag(name, cell, "" if i < words else "n") for i, cell in enumerate(row))

    lines = [tag("tr", Markup(cells("td", row)), "bad" if i in bad else "") for i, row in enumerate(rows)]
    inner = f"<thead><tr>{cells('th', head)}</tr></thead><tbody>{''.join(lines)}</tbody>"
    return Markup(f'<div class="box" tabindex="0"><table>{inner}</table></div>')


def facts(values: Mapping[str, Any]) -> Markup:
    """Return names and values as a list in columns."""
    rows = "".join(
        f"<div>{tag('dt', name)}{tag('dd', '-' if value is None else value)}</div>" for name, value in values.items()
    )
    return Markup(f'<dl class="facts">{rows}</dl>')


def folded(summary: Any, *blocks: Any, opened: bool = False) -> Markup:
    """Return blocks that a click on a line shows."""
    state = " open" if opened else ""
    return Markup(f"<details{state}><summary>{text(summary)}</summary>{joined(*blocks)}</details>")


def figure(chart: Chart, how: str) -> Markup:
    """Return a chart with its title, its legend and a sentence that says how to read it.

    Args:
        chart: the chart; without a point to draw, the figure says so.
        how: how to read it.
    """
    drawn = svg(chart)
    keys = [
        f'<span><svg class="key {line.classes}" viewBox="0 0 26 10" aria-hidden="true">'
        + ('<path class="line" d="M1 5H25"/>' if len(chart.points(line)) > 1 else '<circle cx="13" cy="5" r="4"/>')
        + f"</svg>{text(line.label)}</span>"
        for line in chart.shown() if line.label
    ]  # fmt: skip
    body = (
        f'<div class="legend">{"".join(keys)}</div><div class="axis">{text(chart.y)}</div>{drawn}'
        f'<div class="axis right">{text(chart.x)}</div>'
        if drawn
        else '<p class="nothing">Nothing was measured.</p>'
    )
    return Markup(f"<figure><h3>{text(chart.title)}</h3>{body}<figcaption>{text(how)}</figcaption></figure>")


def figures(*drawn: Markup) -> Markup:
    """Return figures side by side where there is room."""
    return Markup(f'<div class="figures">{"".join(drawn)}</div>')


class Page:
    """A page that grows by sections.

    Args:
        title: its title.
        lead: a line below the title.
    """

    def __init__(self, title: str, lead: str = "") -> None:
        self._title, self._lead = title, lead
        self._sections: list[str] = []

    def add(self, heading: str, *blocks: Any) -> None:
        """Add a section; without blocks, nothing. Blocks that are not markup are escaped."""
        if blocks:
            self._sections.append(f"<section><h2>{text(heading)}</h2>{joined(*blocks)}</section>")

    def encode(self) -> bytes:
        """Return the page as the content of a file, in UTF-8; what UTF-8 does not have (parts of file names) is "?"."""
        lead = f'<p class="lead">{text(self._lead)}</p>' if self._lead else ""
        page = (
            '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8"/>\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1"/>\n'
            '<meta name="color-scheme" content="light dark"/>\n'
            f"<title>{text(self._title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n"
            f"<header><h1>{text(self._title)}</h1>{lead}</header>\n" + "\n".join(self._sections)
        )
        return f"{page}\n</main>\n</body>\n</html>\n".encode(errors="replace")


#: Okabe and Ito's colours, lighter for dark ground.
_ON_DARK = ("#58B0E8", "#3CC79C", "#F0B740", "#F08A4B", "#E3A3C6", "#9AD3F5")


def _variables(colours: Sequence[str], **named: str) -> str:
    return "".join(
        f"--{name}:{value};" for name, value in {f"c{i}": c for i, c in enumerate(colours)}.items() | named.items()
    )


_LIGHT = _variables(
    COLOURS, paper="#fff", card="#f7f8f9", ink="#1d2126", quiet="#626a73", edge="#dfe2e6", bad="#b3261e"
)
_DARK = _variables(
    _ON_DARK, paper="#15181c", card="#1c2025", ink="#e3e6ea", quiet="#9aa3ad", edge="#343a41", bad="#ff8a80"
)

_STYLE = (
    f":root{{color-scheme:light dark;{_LIGHT}}}\n@media (prefers-color-scheme:dark){{:root{{{_DARK}}}}}\n"
    + "".join(f".c{i}{{color:var(--c{i})}}" for i in range(len(COLOURS)))
    + """
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);font:15px/1.5 system-ui,-apple-system,"Segoe UI",sans-serif;
 overflow-wrap:anywhere}
main{max-width:74rem;margin:0 auto;padding:1.5rem 1rem 4rem}
h1{font-size:1.5rem;line-height:1.25;margin:0}h2{font-size:1.15rem;margin:2.2rem 0 .6rem}
h3{font-size:.95rem;margin:1.4rem 0 .3rem}figure h3{margin-top:0}p{max-width:48rem;margin:.5rem 0}
.lead,.quiet,figcaption,.axis,dt,summary{color:var(--quiet)}.lead{margin-top:.3rem}
.note{border-left:4px solid var(--c2);padding:.3rem .8rem;background:var(--card)}.note.bad{border-color:var(--bad)}
.box{overflow-x:auto;max-width:100%;border:1px solid var(--edge);border-radius:6px;margin:.6rem 0}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
th,td{padding:.35rem .6rem;text-align:left;vertical-align:top;white-space:nowrap}
td:not(.n){white-space:normal;min-width:5rem;max-width:26rem}
th{white-space:normal;overflow-wrap:normal;
 font-weight:600;font-size:.85rem;background:var(--card);vertical-align:bottom}
tbody tr{border-top:1px solid var(--edge)}.n{text-align:right}tr.bad{color:var(--bad);font-weight:600}
.figures{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,21.5rem),1fr));gap:1rem}
figure{margin:0;padding:.9rem;background:var(--card);border:1px solid var(--edge);border-radius:8px;min-width:0}
figcaption{font-size:.85rem;margin-top:.5rem}.axis{font-size:.8rem;line-height:1.2}.right{text-align:right}
.legend{display:flex;flex-wrap:wrap;gap:.1rem 1rem;font-size:.85rem;margin-bottom:.3rem}
.key{width:26px;height:10px;margin-right:.35rem;vertical-align:middle}
svg{display:block}svg.key{display:inline-block}.chart{width:100%;height:auto}
svg text{font-size:12px;fill:var(--quiet);font-family:inherit}
.ink{color:var(--ink)}.grid{stroke:var(--edge);fill:none}.stop{stroke:var(--quiet);fill:none;stroke-dasharray:1 3}
.line{stroke:currentColor;fill:none;stroke-width:2;stroke-linejoin:round}.dashed .line{stroke-dasharray:6 4}
.dotted .line{stroke-dasharray:2 3}
.range{stroke:currentColor;stroke-width:5;opacity:.3;fill:none}circle{fill:currentColor;stroke:var(--card)}
.histogram{width:7.5rem;height:2.4rem}.bars{fill:var(--c0);opacity:.75}
.before{stroke:var(--ink);fill:none;vector-effect:non-scaling-stroke}
.bar{width:7.5rem;height:1rem;margin:.2rem 0;color:var(--quiet)}.bar.c0{color:var(--c0)}
.fill{fill:currentColor;opacity:.7}.spread{stroke:var(--ink);fill:none;vector-effect:non-scaling-stroke}
.facts{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,14rem),1fr));gap:.1rem 1.5rem;margin:.6rem 0}
.facts div{display:flex;gap:.6rem;justify-content:space-between;border-bottom:1px solid var(--edge);padding:.15rem 0}
dd{margin:0;text-align:right}dt{flex:none;max-width:60%}details{margin:.6rem 0}summary{cursor:pointer}

"""
)
