"""Which trained weights each export format holds, found by exporting tiny models.

For each quantizer and each size of the groups that share a scale, a Llama with one block is quantized and exported to
every format (to ONNX one linear layer alone, because tracing takes long). A row of the table says whether the file has
the trained weights bit for bit, how far off they are, or why the format does not hold them. The tests in tests/formats/
read such files with the runtimes themselves.
"""

from __future__ import annotations

import logging
import math
import re
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qatkernels import QuantConfig, quantize_model, quantized_modules
from qatkernels.formats import UnfitError, export

from .results import Case, Figures, Results
from .runner import Session, Study

#: Formats in the order of the columns, with their names.
FORMATS = {
    "gguf": "GGUF",
    "compressed-tensors": "compressed-tensors",
    "mlx": "MLX",
    "onnx": "ONNX",
    "gemma": "gemma",
    "torchao": "torchao",
}
QUANTIZERS = {
    "binary": ((1,), ("binary",)),
    "ternary": ((1.58,), ("ternary",)),
    "seq": ((2, 3, 4, 8), ("seq",)),
    "lsq": ((2, 3, 4, 5, 6, 8), ("lsq",)),
    "affine": ((2, 3, 4, 8), ("affine, int zero points", "affine, float zero points")),
}
#: How weights share scales: None is a row, 0 the whole tensor.
GROUPS = (0, None, 256, 128, 64, 32, 16)
SIZES = {
    "full": {"quantizers": QUANTIZERS, "groups": GROUPS, "formats": tuple(FORMATS)},
    "smoke": {
        "quantizers": {"lsq": ((4, 8), ("lsq",))}, "groups": (None, 16), "formats": ("gguf", "compressed-tensors"),
    },
}  # fmt: skip
#: Where a format takes a setting that makes more models fit, it is tried when the defaults do not.
_SECOND = {"compressed-tensors": {"symmetric": True}}


def cases(session: Session) -> Iterator[Case]:
    """Yield a case for each quantizer and dtype of scales."""
    for scheme, (widths, names) in session.size["quantizers"].items():
        for bits in widths:
            for name in names:
                for dtype in ("float16", "float32"):
                    settings = {"scheme": scheme, "bits": bits, "quantizer": name, "scale_dtype": dtype}
                    label = f"{name.replace(', ', '-').replace(' ', '-')}-{bits:g}-{dtype}"
                    yield Case(label, 0, settings, partial(_run, session.size, settings))


def _run(size: dict[str, Any], settings: dict[str, Any]) -> Figures:
    """Export a model for each size of groups and each format."""
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    found: Figures = {}
    for group in size["groups"]:
        model = _model(settings, group)
        found[_group(group)] = {to: _cell(model, to, settings["scale_dtype"]) for to in size["formats"]}
    return found


