"""What the tables of docs/benchmarks.md are made with, for CPUs (``cpu.py``) and GPUs (``gpu/tables.py``)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parents[1] / "docs/benchmarks.md"


def table(title: str, head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """Return a table; nothing if it has no lines."""
    shown = [f"| {' | '.join(line)} |" for line in lines]
    if not shown:
        return ""
    return "\n".join([f"{title}\n", f"| {' | '.join(head)} |", "|" + "---|" * len(head), *shown])


def unique(values: Iterable[Any]) -> list[Any]:
    """Return values in order, each once."""
    return list(dict.fromkeys(values))
