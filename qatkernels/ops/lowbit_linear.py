"""Matrix products with a packed weight: dense, and grouped by expert.

Two ops that are each other's transpose, so derivatives of any order and mode are the same two kernels:

    lowbit_linear             y = x W^T (+ bias)      x [..., K] -> y [..., N]
    lowbit_linear_transposed  x = g W                 g [..., N] -> x [..., K]

With ``offsets`` the weight is a stack ``[E, N, K]`` and the rows of x are sorted by expert: rows ``offsets[e - 1] ...
offsets[e] - 1`` (0 before the first) meet expert e, any of which may have none; rows at or past ``offsets[-1]`` belong
to nobody and give 0. Without, it is the case of one expert.

Sums are float32. With ``act_bits`` x is quantized to symmetric integers per row first, as `fake_quantize_dynamic` does;
then products and sums are integers, and scales enter at the end. Its derivative is that of the unquantized product, the
straight-through rule.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..arguments import check_optional_integers, check_optional_tensors, check_tensors, wrong_type
from ._op import Function, define, nothing_to_differentiate
from .fake_quantize import FLOATS
from .packing import SCALES, PackedWeight, check_bits, row_bytes


def unpacked(
    packed: Tensor, scale: Tensor, zero_point: Tensor | None, grid: list[float], code_min: int, bits: int, cols: int
) -> Tensor:
    """Return the weight ``[..., N, cols]`` in float32."""
    codes = torch.ops.qatkernels.unpack(packed, code_min, bits, cols)
    return torch.ops.qatkernels.dequantize(codes, scale.float(), zero_point, grid, torch.float32)


def segments(offsets: Tensor, rows: int) -> list[tuple[int, int]]:
    """Return the half-open range of rows of each expert.

    Raises:
        ValueError: if they descend or leave ``[0, rows]``.
    """
    ends = offsets.tolist()
    starts = [0, *ends][: len(ends)]
    if any(a > b for a, b in zip(starts, ends, strict=True)) or (ends and ends[-1] > rows):
        raise ValueError(f"offsets is {ends}, must ascend from 0 to at most the {rows} rows of x")
    return list(zip(starts, ends, strict=True))


def _by_expert(x: Tensor, w: Tensor, offsets: Tensor | None) -> Tensor:
    with torch._C._DisableAutocast():  # sums are float32, also where autocast would have matmul round to 16 bits
        if offsets is None:
            return x @ w.mT
        y = x.new_zeros(x.shape[0], w.shape[-2])
        for e, (start, end) in enumerate(segments(offsets, x.shape[0])):
            y[start:end] = x[start:end] @ w[e].mT
        return y


def _forward(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    bias: Tensor | None,
    offsets: Tensor | None,
    grid: list[float],
    code_min: int,
    bits: int,
    act_bits: int | None,
) -> Tensor:
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    values = x.to(wide)
    if act_bits is not None:
        values = torch.ops.qatkernels.fake_quantize_dynamic(values, act_bits)
    w = unpacked(packed, scale, zero_point, grid, code_min, bits, x.shape[-1]).to(wide)
    y = _by_expert(values, w, offsets)
    return (y if bias is None else y + bias.to(wide)).to(x.dtype)


def _transposed(
    g: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    offsets: Tensor | None,
    grid: list[float],
    code_min: int,
    bits: int,
    cols: int,
) -> Tensor:
    wide = torch.float64 if g.dtype == torch.float64 else torch.float32
    w = unpacked(packed, scale, zero_point, grid, code_min, bits, cols).to(wide)
    return _by_expert(g.to(wide), w.mT, offsets).to(g.dtype)


def _check(
    name: str, x: Tensor, features: int, packed: Tensor, scale: Tensor, zero_point: Tensor | None,
    offsets: Tensor | None, grid: list[float], code_min: int, bits: int, cols: int,
) -> None:  # fmt: skip
    """The contract of both ops, for real and fake tensors alike."""
    check_bits(code_min, bits)
    torch._check(x.dtype in FLOATS, lambda: f"{name} is {x.dtype}, must be one of {FLOATS}")
    torch._check(scale.dtype in SCALES, lambda: f"scale is {scale.dtype}, must be one of {SCALES}")
    dims = 2 if offsets is None else 3
    torch._check(
        packed.dtype == torch.uint8 and packed.ndim == dims and packed.shape[-1] == row_bytes(cols, bits),
        lambda: f"packed is {packed.dtype} of shape {tuple(packed.shape)}, must be torch.uint8 with {dims} dimensions, "
        f"the last {row_bytes(cols, bits)} for {cols} columns at {bits} bits",
    )
    torch._check(
        scale.ndim == dims and scale.shape[:-1] == packed.shape[:-1] and scale.shape[-1] >= 1
        and cols % scale.shape[-1] == 0,
        lambda: f"scale has shape {tuple(scale.shape)}, must be {tuple(packed.shape[:-1])} and a divisor of {cols}",
    )  # fmt: skip
    torch._check(
        zero_point is None or (zero_point.shape == scale.shape and zero_point.dtype == torch.float32),
        lambda: f"zero_point must be torch.float32 of shape {tuple(scale.shape)} like scale",
    )
    torch._check(
        x.ndim >= 1 and x.shape[-1] == features,
        lambda: f"{name} has shape {tuple(x.shape)}, its last dimension must be {features}",
    )
    if offsets is not None:
        torch._check(
            offsets.dtype == torch.int32 and offsets.ndim == 1 and offsets.shape[0] == packed.shape[0],
            lambda: f"offsets is {offsets.dtype} of shape {tuple(offsets.shape)}, "
            f"must be torch.int32 with one element for each of {packed.shape[0]} experts",
        )
        torch._check(x.ndim == 2, lambda: f"{name} has shape {tuple(x.shape)}, must have two dimensions with offsets")
    for label, t in (("packed", packed), ("scale", scale), ("zero_point", zero_point), ("offsets", offsets)):
        torch._check(
            t is None or t.device == x.device,
            lambda label=label, t=t: f"{label} is on {t.device}, must be on {x.device} like {name}",
        )
    torch._check(len(grid) == 10, lambda: f"grid has {len(grid)} constants, must be Grid.constants")


def _fake_forward(
    x: Tensor, packed: Tensor, scale: Tensor, zero_point: Any, bias: Tensor | None, offsets: Any,
    grid: list[float], code_min: int, bits: int, act_bits: int | None,
) -> Tensor:  # fmt: skip
    torch._check(x.ndim >= 1, lambda: "x has no dimension, must have at least one")
    cols = x.shape[-1]
    _check("x", x, cols, packed, scale, zero_point, offsets, grid, code_min, bits, cols)
    torch._check(act_bits is None or 2 <= act_bits <= 8, lambda: f"act_bits is {act_bits}, must be None or 2 to 8")
    rows = packed.shape[-2]
    torch._check(bias is None or offsets is None, lambda: "bias must be None with offsets")
    torch._check(
        bias is None or (bias.shape == (rows,) and bias.dtype in FLOATS and bias.device == x.device),
        lambda: f"bias is {bias.dtype} of shape {tuple(bias.shape)} on {bias.device}, "  # type: ignore[union-attr]
        f"must be floating point of shape {(rows,)} on {x.device}",
    )
    return x.new_empty((*x.shape[:-1], rows))


def _fake_transposed(
    g: Tensor, packed: Tensor, scale: Tensor, zero_point: Any, offsets: Any,
    grid: list[float], code_min: int, bits: int, cols: int,
) -> Tensor:  # fmt: skip
    _check("g", g, packed.shape[-2], packed, scale, zero_point, offsets, grid, code_min, bits, cols)
    return g.new_empty((*g.shape[:-1], cols))


FORWARD = define(
    "lowbit_linear",
    "Tensor x, Tensor packed, Tensor scale, Tensor? zero_point, Tensor? bias, Tensor? offsets, float[] grid, "
    "int code_min, int bits, int? act_bits",
    ("out",), reference=_forward, fake=_fake_forward,
)  # fmt: skip
TRANSPOSED = define(
    "lowbit_linear_transposed",
    "Tensor g, Tensor packed, Tensor scale, Tensor? zero_point, Tensor? offsets, float[] grid, int code_min, int bits, "
    "int cols",
    ("out",), reference=_transposed, fake=_fake_transposed,
)  # fmt: skip


class LowbitLinear(Function):
    """y = x W^T + bias; differentiable in x and bias."""

    @staticmethod
    def forward(*args: Any) -> Tensor:
        return Function.run(torch.ops.qatkernels.lowbit_linear.default, *args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, packed, scale, zero_point, bias, offsets, *ctx.settings, _ = inputs
        ctx.cols, ctx.shape, ctx.dtype = x.shape[-1], output.shape, output.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.save_for_backward(packed, scale, zero_point, offsets)
        ctx.save_for_forward(packed, scale, zero_point, offsets)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        dx = db = None
        if ctx.needs_input_grad[0]:
            dx = LowbitLinearTransposed.apply(g, *ctx.saved_tensors, *ctx.settings, ctx.cols)
        if ctx.needs_input_grad[4]:
            leading = tuple(range(g.ndim - 1))  # none of them would mean all to sum()
            db = g.sum(leading, dtype=ctx.bias_dtype) if leading else g.to(ctx.bias_dtype)
        return dx, None, None, None, db, *[None] * 5

    @staticmethod
    def jvp(ctx: Any, tangent: Any, *rest: Any) -> Any:
        packed, scale, zero_point, offsets = ctx.saved_tensors
        bias = None if rest[3] is None else rest[3].to(ctx.dtype)
        if tangent is None:
            return None if bias is None else bias.expand(ctx.shape)
        y = LowbitLinear.apply(tangent, packed, scale, zero_point, None, offsets, *ctx.settings, None)
        return y if bias is None else y + bias


class LowbitLinearTransposed(Function):
    """x = g W; differentiable in g."""

    @staticmethod
    def forward(*args: Any) -> Tensor:
        return Function.run(torch.ops.qatkernels.lowbit_linear_transposed.default, *args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, packed, scale, zero_point, offsets, *ctx.settings, ctx.cols = inputs
        ctx.save_for_backward(packed, scale, zero_point, offsets)
        ctx.save_for_forward(packed, scale, zero_point, offsets)

    @staticmethod
    def backward(ctx: Any, t: Tensor) -> Any:
        packed, scale, zero_point, offsets = ctx.saved_tensors
        dg = LowbitLinear.apply(t, packed, scale, zero_point, None, offsets, *ctx.settings, None)
        return dg, *[None] * 8

    @staticmethod
    def jvp(ctx: Any, tangent: Any, *_: Any) -> Any:
        if tangent is None:
            return None
        return LowbitLinearTransposed.apply(tangent, *ctx.saved_tensors, *ctx.settings, ctx.cols)


for _op, _function in ((FORWARD, LowbitLinear), (TRANSPOSED, LowbitLinearTransposed)):
    torch.library.register_autograd(
        f"qatkernels::{_op.name}",
        _function.backward,
        setup_context=lambda ctx, inputs, output, f=_function: f.setup_context(ctx, inputs, output),
    )


def product(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    bias: Tensor | None,
    offsets: Tensor | None,
    grid: list[float],
    code_min: int,
    bits: int,
    act_bits: int | None,
    cols: int,
) -> Tensor:
    """Both products, differentiable, from the parts of a packed weight: what a module calls with its buffers.

    The op takes the width of x for that of the weight; rows of bytes alone cannot tell K from less within a byte.
    """
    if x.ndim and x.shape[-1] != cols:
        raise RuntimeError(f"x has shape {tuple(x.shape)}, its last dimension must be {cols} like the weight's")
    args = (x, packed, scale, zero_point, bias, offsets, grid, code_min, bits, act_bits)
    op = torch.ops.qatkernels.lowbit_linear.default
    if torch.compiler.is_compiling():
        return op(*args)
    return Function.run(op, *args) if nothing_to_differentiate(x, bias) else LowbitLinear.apply(*args)


def _call(x: Tensor, w: PackedWeight, bias: Tensor | None, offsets: Tensor | None, act_bits: int | None) -> Tensor:
    check_tensors(x=x)
    check_optional_tensors(bias=bias)
    check_optional_integers(act_bits=act_bits)
    if not isinstance(w, PackedWeight):
        raise wrong_type("weight", w, "a PackedWeight, which PackedWeight.from_float makes")
    grid = (w.constants, w.grid.code_min, w.bits)
    return product(x, w.packed, w.scale, w.zero_point, bias, offsets, *grid, act_bits, w.cols)


def lowbit_linear(
    x: Tensor, weight: PackedWeight, bias: Tensor | None = None, *, act_bits: int | None = None
) -> Tensor:
    """Return ``x @ weight.T + bias`` from a packed weight.

    Args:
        x: activations ``[..., K]``, float32, bfloat16, float16 or float64.
        weight: packed weight of shape ``[N, K]``.
        bias: ``[N]``, floating point, or None.
        act_bits: None multiplies x as it is. 2 to 8 quantize each token of it to symmetric integers first, scale
            ``max(abs(x)) / (2**(act_bits - 1) - 1)``, and sum integers.

    Returns:
        ``[..., N]`` in the dtype of x, summed in float32. Differentiable in x and bias, any order, both modes.

    Raises:
        TypeError: if ``weight`` is no PackedWeight, or another argument is of another type, naming it.
        RuntimeError: if a shape, dtype or device does not fit, naming the argument.
    """
    return _call(x, weight, bias, None, act_bits)


def grouped_lowbit_linear(x: Tensor, weight: PackedWeight, offsets: Tensor, *, act_bits: int | None = None) -> Tensor:
    """Return each token times the packed weight of its expert, for tokens that are sorted by expert, in one launch.

    Args:
        x: tokens ``[T, K]``, those of expert 0 first.
        weight: packed weights ``[E, N, K]``.
        offsets: int32 ``[E]`` on the device of x: where each expert's tokens end, ascending. As for
            ``torch._grouped_mm``, an expert may have no token. On a CPU offsets that descend or exceed T are an error;
            on a GPU, where looking would wait for it, the result is then undefined.
        act_bits: as for :func:`lowbit_linear`.

    Returns:
        ``[T, N]`` in the dtype of x; tokens past the last offset give 0. Differentiable in x.

    Raises:
        TypeError: if ``weight`` is no PackedWeight, or another argument is of another type, naming it.
        ValueError: if offsets descend or exceed T.
        RuntimeError: if a shape, dtype or device does not fit, naming the argument.
    """
    check_tensors(offsets=offsets)
    return _call(x, weight, None, offsets, act_bits)
