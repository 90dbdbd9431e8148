"""Markdown tables of rows that were measured on CPUs, for docs/benchmarks.md: ``python -m bench.cpu``.

Each kind of CPU has tables of its own: times of two kinds are never in one.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .markdown import DOCS, table, unique, write_between
from .report import RESULTS
from .run import Row

BEGIN, END = "<!-- made by `python -m bench.cpu`: begin -->", "<!-- end of what bench.cpu made -->"
#: Columns of the products: title, and the implementations that it shows.
_PRODUCTS = {
    "packed": ("packed",),
    "A8": ("packed, A8",),
    "nn.Linear": ("nn.Linear",),
    "int4pack, int8pack": ("int4pack", "int8pack"),
    "int8 mm": ("int8 mm",),
    "onnxruntime": ("onnxruntime 0",),
    "onnxruntime, A8": ("onnxruntime 4",),
    "ggml": ("ggml",),
}
#: Those that multiply 8-bit activations, which are no rivals of ours that does not.
_WITH_8_BITS = ("int8 mm", "onnxruntime 4", "ggml", "packed, A8")
_STEPS = {
    "QuantLinear": "QuantLinear", "torch.compile": "torch.compile", "eager formula": "eager",
    "torchao FakeQuantizedLinear": "torchao", "brevitas QuantLinear": "brevitas",
}  # fmt: skip


def main() -> None:
    """Write the tables of all CPU results between the marks of the page."""
    write_between(DOCS, BEGIN, END, render(RESULTS))


def render(results: Path) -> str:
    """Return the tables of a folder of results."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for file in sorted(results.glob("*.json")):
        document = json.loads(file.read_text())
        if document.get("device", {}).get("type") == "cpu" and "rows" in document:
            found.setdefault(document["device"]["name"], {})[file.name] = document
    return "\n\n".join(_device(name, documents) for name, documents in found.items())


def _device(name: str, documents: dict[str, dict[str, Any]]) -> str:
    parts = [f"### {name.replace('(R)', '')}"]
    for file, document in documents.items():
        suite = file.split("-")[0]
        if suite in _TABLES:
            rows = [row for row in document["rows"] if row["status"] == "ok"]
            versions, rates = document["versions"], document["products_tflop_s"]
            products = "".join(f", products of {key} {rate:.2f} TFLOP/s" for key, rate in rates.items())
            head = (
                f"[{file}](../bench/results/{file}): {document['date'][:10]}, torch {versions['torch']}, "
                f"{document['threads']} threads; copies {document['bandwidth_gb_s']:.0f} GB/s{products}."
            )
            parts += [head, *_TABLES[suite](rows)]
    return "\n\n".join(parts)


def _products(rows: Sequence[Row]) -> list[str]:
    lines = []
    for case in unique(r["case"] for r in rows):
        here = [r for r in rows if r["case"] == case]
        found = {title: _first(here, names) for title, names in _PRODUCTS.items()}
        row = found["packed"]
        if row is None:
            continue
        rivals = [r["median_ms"] for r in here if r["kind"] != "ours" and not _is_copy(r)
                  and not r["implementation"].startswith(_WITH_8_BITS)]  # fmt: skip
        shape = "" if row["shape"] == [4096, 4096] else f"{row['shape'][0]} x {row['shape'][1]}, "
        weight = f"{shape}{_bits(row['grid'])}, {row['granularity'].replace('per row', 'rows')}"
        weight += "" if row["dtype"] == "bfloat16" else f", {row['dtype']}"
        cells = ["-" if r is None else f"{r['median_ms']:.3g}" for r in found.values()]
        over = f"{row['median_ms'] / min(rivals):.2f}" if rivals else "-"
        lines.append((weight, row["variant"].split()[0], over, f"{row['fraction_of_floor']:.0%}", *cells))
    title = (
        "Products with a packed weight, 4096 x 4096 and bfloat16 activations unless said, ms. *ratio*: packed over the "
        "fastest of the others that multiplies activations of 16 bits or more."
    )
    return [table(title, ("weight", "tokens", "ratio", "of floor", *_PRODUCTS), lines)]


def _steps(rows: Sequence[Row]) -> list[str]:
    lines = []
    for case in unique(r["case"] for r in rows):
        here = [r for r in rows if r["case"] == case]
        plain = _first(here, ("nn.Linear",))
        if plain is None:
            continue
        cells = [_first(here, (name,)) for name in _STEPS]
        over = ["-" if r is None else f"{r['median_ms'] / plain['median_ms']:.2f}" for r in cells]
        layer = f"{plain['shape'][0]} x {plain['shape'][1]}, {plain['variant']}, {plain['dtype']}"
        lines.append((layer, _bits(plain["grid"]), f"{plain['median_ms']:.3g}", *over))
    title = "A training step, forward and backward, over one of nn.Linear:"
    return [table(title, ("layer", "weight", "nn.Linear, ms", *_STEPS.values()), lines)]


def _family(rows: Sequence[Row]) -> list[str]:
    lines = []
    for case in unique(r["case"] for r in rows):
        ours = {r["output"]: r for r in rows if r["case"] == case and r["implementation"] == "cpp"}
        peers = [r for r in rows if r["case"] == case and r["kind"] == "peer"]
        copy = next((r for r in rows if r["case"] == case and _is_copy(r) and r["output"] == "out"), None)
        if not ours or copy is None:
            continue
        cells = [f"{ours[k]['median_ms'] / copy['median_ms']:.2f}" if k in ours else "-" for k in ("out", "fresh")]
        best = min(peers, key=lambda r: r["median_ms"], default=None)
        rival = "-" if best is None else f"{best['median_ms'] / copy['median_ms']:.2f} {best['implementation']}"
        lines.append((case, *cells, rival))
    title = "Fake quantization, in copies of the bytes that it must move:"
    return [table(title, ("case", "`out=`", "fresh", "fastest peer"), lines)]


_TABLES = {"fake_quantize": _family, "linear": _steps, "lowbit": _products}


def _first(rows: Sequence[Row], names: Sequence[str]) -> Row | None:
    """Return the fastest of some implementations; a name may be the beginning of one, before a space."""
    found = [
        r for r in rows
        if any(r["implementation"] == name or r["implementation"].startswith(f"{name} ") for name in names)
    ]  # fmt: skip
    return min(found, key=lambda r: r["median_ms"], default=None)


def _is_copy(row: Row) -> bool:
    return str(row["implementation"]).startswith("copy")


def _bits(grid: str) -> str:
    return {"binary1": "1 bit", "ternary1.58": "1.58 bits"}.get(grid, f"{grid[-1]} bits")


if __name__ == "__main__":
    main()
