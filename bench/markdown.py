"""What generated parts of the documents are made with: tables, and writing them between two marks of a page."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parents[1] / "docs/benchmarks.md"


class MarksError(ValueError):
    """A page does not have the marks between which a command writes."""


def table(title: str, head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """Return a table; nothing if it has no lines."""
    shown = [f"| {' | '.join(line)} |" for line in lines]
    if not shown:
        return ""
    return "\n".join([f"{title}\n", f"| {' | '.join(head)} |", "|" + "---|" * len(head), *shown])


def write_between(page: Path, begin: str, end: str, text: str) -> None:
    """Replace what a page has between two marks, which are lines of it.

    Raises:
        MarksError: if the page does not have the first mark once, and the other one after it.
    """
    before, found, rest = page.read_text(encoding="utf-8").partition(begin)
    _, ended, after = rest.partition(end)
    if not (found and ended) or begin in rest:
        raise MarksError(f"{page} must have the line {begin!r} once, and {end!r} after it")
    page.write_text(f"{before}{block(begin, end, text)}{after}", encoding="utf-8")


def block(begin: str, end: str, text: str) -> str:
    """Return a generated part of a page with its marks; blank lines around it, so that tables end where they end."""
    return f"{begin}\n\n{text}\n\n{end}"


def unique(values: Iterable[Any]) -> list[Any]:
    """Return values in order, each once."""
    return list(dict.fromkeys(values))
