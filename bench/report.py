"""Rows as tables on the terminal and as JSON files."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .machine import Machine
from .run import Row

SCHEMA = 1
RESULTS = Path(__file__).parent / "results"

#: A row is reported as noisy if the third quartile of its repetitions is more than this times the first.
_NOISY = 1.5

_HEADER = ("implementation", "output", "timed", "median ms", "p10 ... p90", "of floor", "error", "over the best peer")


def show(rows: Sequence[Row]) -> None:
    """Print the rows of one case."""
    timed = [row for row in rows if row["status"] == "ok"]
    head = rows[0]["case"]
    if timed:
        first = timed[0]
        megabytes = f"{first['bytes'] * 1e-6:.4g} MB"
        work = f"{megabytes}, {first['flops'] * 1e-9:.3g} GFLOP" if first["flops"] else megabytes
        head += f"   floor {first['floor_ms']:.4g} ms ({work})"
    lines = [_cells(row) for row in rows if row["status"] != "missing"]
    if sys.stdout.isatty() and (table := _rich(head, lines)):
        table()
    else:
        _plain(head, lines)
    if timed and (noise := max(_noise(row) for row in timed)) > _NOISY:
        print(
            f"  NOISY: the middle half of some repetitions spans a factor of {noise:.1f}; repeat on a quieter machine"
        )
    if peaks := [row for row in timed if row.get("peak_bytes") is not None and row["timing"] == "call"]:
        print("  peak memory: " + ", ".join(f"{r['implementation']} {r['peak_bytes'] * 1e-6:.4g} MB" for r in peaks))
    for row in rows:
        if row["status"] == "missing":
            print(f"  missing: {row['implementation']} ({row['timing']}): {row['note']}")
    for note in dict.fromkeys(f"{row['implementation']}: {row['note']}" for row in timed if row["note"]):
        print(f"  {note}")
    sys.stdout.flush()


def _noise(row: Row) -> float:
    q: dict[str, float] = row["quantiles_ms"]
    return q["p75"] / max(q["p25"], 1e-9)


def _cells(row: Row) -> tuple[str, ...]:
    lead = (row["implementation"], row.get("output", ""), row["timing"])
    errors = row.get("errors")
    shown = f"{max(errors):.1e}" if errors else row.get("unchecked", "")
    if row["status"] == "wrong":
        return (*lead, "WRONG", "", "", shown, "allowed: " + ", ".join(f"{t:.1e}" for t in row["tolerances"]))
    if row["status"] == "failed":
        return (*lead, "FAILED", "", "", "", row["note"])
    q = row["quantiles_ms"]
    spread = f"{q['p10']:.4g} ... {q['p90']:.4g}"
    # A copy is not compared with a floor that matrix products give.
    fraction = "" if row["flops"] and row["unchecked"] else f"{row['fraction_of_floor']:.0%}"
    return (*lead, f"{row['median_ms']:.4g}", spread, fraction, shown, _against(row))


def _against(row: Row) -> str:
    """Return the speedup over the fastest peer, or over a plain copy without peers."""
    ratios: dict[str, float] = row.get("speedup_over", {})
    rivals = {name: ratio for name, ratio in ratios.items() if not name.startswith("copy")} or ratios
    if not rivals:
        return ""
    name = min(rivals, key=rivals.__getitem__)
    return f"{rivals[name]:.2f}x {name}"


def _plain(head: str, lines: list[tuple[str, ...]]) -> None:
    widths = [max(map(len, column)) for column in zip(_HEADER, *lines, strict=True)]
    print(f"\n{head}")
    for line in (_HEADER, *lines):
        print("  " + "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def _rich(head: str, lines: list[tuple[str, ...]]) -> Any:
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        return None
    table = Table(*_HEADER, title=head, title_justify="left")
    for line in lines:
        bad = line[3] in ("WRONG", "FAILED")
        table.add_row(*line, style="bold red" if bad else None)
    return lambda: Console().print(table)


def write(rows: Sequence[Row], machine: Machine, settings: dict[str, Any], path: Path) -> None:
    """Write rows and the description of the machine as JSON."""
    save(document(rows, machine.describe(), settings), path)


def document(rows: Sequence[Row], described: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """Return the content of a file of results: the rows and the description of the machine."""
    return {"schema": SCHEMA, **described, "settings": settings, "rows": list(rows)}


def save(document: dict[str, Any], path: Path) -> Path:
    """Write a document as JSON, and return its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n")
    return path
