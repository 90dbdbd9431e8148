"""The quantization that transformers calls ``gemma``: 2, 4 or 8 bits a weight, a scale a row, static activations.

Any model of transformers runs in it, in plain PyTorch, with its weights packed in memory. A layer has:

    weight                     uint8 [N, ceil(K / 4)] or [N, ceil(K / 2)], or int8 [N, K]
    weight_scale               float32 [N, 1]                value = integer * scale
    input_activation_scale     float32 []                    of int8 inputs; 0 for inputs in full precision
    output_activation_scale    float32 []                    the same for outputs, after the bias

Packed integers have 2 or 8 added, low bits first: the string of bits of docs/packing.md.
"""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..dtypes import dtype_name
from ..nn.activation import ACTS, learned_acts
from ._export import ExportReport, ExportRow
from ._folder import Source, naming
from .integers import IntegerWeight, UnfitError, static_bits, static_scale, words

BITS = (2, 4, 8)


def export(model: nn.Module, path: Path, *, tokenizer: Any = None) -> ExportReport:
    """Write a causal language model of transformers as a folder in its format ``gemma``.

    Each layer takes the smallest of 2, 4 and 8 bits that holds it. Inputs and outputs that are quantized to 8 bits with
    one learned scale (``QuantConfig(act_bits=8, act_scheme="lsq", out_bits=8)``) are quantized there too.

    Args:
        model: a quantized or packed model, with a scale for each row (or for the whole weight).
        path: the folder, which must not exist yet or be empty.
        tokenizer: a tokenizer of transformers, which is saved along; or None.

    Returns:
        How each layer was stored.

    Raises:
        ValueError: if the model is not of transformers, or has no quantized layer.
        UnfitError: if the format does not hold a layer exactly.
        MissingExtraError: if transformers is not installed.
        CheckpointError: if the folder holds something, or cannot be written.
    """
    source = Source.of(model, "gemma", takes=lambda act: static_bits(act) == 8)
    tensors: dict[str, Tensor] = {}
    rows: list[ExportRow] = []
    widths: dict[str, int] = {}
    for name, layer in source.layers.items():
        weight = source.integers(name)
        with naming(name, layer):
            widths[name] = bits = _bits(weight)
        unsigned = weight.integers + (1 << bits - 1)
        packed = words(unsigned, bits).view(torch.uint8)[:, : -(-unsigned.shape[-1] * bits // 8)].contiguous()
        learned = learned_acts(layer)
        scales = {name: static_scale(learned[name]) if name in learned else torch.zeros(()) for name in ACTS}
        tensors |= {
            f"{name}.weight": packed if bits < 8 else weight.integers.to(torch.int8),
            f"{name}.weight_scale": weight.steps.clone(),
            f"{name}.input_activation_scale": scales["act"],
            f"{name}.output_activation_scale": scales["out_act"],
        }
        nbytes = tensors[f"{name}.weight"].nbytes + weight.steps.nbytes
        stored_as = [f"int{bits}, rows", *(f"int8 {ACTS[act]}s" for act in learned)]
        rows.append(ExportRow(name, ", ".join(stored_as), 8 * nbytes / max(weight.integers.numel(), 1)))
    usual = Counter(widths.values()).most_common(1)[0][0]
    others = {name: bits for name, bits in widths.items() if bits != usual}
    settings = {
        "quant_method": "gemma",
        "num_bits": usual,
        "quantize_embeddings": False,
        "module_quant_configs": {f"^{re.escape(name)}$": {"num_bits": bits} for name, bits in others.items()},
        "modules_to_not_convert": [f"{re.escape(name)}$" for name in source.linears],
    }
    nbytes = source.write(path, tensors, {"quantization_config": settings}, "pt", tokenizer)
    return ExportReport(path, rows, nbytes, [*source.notes, *_notes(source)])


def _notes(source: Source) -> list[str]:
    count = sum(bool(learned_acts(layer)) for layer in source.layers.values())
    if not count or source.config.dtype == torch.float32:
        return []
    dtype = dtype_name(source.config.dtype)
    return [
        f"{count} layers quantize activations, which transformers divides by their scale in {dtype} where this library "
        "does in float32: some of its integers are off by one"
    ]


def _bits(weight: IntegerWeight) -> int:
    """Return the smallest width that holds a weight.

    Raises:
        UnfitError: if there is none, or groups share scales.
    """
    if weight.steps.shape[-1] != 1:
        raise UnfitError(f"{weight.group_size} inputs share a scale, the format has one scale for each row")
    if (bits := weight.signed_bits(BITS)) is None:
        raise UnfitError("its integers are {} to {}, at most 8 bits hold -128 to 127".format(*weight.ends))
    return bits
