"""Markdown tables of rows that were measured on a GPU: for docs/benchmarks.md, and for the summary of a call.

A row's *floor* is what a copy of as many bytes took in the same race. Shares of the bandwidth are of large copies in
the same run, shares of cuBLAS of `nn.Linear` with a 16-bit weight of the same shape in the same race.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..markdown import table, unique, write_between
from ..run import Row

BEGIN, END = "<!-- made by `python -m bench.gpu docs`: begin -->", "<!-- end -->"
NOTHING = "Not measured yet: nothing has run on a GPU."
#: Up to so many tokens a packed product is bound by reading the weight.
_FEW = 8


def update(docs: Path, results: Path) -> None:
    """Write the tables of all GPU results between the marks of a page."""
    write_between(docs, BEGIN, END, render(results))


def render(results: Path) -> str:
    """Return the tables of a folder of results."""
    by_device: dict[str, list[dict[str, Any]]] = {}
    for file in sorted(results.glob("*.json")):
        document = json.loads(file.read_text())
        if document.get("device", {}).get("type") == "cuda" and "rows" in document:
            by_device.setdefault(document["device"]["name"], []).append(document)
    if not by_device:
        return NOTHING
    return "\n\n".join(_device(name, documents) for name, documents in by_device.items())


def _device(name: str, documents: Sequence[dict[str, Any]]) -> str:
    first = documents[0]
    versions = first["versions"]
    rows = [row for document in documents for row in document["rows"]]
    rates = {name: rate for d in documents for name, rate in d["products_tflop_s"].items()}
    products = ", ".join(f"{rate:.0f} TFLOP/s in {name}" for name, rate in rates.items())
    head = (
        f"### {name}\n\ntorch {versions['torch']}, Triton {versions['triton']}, {first['date'][:10]}, commit "
        f"{(first['git']['commit'] or 'unknown')[:12]}. Large copies move {first['bandwidth_gb_s']:.0f} GB/s"
        + (f"; `torch.mm` of 8192 makes {products}." if products else ".")
    )
    return "\n\n".join([head, *sections(rows, first["bandwidth_gb_s"] * 1e9)])


def sections(rows: Sequence[Row], bandwidth: float) -> list[str]:
    """Return the tables of a run, without empty ones."""
    good = [row for row in rows if row["status"] == "ok"]
    found = [_family(good), *_products(good, bandwidth), _steps(good), _others(good), _bad(rows)]
    return [text for text in found if text]


def _family(rows: Sequence[Row]) -> str:
    mine = [r for r in rows if r["suite"] == "fake_quantize" and r["timing"] == "graph" and r.get("output") == "out"]
    lines = []
    for case in unique(r["case"] for r in mine):
        here = {r["implementation"]: r for r in mine if r["case"] == case}
        cells = [_share(here.get(name), lambda r: r["fraction_of_floor"]) for name in ("triton", "cuda")]
        errors = [max(r["errors"]) for r in here.values() if r.get("errors")]
        if cells != ["-", "-"]:
            lines.append((case, *cells, f"{max(errors):.0e}" if errors else "-"))
    return table("Fake quantization into given memory, µs and share of a copy of as many bytes:",
                 ("case", "Triton", "CUDA C++", "error"), lines)  # fmt: skip


def _products(rows: Sequence[Row], bandwidth: float) -> list[str]:
    mine = [r for r in rows if r["op"] == "packed linear" and r["timing"] == "graph" and r["dtype"] == "bfloat16"]
    found = []
    for shape in unique(tuple(r["shape"]) for r in mine):
        here = [r for r in mine if tuple(r["shape"]) == shape]
        tokens = sorted({_tokens(r) for r in here})
        lines = []
        for weight in unique((r["grid"], r["granularity"]) for r in here):
            for name in ("triton", "cuda", "packed, A8"):
                of = [r for r in here if (r["grid"], r["granularity"]) == weight and r["implementation"] == name]
                if of:
                    cells = [_product(next((r for r in of if _tokens(r) == t), None), bandwidth) for t in tokens]
                    lines.append((f"{weight[0]}, {weight[1]}", name, *cells))
        plain = [[r for r in here if r["kind"] == "baseline" and "Linear" in r["implementation"] and _tokens(r) == t]
                 for t in tokens]  # fmt: skip
        lines.append(("16 bits", "nn.Linear", *(f"{1e3 * r[0]['median_ms']:.1f}" if r else "-" for r in plain)))
        title = (f"Products with a packed weight of {shape[0]} x {shape[1]}, bfloat16, in a CUDA graph: µs; share of "
                 f"the bandwidth up to {_FEW} tokens, of cuBLAS beyond:")  # fmt: skip
        found.append(table(title, ("weight", "kernel", *map(str, tokens)), lines))
    return found


def _product(row: Row | None, bandwidth: float) -> str:
    if row is not None and _tokens(row) <= _FEW:
        return _share(row, lambda r: r["bytes"] / bandwidth / (1e-3 * r["median_ms"]))
    return _share(row, lambda r: next((v for k, v in r["speedup_over"].items() if "Linear" in k), 0.0))


def _steps(rows: Sequence[Row]) -> str:
    mine = [r for r in rows if r["suite"] == "linear" and r["implementation"] == "QuantLinear"]
    lines = []
    for key in unique((tuple(r["shape"]), r["variant"], r["dtype"]) for r in mine):
        here = [r for r in mine if (tuple(r["shape"]), r["variant"], r["dtype"]) == key]
        cells = []
        for grid, timing in ((g, t) for t in ("call", "graph") for g in ("seq2", "lsq4")):
            row = next((r for r in here if r["grid"] == grid and r["timing"] == timing), None)
            over = None if row is None else next((v for k, v in row["speedup_over"].items() if "Linear" in k), None)
            cells.append("-" if not over else f"{1 / over:.3f}")
        errors = [max(r["errors"]) for r in here if r.get("errors")]
        lines.append(
            (f"{key[0][0]} x {key[0][1]}, {key[1]}, {key[2]}", *cells, f"{max(errors):.0e}" if errors else "-")
        )
    head = ("layer", "eager, 2 bits", "eager, 4 bits", "captured, 2 bits", "captured, 4 bits", "error")
    return table("A training step of QuantLinear over one of nn.Linear:", head, lines)


def _others(rows: Sequence[Row]) -> str:
    """Everything else: the better of eager and captured is not chosen, captured is shown where there is one."""
    mine = [r for r in rows if r["suite"] not in ("fake_quantize", "linear") and r["op"] != "packed linear"
            and r["kind"] == "ours" and r["implementation"] != "reference"]  # fmt: skip
    captured = {(r["case"], r["implementation"], r["output"]) for r in mine if r["timing"] == "graph"}
    lines = []
    for r in mine:
        if r["timing"] == "graph" or (r["case"], r["implementation"], r["output"]) not in captured:
            against = {k: v for k, v in r.get("speedup_over", {}).items() if not k.startswith("copy")}
            best = min(against, key=against.__getitem__, default="")
            errors = f"{max(r['errors']):.0e}" if r.get("errors") else "-"
            over = f"{against[best]:.2f}x {best}" if best else "-"
            lines.append((r["case"], f"{r['implementation']} ({r['output']})", f"{1e3 * r['median_ms']:.1f}",
                          f"{r['fraction_of_floor']:.0%}", over, errors))  # fmt: skip
    head = ("case", "implementation", "µs", "of floor", "as fast as", "error")
    return table("Everything else:", head, lines)


def _bad(rows: Sequence[Row]) -> str:
    lines = [(r.get("case", ""), r["implementation"], r["timing"], r["status"], r.get("note", "").replace("|", "/"))
             for r in rows if r["status"] in ("wrong", "failed")]  # fmt: skip
    return table("Wrong or failed:", ("case", "implementation", "timed", "status", "note"), lines)


def _share(row: Row | None, of: Callable[[Row], float]) -> str:
    return "-" if row is None else f"{1e3 * row['median_ms']:.1f} ({of(row):.0%})"


def _tokens(row: Row) -> int:
    return int(row["variant"].split()[0])
