"""ONNX: whole models for ONNX Runtime, with its operator ``com.microsoft.MatMulNBits`` for quantized layers.

The operator multiplies with a weight of 2, 4 or 8 bits in blocks of consecutive elements of a row:

    B            uint8 [N, blocks, block * bits / 8]   q, from 0, as one string of bits for each block
    scales       [N, blocks]                           value = (q - zero point) * scale
    zero_points  absent: 2 ** (bits - 1); uint8 [N, ceil(blocks * bits / 8)]: packed like B; or float [N, blocks]

Grids without a zero (binary, seq) have a zero point such as 1.5, as a float, or doubled integers at a larger width.
``torch.onnx.export`` traces the rest of the model, in which each quantized layer is replaced for that time.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..dtypes import dtype_name
from ..extras import missing
from ..files import replacing
from ..grids import MIN_SCALE
from ..nn import LearnedActivation, packed_modules, quantized_modules
from ..nn.activation import DynamicActivation
from ..nn.packed_linear import Packed
from ..nn.quantized import Quantized
from ..nn.scaled_embedding import plain_embedding
from ._export import ExportReport, ExportRow
from ._folder import as_floats, naming, values_of
from .integers import IntegerWeight, UnfitError, check_calibrated, words

BITS = (2, 4, 8)
#: Blocks that the operator takes.
BLOCKS = (128, 64, 32, 16)
#: Bytes of a file of ONNX, whose container (protobuf) ends there.
_LIMIT = 2**31


def export(
    model: nn.Module,
    path: Path,
    *,
    inputs: tuple[Any, ...] | None = None,
    dynamic_shapes: Any = None,
    bits: int | None = None,
    accuracy_level: int = 0,
    qdq: bool = False,
) -> ExportReport:
    """Write a model as one ONNX file.

    Each quantized layer takes the smallest width that holds it, and layers that quantize their input or output do so in
    the file, by the operators of ONNX.

    Args:
        model: a quantized or packed model in float32.
        path: the file.
        inputs: example inputs. If None, the model is a causal language model of transformers; the file then takes
            ``input_ids`` of any batch and length and gives ``logits``, without a cache of earlier tokens.
        dynamic_shapes: which dimensions of ``inputs`` may change, as for ``torch.onnx.export``; none if None.
        bits: the width for all layers: 2, 4 or 8. For seq of 2 bits, 4 is larger and much faster on a CPU than 2, whose
            zero points are floats.
        accuracy_level: that of the operator: 4 lets ONNX Runtime round inputs to 8 bits, which is faster.
        qdq: write standard ONNX (opset 21) instead of ONNX Runtime's operator: each weight as 8-bit integers and a
            ``DequantizeLinear``, and inputs and outputs with a learned scale by ``QuantizeLinear`` and
            ``DequantizeLinear``. This is the form that compilers for accelerators read. ``bits`` and
            ``accuracy_level`` do not apply.

    Returns:
        How each layer was stored.

    Raises:
        ValueError: if the model has no quantized layer, is not in float32, or is no language model of transformers and
            ``inputs`` is None; or if an option has a value that is not allowed, or the file would reach 2 GiB.
        UnfitError: if the operator does not hold a layer exactly.
        MissingExtraError: if ``onnx`` or ``onnxscript`` is not installed.
        CheckpointError: if the file cannot be written.
    """
    if bits is not None and bits not in BITS:
        raise ValueError(f"bits is {bits!r}, must be None or one of {BITS}")
    if accuracy_level not in range(5):
        raise ValueError(f"accuracy_level is {accuracy_level!r}, must be 0 to 4")
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise missing("export to ONNX", "export", error) from error
    layers: dict[str, Quantized | Packed] = {**quantized_modules(model), **packed_modules(model)}
    if not layers:
        raise ValueError("the model has no quantized layer, quantize_model makes them")
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and parameter.dtype != torch.float32:
            raise ValueError(f"{name} is {parameter.dtype}, must be float32: export model.float()")
    if qdq and (bits is not None or accuracy_level):
        raise ValueError("qdq=True goes with neither bits nor accuracy_level, which are ONNX Runtime's operator's")
    replacements: dict[str, _NBits | _Qdq] = {}
    tables = {name: layer for name, layer in layers.items() if isinstance(layer, nn.Embedding)}
    for name, layer in layers.items():
        if name in tables:
            continue
        check_calibrated(name, layer)
        replacements[name] = _qdq_layer(name, layer) if qdq else _layer(name, layer, bits, accuracy_level)
    plain = {
        name: plain_embedding(layer, nn.Parameter(values_of(layer), requires_grad=False))
        for name, layer in tables.items()
    }
    program = _traced(model, {**replacements, **plain}, inputs, dynamic_shapes)
    if (nbytes := sum(t.nbytes for t in program.exported_program.state_dict.values())) >= _LIMIT:
        raise ValueError(f"the weights take {nbytes:,} bytes, a file of ONNX ends at 2 GiB")
    with replacing(path) as temporary:
        program.save(temporary, external_data=False)
    rows = [ExportRow(name, str(new.stored), new.bits_per_weight, new.error) for name, new in replacements.items()]
    notes = [as_floats(name) for name in tables]
    if count := sum(isinstance(new, _NBits) and new.stored.zeros == "float" for new in replacements.values()):
        notes.append(
            f"{count} layers have float zero points, with which ONNX Runtime rounds products and zero points apart: "
            "its values are off by up to 2 units in the last place, and slow on a CPU (bits=4 has none for 2 bits)"
        )
    return ExportReport(path, rows, path.stat().st_size, notes)


def _traced(
    model: nn.Module, replacements: Mapping[str, nn.Module], inputs: tuple[Any, ...] | None, dynamic_shapes: Any
) -> Any:
    """Return the program that torch.onnx makes of a model with replaced layers."""
    traced: nn.Module = replacements.get("", model)
    names: dict[str, Any] = {}
    if inputs is None:
        if not hasattr(getattr(model, "config", None), "vocab_size"):
            raise ValueError(f"inputs is None and the model is {type(model).__name__}, give a tuple of example inputs")
        device = next(model.parameters()).device
        traced, inputs = _Logits(model), (torch.zeros(2, 3, dtype=torch.int64, device=device),)
        dynamic_shapes = ({0: torch.export.Dim("batch"), 1: torch.export.Dim("sequence")},)
        names = {"input_names": ["input_ids"], "output_names": ["logits"]}
    with _replaced(model, replacements), _evaluating(model), torch.no_grad():
        return torch.onnx.export(
            traced.eval(), inputs, dynamo=True, dynamic_shapes=dynamic_shapes, verbose=False, opset_version=21, **names
        )


class _Logits(nn.Module):
    """A language model whose only output is the logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        """Return the logits ``[batch, sequence, vocabulary]``."""
        return self.model(input_ids=input_ids, use_cache=False).logits