def _model(settings: dict[str, Any], group: int | None) -> nn.Module:
    """Return a quantized model that uses every code, and whose scales and zero points are not what they begin as."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape: dict[str, Any] = {
        "hidden_size": 256,
        "intermediate_size": 256,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
    }
    model = LlamaForCausalLM(LlamaConfig(vocab_size=256, max_position_embeddings=64, **shape)).eval()
    config = QuantConfig(
        settings["bits"], settings["scheme"], group or None, per_tensor=group == 0,
        scale_dtype=settings["scale_dtype"], zero_point_domain="int" if ", int" in settings["quantizer"] else "float",
    )  # fmt: skip
    model = quantize_model(model, config, warn_below=0)
    with torch.no_grad():
        for layer in quantized_modules(model).values():
            layer.weight.mul_(2.5)
            layer.scale.mul_(torch.empty_like(layer.scale).uniform_(0.8, 1.2))
            if layer.zero_point is not None:
                layer.zero_point.add_(0.25)  # they begin as integers, and training moves them
    return model


def _cell(model: nn.Module, to: str, dtype: str) -> Figures:
    """Export a model; return how its first layer is stored, or why it cannot be."""
    tries: list[dict[str, Any]] = [{}, *([_SECOND[to]] if to in _SECOND else [])]
    if dtype == "float32" and to in ("gguf", "mlx"):
        tries.append({"convert": True})
    reason = ""
    if to == "onnx":
        model = nn.Sequential(model.get_submodule("model.layers.0.mlp.up_proj"))
        tries = [{"inputs": (torch.zeros(1, 256),)}]
    for options in tries:
        with tempfile.TemporaryDirectory() as folder:
            try:
                report = export(model, Path(folder) / "model", to=to, **options)
            except UnfitError as error:
                lines = re.sub(r"^\S+ \(\d+ x \d+\): ", "", str(error)).splitlines()
                reason = reason or ": ".join([lines[0], *(line.strip() for line in lines[1:][-1:])])
                continue
        first = report.rows[0]
        worst = max(row.error for row in report.rows)
        return {
            "stored_as": first.stored_as,
            "bits": first.bits_per_weight,
            "error": worst,
            "options": {name: value for name, value in options.items() if name != "inputs"},
        }
    return {"reason": reason}


def _group(group: int | None) -> str:
    return "tensor" if group == 0 else "row" if group is None else str(group)


def report(results: Results, out: Path) -> str:
    """Return the table, a line for each quantizer and all group sizes that fare alike, and the reasons below it."""
    reasons: list[str] = []
    found: dict[tuple[str, float], dict[str, Figures]] = {}  # by quantizer and bits: the figures by dtype of scales
    for row in results.rows:
        settings = row["settings"]
        found.setdefault((settings["quantizer"], settings["bits"]), {})[settings["scale_dtype"]] = row["figures"]
    formats = [to for to in FORMATS if any(to in cell for row in results.rows for cell in row["figures"].values())]
    lines = [
        "| scheme | bits | scale for each | " + " | ".join(FORMATS[to] for to in formats) + " |",
        "|---|---|---|" + "---|" * len(formats),
    ]
    for (quantizer, bits), by_dtype in found.items():
        alike: dict[tuple[str, ...], list[str]] = {}
        for group in next(iter(by_dtype.values())):
            cells = {dtype: figures[group] for dtype, figures in by_dtype.items()}
            texts = (_text({dtype: cell[to] for dtype, cell in cells.items()}, to, reasons) for to in formats)
            alike.setdefault(tuple(texts), []).append(group)
        for cell_texts, groups in alike.items():
            lines.append(f"| {quantizer} | {bits:g} | {', '.join(groups)} | " + " | ".join(cell_texts) + " |")
    return "\n".join([*lines, "", *(f"{i}. {reason}" for i, reason in enumerate(reasons, 1))])


def _text(cells: dict[str, Figures], to: str, reasons: list[str]) -> str:
    """Return a cell of the table: what float16 scales give, then float32 scales if that differs."""
    first, *others = (_one(cell, to, reasons) for cell in cells.values())
    kind = first.split(":")[-1].strip()
    return "; ".join([first, *(f"float32 scales {o.replace(f': {kind}', '')}" for o in others if o != first)])


def _one(cell: Figures, to: str, reasons: list[str]) -> str:
    """Return a model's part of a cell; a reason is added to the list below the table, once."""
    if "reason" in cell:
        kind = re.sub(r"-?\d+(\.\d+)?(e-?\d+)?", "N", cell["reason"])
        for i, known in enumerate(reasons, 1):
            if re.sub(r"-?\d+(\.\d+)?(e-?\d+)?", "N", known) == kind:
                return f"no ({i})"
        reasons.append(cell["reason"])
        return f"no ({len(reasons)})"
    kind = re.sub(r" in (groups|blocks) of \d+|, (rows|groups of \d+)", "", cell["stored_as"])
    if to == "gguf":
        kind = f"{kind} ({cell['bits']:.2f} bits a weight)"
    how = "exact" if cell["error"] == 0 else f"off by at most {_rounded_up(cell['error'])}"
    given = "".join(f", {name}={value}" for name, value in cell["options"].items())
    return f"{how}: {kind}{given}"


def _rounded_up(error: float) -> str:
    """Return an error as a power of two: the bound that it keeps, which does not depend on the drawn weights."""
    return f"2^{math.ceil(math.log2(error))}"


STUDY = Study("formats", SIZES, cases, report)
