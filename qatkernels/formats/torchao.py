"""torchao's ``IntxUnpackedToInt8Tensor``, which transformers reads with ``TorchAoConfig``.

A layer has int8 integers ``[N, K]`` and float32 scales ``[N, G]``; value = integer * scale. One byte holds one integer,
whatever its width, so such a folder is for going on in torchao, not for small files.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..extras import missing
from ._export import ExportReport, ExportRow
from ._folder import Source, naming
from .integers import IntegerWeight, UnfitError

BITS = range(2, 9)


def export(model: nn.Module, path: Path, *, tokenizer: Any = None) -> ExportReport:
    """Write a causal language model of transformers as a folder with weights of torchao.

    ``AutoModelForCausalLM.from_pretrained`` reads it where torchao is installed. Each layer takes the smallest of 2 to
    8 bits that holds its integers; zero points become part of them, and grids without a zero are doubled.

    Args:
        model: a quantized or packed model.
        path: the folder, which must not exist yet or be empty.
        tokenizer: a tokenizer of transformers, which is saved along; or None.

    Returns:
        How each layer was stored.

    Raises:
        ValueError: if the model is not of transformers, or has no quantized layer.
        UnfitError: if the format does not hold a layer exactly.
        MissingExtraError: if transformers or torchao is not installed.
        CheckpointError: if the folder holds something, or cannot be written.
    """
    try:
        from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict
        from torchao.quantization import IntxUnpackedToInt8Tensor, IntxWeightOnlyConfig
        from torchao.quantization.granularity import PerAxis, PerGroup
        from transformers import TorchAoConfig
    except ImportError as error:
        raise missing("export to torchao", "export", error) from error
    source = Source.of(model, "torchao")
    weights: dict[str, Tensor] = {}
    rows: list[ExportRow] = []
    kinds: list[tuple[int, int | None]] = []
    for name, layer in source.layers.items():
        weight = source.integers(name)
        with naming(name, layer):
            bits = _bits(weight)
        weights[f"{name}.weight"] = IntxUnpackedToInt8Tensor(
            qdata=weight.integers.to(torch.int8),
            scale=weight.steps.clone(),
            zero_point=torch.zeros_like(weight.steps, dtype=torch.int8),
            target_dtype=getattr(torch, f"int{bits}"),
            block_size=(1, weight.group_size),
            dtype=torch.float32,
            activation_quantization=None,
        )
        group = None if weight.steps.shape[-1] == 1 else weight.group_size
        kinds.append((bits, group))
        per = "rows" if group is None else f"groups of {group}"
        nbytes = weight.integers.numel() + 5 * weight.steps.numel()
        rows.append(ExportRow(name, f"int{bits} in bytes, {per}", 8 * nbytes / max(weight.integers.numel(), 1)))
    # The tensors say themselves how they are stored; the configuration names what most of them are.
    (bits, group), _ = Counter(kinds).most_common(1)[0]
    granularity = PerAxis(0) if group is None else PerGroup(group)
    config = TorchAoConfig(
        IntxWeightOnlyConfig(weight_dtype=getattr(torch, f"int{bits}"), granularity=granularity),
        modules_to_not_convert=source.linears,
    )
    tensors, metadata = flatten_tensor_state_dict(weights)
    settings = {"quantization_config": config.to_dict()}
    nbytes = source.write(path, tensors, settings, "pt", tokenizer, metadata)
    return ExportReport(path, rows, nbytes, source.notes)


def _bits(weight: IntegerWeight) -> int:
    """Return the smallest width that holds a weight.

    Raises:
        UnfitError: if there is none.
    """
    if (bits := weight.signed_bits(BITS)) is None:
        raise UnfitError("its integers are {} to {}, at most 8 bits hold -128 to 127".format(*weight.ends))
    return bits
