"""The table of docs/benchmarks.md from bench/results/kernels-sm90.json."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from ..gpu.tables import END
from ..gpu.target import ROOT
from ..markdown import table, write_between

DOCS, RESULTS = ROOT / "docs/benchmarks.md", ROOT / "bench/results/kernels-sm90.json"
BEGIN = "<!-- made by `python -m bench.kernels docs`: begin -->"
_HEAD = (
    "kernel", "tile", "warps", "registers", "blocks", "instructions", "products each", "of them: matrix",
    "FP32/BF16 math", "conversions", "loads, bytes each",
)  # fmt: skip


def update(docs: Path, results: Path) -> None:
    """Write the table between its marks of a page."""
    write_between(docs, BEGIN, END, render(results))


def render(results: Path) -> str:
    """Return the table. A value that differs between the measurements is shown as ``before → after``."""
    runs: dict[str, Any] = json.loads(results.read_text())["runs"]
    before, after = (runs.get(name, {"cases": {}})["cases"] for name in ("before", "after"))
    lines = []
    for name in dict.fromkeys([*before, *after]):
        cells = [_cells(run[name]) for run in (before, after) if name in run]
        lines.append((name, *(_both(*pair) if len(pair) > 1 else pair[0] for pair in zip(*cells, strict=True))))
    versions = next(iter(runs.values()))["versions"]
    title = f"Machine code for sm_90 by Triton {versions['triton']}, earlier → now, in the loop where the time goes:"
    return table(title, _HEAD, lines)


def _both(before: str, after: str) -> str:
    return before if before == after else f"{before} → {after}"


def _cells(found: dict[str, Any]) -> tuple[str, ...]:
    loop, tile = found["loop"], found["tile"]
    sizes = [str(tile[k]) for k in ("BLOCK_M", "BLOCK_N", "BLOCK_K", "R", "C", "T", "N", "K") if k in tile]
    products = "-"
    if "BLOCK_K" in tile:
        products = f"{math.prod(tile[f'BLOCK_{c}'] for c in 'MNK') / 32 / found['warps'] / loop['instructions']:.1f}"
    return (
        " x ".join(sizes) or "-",
        *(str(found[key]) for key in ("warps", "registers", "blocks")),
        str(loop["instructions"]),
        products,
        *(str(loop[key]) for key in ("matrix", "fma")),
        str(loop["conversion"] + loop["special"] + loop["division"]),
        _loads(loop),
    )


def _loads(loop: dict[str, Any]) -> str:
    parts = [f"{count} x {size}" for size, count in loop["loads"].items()]
    parts += [f"{count} x {size} async" for size, count in loop["copies"].items()]
    return ", ".join(parts) or "-"
