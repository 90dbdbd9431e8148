"""compressed-tensors, the format of llm-compressor that vLLM and transformers read.

A folder of transformers whose quantized layers have three tensors in place of a weight:

    weight_packed   int32 [N, ceil(K * bits / 32)]   integers plus 2 ** (bits - 1), as one string of bits for each row
    weight_scale    [N, G]                            value = integer * scale
    weight_shape    int64 [2]

The string of bits is this library's own (docs/packing.md), its rows padded to four bytes. It is that of
compressed-tensors 0.18 and later; earlier versions pad numbers of 3, 5, 6 and 7 bits. With whole zero points there is
``weight_zero_point``, packed along the rows, and ``value = (integer - zero point) * scale``. Inputs and outputs that
are quantized with one scale have ``input_scale`` and ``output_scale``, ``[1]``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..dtypes import dtype_name
from ..nn.activation import ACTS, learned_acts
from ._export import ExportReport, ExportRow
from ._folder import Source, naming
from .integers import IntegerWeight, UnfitError, static_bits, static_scale, words

#: The widths that are written. compressed-tensors also knows 1 bit, {-1, 0}, which none of the grids here is.
BITS = range(2, 9)
#: Dtypes of scales, the first that holds all of a layer's is taken.
_SCALES = (torch.bfloat16, torch.float16, torch.float32)


def export(
    model: nn.Module, path: Path, *, tokenizer: Any = None, bits: int | None = None, symmetric: bool = False
) -> ExportReport:
    """Write a causal language model of transformers as a folder in the format ``pack-quantized``.

    Each quantized layer takes the smallest width that holds its integers. Grids without a zero (binary, seq) have
    doubled integers: {-3, -1, 1, 3} times a quarter of the scale for 2 bits, which takes 3.

    Args:
        model: a quantized or packed model.
        path: the folder, which must not exist yet or be empty.
        tokenizer: a tokenizer of transformers, which is saved along; or None.
        bits: the width for all layers, 2 to 8, instead of the smallest for each. Kernels for 4 and 8 bits are the most
            common ones.
        symmetric: whether zero points become part of the integers, which takes up to one bit more. transformers
            cannot load zero points that are stored apart.

    Returns:
        How each layer was stored.

    Raises:
        ValueError: if the model is not of transformers, has no quantized layer, or ``bits`` is out of range.
        UnfitError: if the format does not hold a layer exactly.
        MissingExtraError: if transformers is not installed.
        CheckpointError: if the folder holds something, or cannot be written.
    """
    if bits is not None and bits not in BITS:
        raise ValueError(f"bits is {bits!r}, must be None or {BITS[0]} to {BITS[-1]}")
    source = Source.of(model, "compressed-tensors", takes=lambda act: static_bits(act) is not None)
    tensors: dict[str, Tensor] = {}
    rows: list[ExportRow] = []
    groups: dict[Stored, list[str]] = {}
    uncast: list[str] = []
    for name, layer in source.layers.items():
        weight = source.integers(name)
        with naming(name, layer):
            stored = replace(
                Stored.of(weight, bits, symmetric),
                input_bits=static_bits(layer.act),
                output_bits=static_bits(layer.out_act),
            )
        parts = stored.tensors(weight)
        tensors |= {f"{name}.{ACTS[at]}_scale": static_scale(act).view(1) for at, act in learned_acts(layer).items()}
        tensors |= {f"{name}.{part}": value for part, value in parts.items()}
        groups.setdefault(stored, []).append(name)
        nbytes = sum(value.nbytes for part, value in parts.items() if part != "weight_shape")
        rows.append(ExportRow(name, str(stored), 8 * nbytes / max(weight.integers.numel(), 1)))
        if _dtype(weight.steps, (source.config.dtype, torch.float32)) != source.config.dtype:
            uncast.append(name)
    settings = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {
            f"group_{i}": {
                "targets": names,
                "weights": stored.arguments,
                "input_activations": _static_arguments(stored.input_bits),
                "output_activations": _static_arguments(stored.output_bits),
                "format": "pack-quantized",
            }
            for i, (stored, names) in enumerate(groups.items())
        },
        "ignore": source.linears,
    }
    nbytes = source.write(path, tensors, {"quantization_config": settings}, "pt", tokenizer)
    return ExportReport(path, rows, nbytes, [*source.notes, *_notes(source, groups, uncast)])


def _notes(source: Source, groups: dict[Stored, list[str]], uncast: list[str]) -> list[str]:
    notes = []
    if apart := sum(len(names) for stored, names in groups.items() if not stored.symmetric):
        notes.append(
            f"{apart} layers have zero points, with which transformers (5.24 and earlier) cannot load the folder; "
            "symmetric=True stores them within the integers"
        )
    if count := sum(len(names) for stored, names in groups.items() if stored.output_bits is not None):
        notes.append(
            f"{count} layers quantize their output, which transformers does; vLLM does not, and takes the output_scale "
            "of k_proj and v_proj for scales of its cache"
        )
    if any(".experts." in name for name in source.others):
        notes.append(
            "transformers (5.24 and earlier) takes the experts of a compressed-tensors model to be quantized; those of "
            "this one are not, so it cannot load the folder"
        )
    if uncast:
        dtype = dtype_name(source.config.dtype)
        notes.append(
            f"{len(uncast)} layers have scales that are no {dtype} numbers; the model is {dtype}, in which readers "
            f"hold them too, rounded: train with QuantConfig(scale_dtype=torch.{dtype})"
        )
    return notes


@dataclass(frozen=True)
class Stored:
    """How a layer is stored. Layers that are equal in this form one group in ``config.json``.

    Attributes:
        bits: width of the integers.
        group_size: inputs that share a scale, None where a row does.
        symmetric: whether there are no zero points.
        input_bits: width of inputs that are quantized with one scale; None for inputs in full precision.
        output_bits: the same for outputs.
    """

    bits: int
    group_size: int | None
    symmetric: bool
    input_bits: int | None = None
    output_bits: int | None = None

    @classmethod
    def of(cls, weight: IntegerWeight, bits: int | None, symmetric: bool) -> Stored:
        """Return the smallest form that holds a weight.

        Args:
            weight: the weight.
            bits: the width; the smallest that fits if None.
            symmetric: whether zero points are ruled out.

        Raises:
            UnfitError: if there is none.
        """
        group_size = None if weight.steps.shape[-1] == 1 else weight.group_size
        low, high = weight.ends
        choices = [bits] if bits is not None else list(BITS)
        plain = weight.signed_bits(choices)
        apart = next((b for b in choices if weight.levels <= 1 << b and _zeros_fit(weight, b)), None)
        if plain is not None and (symmetric or apart is None or plain <= apart):
            return cls(plain, group_size, True)
        if apart is not None and not symmetric:
            return cls(apart, group_size, False)
        what = f"{bits} bits hold" if bits is not None else "at most 8 bits hold"
        span = 1 << ((bits or BITS[-1]) - 1)
        fits = weight.signed_bits(BITS)
        hint = "use a grid with fewer levels, or lsq" if fits is None else f"give bits={fits}"
        raise UnfitError(f"its integers are {low} to {high}, {what} {-span} to {span - 1}; {hint}")

    @property
    def arguments(self) -> dict[str, Any]:
        """What ``config.json`` says of the weights."""
        strategy = "channel" if self.group_size is None else "group"
        return {
            "num_bits": self.bits, "type": "int", "symmetric": self.symmetric, "strategy": strategy,
            "group_size": self.group_size, "dynamic": False,
        }  # fmt: skip

    def __str__(self) -> str:
        """Describe it in a few words."""
        per = "rows" if self.group_size is None else f"groups of {self.group_size}"
        zeros = "" if self.symmetric else ", zero points"
        ends = {"inputs": self.input_bits, "outputs": self.output_bits}
        widths = "".join(f", int{bits} {what}" for what, bits in ends.items() if bits is not None)
        return f"int{self.bits}, {per}{zeros}{widths}"

    def tensors(self, weight: IntegerWeight) -> dict[str, Tensor]:
        """Return the tensors of a layer by the last part of their names."""
        half = 1 << self.bits - 1
        parts = {
            "weight_scale": weight.steps.to(_dtype(weight.steps, _SCALES)),
            "weight_shape": torch.tensor(weight.integers.shape, dtype=torch.int64),
        }
        if self.symmetric:
            return parts | {"weight_packed": words(weight.integers + half, self.bits)}
        grouped = weight.integers.reshape(*weight.low.shape, -1) - weight.low[..., None]
        zeros = words(-weight.low.T, self.bits).T.contiguous()
        return parts | {
            "weight_packed": words(grouped.reshape(weight.integers.shape), self.bits),
            "weight_zero_point": zeros,
        }


def _static_arguments(bits: int | None) -> dict[str, Any] | None:
    """Return what ``config.json`` says of activations of some width with one scale; None for full precision."""
    if bits is None:
        return None
    return {"num_bits": bits, "type": "int", "symmetric": True, "strategy": "tensor", "dynamic": False}


def _zeros_fit(weight: IntegerWeight, bits: int) -> bool:
    """Whether ``-low`` is an unsigned integer of some bits, as a zero point must be."""
    zeros = -weight.low
    return weight.spacing == 1 and not bool(((zeros < 0) | (zeros >= 1 << bits)).any())


def _dtype(steps: Tensor, dtypes: tuple[torch.dtype, ...]) -> torch.dtype:
    """Return the first dtype that holds all steps."""
    return next(dtype for dtype in dtypes if torch.equal(steps.to(dtype).float(), steps))
