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

#: The columns of a table.
HEADER = ("implementation", "output", "timed", "median ms", "p10 ... p90", "of floor", "error", "over the best peer")


def show(rows: Sequence[Row]) -> None:
    """Print the rows of one case."""
    timed = [row for row in rows if row["status"] == "ok"]
    head = rows[0]["case"] + (f"   {floor_text(timed[0])}" if timed else "")
    lines = [cells(row) for row in rows if row["status"] != "missing"]
    if sys.stdout.isatty() and (table := _rich(head, lines)):
        table()
    else:
        _plain(head, lines)
    for remark in filter(None, (noise_text(rows), peak_text(rows))):
        print(f"  {remark}")
    for row in rows:
        if row["status"] == "missing":
            print(f"  missing: {row['implementation']} ({row['timing']}): {row['note']}")
    for note in dict.fromkeys(f"{row['implementation']}: {row['note']}" for row in timed if row["note"]):
        print(f"  {note}")
    sys.stdout.flush()


def floor_text(row: Row) -> str:
    """Return the floor of a timed row's case, and the work behind it."""
    megabytes = f"{row['bytes'] * 1e-6:.4g} MB"
    work = f"{megabytes}, {row['flops'] * 1e-9:.3g} GFLOP" if row["flops"] else megabytes
    return f"floor {row['floor_ms']:.4g} ms ({work})"


def noise_text(rows: Sequence[Row]) -> str:
    """Return a warning if the times of a case scatter; an empty text if they do not."""
    spreads = [row["quantiles_ms"] for row in rows if row["status"] == "ok"]
    noise = max((q["p75"] / max(q["p25"], 1e-9) for q in spreads), default=0.0)
    if noise <= _NOISY:
        return ""
    return f"NOISY: the middle half of some repetitions spans a factor of {noise:.1f}; repeat on a quieter machine"


def peak_text(rows: Sequence[Row]) -> str:
    """Return the peak memory of the calls of a case that measured it; an empty text if none did."""
    peaks = [row for row in rows if row["status"] == "ok" and row.get("peak_bytes") is not None]
    peaks = [row for row in peaks if row["timing"] == "call"]
    said = ", ".join(f"{row['implementation']} {row['peak_bytes'] * 1e-6:.4g} MB" for row in peaks)
    return f"peak memory: {said}" if said else ""


def cells(row: Row) -> tuple[str, ...]:
    """Return a row as text, in the order of :data:`HEADER`."""
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
    widths = [max(map(len, column)) for column in zip(HEADER, *lines, strict=True)]
    print(f"\n{head}")
    for line in (HEADER, *lines):
        print("  " + "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def _rich(head: str, lines: list[tuple[str, ...]]) -> Any:
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        return None
    table = Table(*HEADER, title=head, title_justify="left")
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