@contextlib.contextmanager
def _replaced(model: nn.Module, replacements: Mapping[str, nn.Module]) -> Iterator[None]:
    """Replace layers of a model, under every name, within the context."""
    new = {model.get_submodule(name): replacement for name, replacement in replacements.items()}
    places = [
        (owner, child, module)
        for owner in model.modules()
        for child, module in owner._modules.items()
        if module is not None and module in new
    ]
    try:
        for owner, child, old in places:
            owner._modules[child] = new[old]
        yield
    finally:
        for owner, child, old in places:
            owner._modules[child] = old


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Set eval mode within the context."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _layer(name: str, layer: Quantized | Packed, bits: int | None, accuracy_level: int) -> _NBits:
    _check_matrix(name, layer)
    with naming(name, layer):
        weight = IntegerWeight.of(layer)
        return _NBits(weight, Stored.of(weight, bits), layer, accuracy_level)


def _qdq_layer(name: str, layer: Quantized | Packed) -> _Qdq:
    _check_matrix(name, layer)
    with naming(name, layer):
        return _Qdq(IntegerWeight.of(layer), layer)


def _check_matrix(name: str, layer: Quantized | Packed) -> None:
    """Raise UnfitError for a stack of experts."""
    if layer.weight.ndim != 2 if isinstance(layer, Quantized) else len(layer.weight.shape) != 2:
        raise UnfitError(f"{name} is a {type(layer).__name__}, a stack of experts, for which ONNX has no operator here")


