"""MLX, Apple's array library: folders that mlx-lm reads.

A quantized layer has three tensors in MLX's mode ``affine``, in groups of 32, 64 or 128 elements of a row:

    weight   uint32 [N, K * bits / 32]   q, from 0, as one string of bits for each row (docs/packing.md)
    scales   [N, G]
    biases   [N, G]                      value = scale * q + bias

The bias is the smallest value of a group, so that every grid fits, those without a zero at their own width. In float32
the bias, the product and the sum are each rounded, where this library rounds one product. So a value is off by at most
two units in the last place of the largest one: half a unit for the bias, one for the product, which may be twice as
large, and half for the sum. It is exact where scales have few bits (``QuantConfig(scale_dtype=torch.float16)``).
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..dtypes import dtype_name
from ._export import ExportReport, ExportRow
from ._folder import Source, naming
from .integers import IntegerWeight, UnfitError, words

BITS = (1, 2, 3, 4, 5, 6, 8)
#: Sizes of groups; rows, and other groups, are cut into the first that divides them.
GROUPS = (64, 32, 128)


def export(model: nn.Module, path: Path, *, tokenizer: Any = None, convert: bool = False) -> ExportReport:
    """Write a causal language model of transformers as a folder for mlx-lm.

    Scales and biases have the dtype of the model.

    Args:
        model: a quantized or packed model.
        path: the folder, which must not exist yet or be empty.
        tokenizer: a tokenizer of transformers, which is saved along; or None.
        convert: round scales and biases that the dtype of a bfloat16 or float16 model does not hold, instead of
            refusing the layer; the report says how far off values are.

    Returns:
        How each layer was stored.

    Raises:
        ValueError: if the model is not of transformers, or has no quantized layer.
        UnfitError: if the format does not hold a layer.
        MissingExtraError: if transformers is not installed.
        CheckpointError: if the folder holds something, or cannot be written.
    """
    source = Source.of(model, "MLX")
    tensors: dict[str, Tensor] = {}
    rows: list[ExportRow] = []
    kinds: dict[str, tuple[int, int]] = {}
    for name, layer in source.layers.items():
        weight = source.integers(name)
        with naming(name, layer):
            stored = Stored.of(weight, source.config.dtype, convert)
        tensors |= {f"{name}.{part}": value for part, value in stored.tensors.items()}
        kinds[name] = stored.group_size, stored.bits
        nbytes = sum(value.nbytes for value in stored.tensors.values())
        stored_as = f"affine, {stored.bits} bits in groups of {stored.group_size}"
        rows.append(ExportRow(name, stored_as, 8 * nbytes / weight.integers.numel(), stored.error(weight)))
    usual = Counter(kinds.values()).most_common(1)[0][0]
    quantization = _arguments(usual) | {name: _arguments(kind) for name, kind in kinds.items() if kind != usual}
    settings = {"quantization": quantization, **_earlier_names(source.config)}
    return ExportReport(path, rows, source.write(path, tensors, settings, "mlx", tokenizer), source.notes)


def _arguments(kind: tuple[int, int]) -> dict[str, Any]:
    return {"group_size": kind[0], "bits": kind[1]}


def _earlier_names(config: Any) -> dict[str, Any]:
    """Return the settings of rotary embeddings under the names of transformers before version 5, which mlx-lm reads.

    Raises:
        ValueError: if mlx-lm cannot have the same attention.
    """
    rope = getattr(config, "rope_parameters", None) or {}
    if "full_attention" in rope:  # Gemma 3: local layers have their own, and all but every p-th layer are local
        kinds = config.layer_types
        period = kinds.index("full_attention") + 1 if "full_attention" in kinds else len(kinds) + 1
        if any((kind == "full_attention") != (i % period == 0) for i, kind in enumerate(kinds, 1)):
            raise ValueError(f"layer_types is {kinds}: mlx-lm takes every n-th layer to be full and the others local")
        return {
            "rope_theta": rope["full_attention"]["rope_theta"],
            "rope_local_base_freq": rope["sliding_attention"]["rope_theta"],
            "sliding_window_pattern": period,
        }
    found = {key: rope[key] for key in ("rope_theta", "partial_rotary_factor") if key in rope}
    scaling = {key: value for key, value in rope.items() if key not in found}
    return found | ({"rope_scaling": scaling} if scaling.get("rope_type", "default") != "default" else {})


@dataclass(frozen=True)
class Stored:
    """A layer as it is stored.

    Attributes:
        bits: width of the integers.
        group_size: elements of a row that share a scale and a bias.
        q: integers ``[N, K]`` from 0.
        scales: ``[N, K / group_size]``.
        biases: like ``scales``.
    """

    bits: int
    group_size: int
    q: Tensor
    scales: Tensor
    biases: Tensor

    @classmethod
    def of(cls, weight: IntegerWeight, dtype: torch.dtype, convert: bool) -> Stored:
        """Return how a weight is stored, with scales of a dtype.

        Raises:
            UnfitError: if no size of groups divides it, it has too many levels, or the dtype does not hold its scales
                and ``convert`` is False.
        """
        size = weight.group_size
        if size not in GROUPS:
            size = next((size for size in GROUPS if weight.group_size % size == 0), 0)
        if not size:
            raise UnfitError(f"it has a scale for {weight.group_size} elements, MLX for 32, 64 or 128")
        bits = next(bits for bits in BITS if weight.levels <= 1 << bits)
        weight = weight.by_block(size)
        q = (weight.integers.reshape(*weight.low.shape, -1) - weight.low[..., None]) // weight.spacing
        exact = weight.steps.double() * weight.spacing, weight.steps.double() * weight.low
        scales, biases = (values.to(dtype) for values in exact)
        if dtype != torch.float32 and not convert:
            lost = (scales.double() != exact[0]) | (biases.double() != exact[1])
            if lost.any():
                name = dtype_name(dtype)
                raise UnfitError(
                    f"{int(lost.sum())} of {lost.numel()} groups have a scale or smallest value that is no {name} "
                    f"number, and the model is {name}: train with QuantConfig(scale_dtype=torch.{name}), export the "
                    "model in float32, or export with convert=True, which rounds them"
                )
        return cls(bits, size, q.reshape(weight.integers.shape), scales, biases)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The tensors by the last part of their names."""
        return {
            "weight": words(self.q, self.bits).view(torch.uint32),
            "scales": self.scales,
            "biases": self.biases,
        }

    def error(self, weight: IntegerWeight) -> float:
        """Return the largest difference between a stored and a trained value, over the largest trained value."""
        grouped = self.q.reshape(*self.scales.shape, -1).float()
        stored = grouped * self.scales.float()[..., None] + self.biases.float()[..., None]
        wanted = weight.dequantize()
        return float((stored.reshape(wanted.shape) - wanted).abs().max() / wanted.abs().max())