@dataclass(frozen=True)
class Stored:
    """How a layer is stored.

    Attributes:
        bits: width of the integers.
        block: elements of a row that share a scale.
        zeros: ``"default"``, ``"int"`` or ``"float"``.
    """

    bits: int
    block: int
    zeros: str

    @classmethod
    def of(cls, weight: IntegerWeight, bits: int | None) -> Stored:
        """Return the smallest form that holds a weight, of one width if that is given.

        Raises:
            UnfitError: if there is none.
        """
        for width in (bits,) if bits is not None else BITS:
            if (zeros := _zeros(weight, width)) is not None:
                return cls(width, _block(weight, width), zeros)
        low, high = weight.ends
        raise UnfitError(
            f"its integers are {low} to {high}, {weight.levels} levels with a spacing of {weight.spacing}, which the "
            f"operator does not hold at {bits if bits is not None else '2, 4 or 8'} bits"
        )

    def __str__(self) -> str:
        """Describe it in a few words."""
        zeros = {"default": "", "int": ", zero points", "float": ", float zero points"}[self.zeros]
        return f"MatMulNBits, {self.bits} bits in blocks of {self.block}{zeros}"


def _block(weight: IntegerWeight, bits: int) -> int:
    """Return the size of blocks that takes the least room.

    The last block of a row may be incomplete, so a row that shares a scale is cut into blocks of any size.
    """
    cols, group = weight.integers.shape[-1], weight.group_size
    if group == cols:
        return min(BLOCKS, key=lambda size: -(-cols // size) * (size * bits + 32))
    sizes = [size for size in BLOCKS if group % size == 0]
    if not sizes:
        raise UnfitError(f"groups of {group} are not whole blocks of 16, 32, 64 or 128")
    return sizes[0]


def _zeros(weight: IntegerWeight, bits: int) -> str | None:
    """Return the kind of zero points with which a width holds a weight, None if there is none.

    Float zero points hold what has too many integers when doubled; ONNX Runtime has them for 2 and 4 bits.
    """
    half, low = 1 << bits - 1, weight.low
    if bool((low >= -half).all() and (low + weight.spacing * (weight.levels - 1) < half).all()):
        return "default"
    if weight.levels > 1 << bits:
        return None
    if weight.spacing == 1:
        return "int" if bool(((low <= 0) & (low > -(1 << bits))).all()) else None
    return "float" if bits < 8 else None


class _NBits(nn.Module):
    """A linear layer that is traced as one operator.

    Attributes:
        error: largest difference between a value that ONNX Runtime computes with and the trained one, over the largest
            trained one. Only float zero points make one: ``q * scale`` and ``zero point * scale`` are rounded apart.
    """

    b: Tensor
    scales: Tensor
    zeros: Tensor | None

    def __init__(self, weight: IntegerWeight, stored: Stored, layer: Quantized | Packed, accuracy_level: int) -> None:
        super().__init__()
        self.stored, self.accuracy_level = stored, accuracy_level
        self.rows, self.cols = weight.integers.shape
        blocks = -(-self.cols // stored.block)
        repeats = blocks // weight.steps.shape[-1]
        steps, low = (t.repeat_interleave(repeats, -1) for t in (weight.steps, weight.low))
        zeros: Tensor | None = None
        if stored.zeros == "default":
            q = weight.integers + (1 << stored.bits - 1)
        else:
            grouped = weight.integers.reshape(*weight.low.shape, -1)
            q = ((grouped - weight.low[..., None]) // weight.spacing).reshape(weight.integers.shape)
            zeros = -low.float() / weight.spacing
            steps = steps * weight.spacing
        self.error = 0.0
        if stored.zeros == "int":
            zeros = _bytes(-low, stored.bits)
        elif zeros is not None:
            values = (q.reshape(*weight.low.shape, -1) * steps[:, ::repeats, None]) - (zeros * steps)[
                :, ::repeats, None
            ]
            wanted = weight.dequantize()
            most = wanted.abs().max().clamp_min(MIN_SCALE)
            self.error = float((values.reshape(wanted.shape) - wanted).abs().max() / most)
        q = nn.functional.pad(q, (0, blocks * stored.block - self.cols))
        self.register_buffer("b", _bytes(q, stored.bits).reshape(self.rows, blocks, -1))
        self.register_buffer("scales", steps.contiguous())
        self.register_buffer("zeros", zeros)
        self.bias = layer.bias
        self.act, self.out_act = _input(layer, standard=False), _learned(layer.out_act, standard=False)

    @property
    def bits_per_weight(self) -> float:
        """Bits of the file for each weight, scales and zero points included."""
        return 8 * sum(t.nbytes for t in self.buffers(recurse=False)) / (self.rows * self.cols)

    def forward(self, x: Tensor) -> Tensor:
        """Return the output ``[..., N]``."""
        x = self.act(x)
        attributes: dict[str, Any] = {
            "K": self.cols, "N": self.rows, "bits": self.stored.bits, "block_size": self.stored.block,
            "accuracy_level": self.accuracy_level,
        }  # fmt: skip
        given = [x, self.b, self.scales] + ([] if self.zeros is None else [self.zeros])
        y: Tensor = torch.onnx.ops.symbolic(
            "com.microsoft::MatMulNBits", given, attributes, dtype=x.dtype, shape=(*x.shape[:-1], self.rows), version=1
        )
        bias: Any = self.bias
        result: Tensor = self.out_act(y if bias is None else y + bias)
        return result


class _Qdq(nn.Module):
    """A linear layer that is traced as a ``DequantizeLinear`` of its weight and a product."""

    q: Tensor
    scales: Tensor
    zeros: Tensor | None
    error = 0.0  # (q - zero) * scale is one exact difference and one product, as here

    def __init__(self, weight: IntegerWeight, layer: Quantized | Packed) -> None:
        super().__init__()
        low, high = weight.ends
        self.group = None if weight.steps.shape[-1] == 1 else weight.group_size
        zeros: Tensor | None = None
        if low >= -128 and high <= 127:
            q = weight.integers.to(torch.int8)
        elif weight.spacing == 1 and bool(((weight.low <= 0) & (weight.low > -256)).all()):
            grouped = weight.integers.reshape(*weight.low.shape, -1) - weight.low[..., None]
            q, zeros = grouped.reshape(weight.integers.shape).to(torch.uint8), (-weight.low).to(torch.uint8)
        else:
            raise UnfitError(f"its integers are {low} to {high}, DequantizeLinear takes -128 to 127, or 0 to 255")
        flat = self.group is None
        self.register_buffer("q", q.contiguous())
        self.register_buffer("scales", weight.steps.reshape(-1) if flat else weight.steps.contiguous())
        self.register_buffer("zeros", None if zeros is None else zeros.reshape(-1) if flat else zeros.contiguous())
        self.bias = layer.bias
        self.act, self.out_act = _input(layer, standard=True), _learned(layer.out_act, standard=True)

    @property
    def stored(self) -> str:
        """How the layer is stored, in a few words."""
        per = "rows" if self.group is None else f"groups of {self.group}"
        return f"DequantizeLinear of {dtype_name(self.q.dtype)}, {per}"

    @property
    def bits_per_weight(self) -> float:
        """Bits of the file for each weight, scales and zero points included."""
        return 8 * sum(t.nbytes for t in self.buffers(recurse=False)) / self.q.numel()

    def forward(self, x: Tensor) -> Tensor:
        """Return the output ``[..., N]``."""
        given = [self.q, self.scales] + ([] if self.zeros is None else [self.zeros])
        where: dict[str, Any] = {"axis": 0} if self.group is None else {"axis": 1, "block_size": self.group}
        w: Tensor = torch.onnx.ops.symbolic(
            "DequantizeLinear", given, where, dtype=torch.float32, shape=tuple(self.q.shape), version=21
        )
        bias: Any = self.bias
        # A product and a sum: ONNX Runtime would round the bias of one operator to multiples of both scales.
        y = nn.functional.linear(self.act(x), w)
        result: Tensor = self.out_act(y if bias is None else y + bias)
        return result


class _Static(nn.Module):
    """A learned scale for a tensor of activations, as ``QuantizeLinear`` and ``DequantizeLinear``."""

    scale: Tensor
    zero: Tensor

    def __init__(self, act: LearnedActivation) -> None:
        super().__init__()
        grid, scale = act.grid, act.scale.detach().reshape(()).clamp_min(MIN_SCALE)
        zero = 0.0 if act.zero_point is None else float(act.zero_point.detach())
        self.dtype = torch.int8 if grid.code_min < 0 else torch.uint8
        self.register_buffer("scale", scale)
        self.register_buffer("zero", torch.tensor(int(zero), dtype=self.dtype))
        # Fewer than 8 bits end before the integers do.
        ends = torch.iinfo(self.dtype)
        self.limits = None
        if (grid.code_min, grid.code_max) != (ends.min, ends.max):
            self.limits = float((grid.code_min - zero) * scale), float((grid.code_max - zero) * scale)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x`` fake-quantized."""
        x = x if self.limits is None else x.clamp(*self.limits)
        q = torch.onnx.ops.symbolic(
            "QuantizeLinear", [x, self.scale, self.zero], {}, dtype=self.dtype, shape=x.shape, version=21
        )
        y: Tensor = torch.onnx.ops.symbolic(
            "DequantizeLinear", [q, self.scale, self.zero], {}, dtype=torch.float32, shape=x.shape, version=21
        )
        return y


def _is_whole(act: LearnedActivation) -> bool:
    """Whether ``QuantizeLinear`` holds a quantizer of activations: whole codes, and a whole zero point among them."""
    grid, zero = act.grid, 0.0 if act.zero_point is None else float(act.zero_point.detach())
    return grid.steps == 1 and grid.offset == 0 and zero.is_integer() and grid.code_min <= zero <= grid.code_max


def _bytes(unsigned: Tensor, bits: int) -> Tensor:
    """Return each row as one string of bits, in whole bytes."""
    packed = words(unsigned, bits).view(torch.uint8)
    return packed[:, : -(-unsigned.shape[-1] * bits // 8)].contiguous()


def _input(layer: Quantized | Packed, *, standard: bool) -> nn.Module:
    """Return what quantizes the input of a layer, made of operators that ONNX has; see :func:`_learned`."""
    bits = layer.act.bits if isinstance(layer.act, DynamicActivation) else getattr(layer, "act_bits", None)
    return _learned(layer.act, standard=standard) if bits is None else _Dynamic(bits)


def _learned(act: object, *, standard: bool) -> nn.Module:
    """Return what quantizes as a learned quantizer of activations, made of operators that ONNX has.

    Args:
        act: the quantizer; for anything else the result does nothing.
        standard: use ``QuantizeLinear`` and ``DequantizeLinear`` if they hold it.
    """
    if not isinstance(act, LearnedActivation):
        return nn.Identity()
    act.check_scale()
    return _Static(act) if standard and _is_whole(act) else _Learned(act)


class _Dynamic(nn.Module):
    """Symmetric integers per token, as :func:`qatkernels.fake_quantize_dynamic`."""

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.most = 2.0 ** (bits - 1) - 1

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x`` fake-quantized."""
        scale = (x.abs().amax(-1, keepdim=True) / self.most).clamp_min(torch.finfo(torch.float32).tiny)
        return torch.round((x / scale).clamp(-self.most, self.most)) * scale


class _Learned(nn.Module):
    """One scale for a tensor, as :class:`LearnedActivation`; by the formula of `qatkernels.grids`."""

    scale: Tensor

    def __init__(self, act: LearnedActivation) -> None:
        super().__init__()
        grid = act.grid
        zero = 0.0 if act.zero_point is None else float(act.zero_point.detach())
        self.steps, self.offset = grid.steps, grid.offset - zero
        self.low, self.high = grid.clamp[0] - zero, grid.clamp[1] - zero
        self.register_buffer("scale", act.scale.detach().clamp_min(MIN_SCALE))

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x`` fake-quantized."""
        codes = torch.round((x / self.scale).clamp(self.low, self.high) * self.steps - self.offset)
        return (codes + self.offset) * (self.scale / self.steps)
