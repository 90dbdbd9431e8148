"""Matrix products with a packed weight, dense or grouped by expert.

Two ops are each other's transpose, so the same two kernels compute derivatives of any order, in both modes:

    lowbit_linear             y = x W^T (+ bias)      x [..., K] -> y [..., N]
    lowbit_linear_transposed  x = g W                 g [..., N] -> x [..., K]

With ``offsets`` the weight is a stack ``[E, N, K]``, and the rows of x are sorted by expert: rows ``offsets[e - 1]``
to ``offsets[e] - 1`` are multiplied with expert e (from row 0 for the first one). An expert may have no rows. Rows at
or beyond ``offsets[-1]`` are unassigned and give 0. Without ``offsets`` there is one matrix for all rows.

Sums are in float32. With ``act_bits`` each row of x is first quantized to symmetric integers, as in
`fake_quantize_dynamic`. Products and sums are then integers, and scales are applied at the end. The derivative is that
of the product without quantized activations (straight-through rule).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._torch_compat import without_autocast
from ._autograd import OpFunction
from ._op import define
from .packing import CODES


def unpacked(
    packed: Tensor, scale: Tensor, zero_point: Tensor | None, grid: list[float], code_min: int, bits: int, cols: int
) -> Tensor:
    """Return the weight ``[..., N, cols]`` in float32."""
    codes = torch.ops.qatkernels.unpack(packed, code_min, bits, cols)
    return torch.ops.qatkernels.dequantize(codes, scale.float(), zero_point, grid, torch.float32)


def segments(offsets: Tensor, rows: int) -> list[tuple[int, int]]:
    """Return the range of rows of each expert, as (start, end).

    Raises:
        ValueError: if offsets descend, or are not within ``[0, rows]``.
    """
    ends = offsets.tolist()
    starts = [0, *ends][: len(ends)]
    if any(a > b for a, b in zip(starts, ends, strict=True)) or (ends and ends[-1] > rows):
        raise ValueError(f"offsets is {ends}, must ascend from 0 to at most the {rows} rows of x")
    return list(zip(starts, ends, strict=True))


def _by_expert(x: Tensor, w: Tensor, offsets: Tensor | None) -> Tensor:
    """Return ``x @ w.mT``, for each expert its rows; unassigned rows are 0."""
    with without_autocast():  # autocast would round the operands to 16 bits
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


#: The contract of scales, zero points and grid of a packed weight with K columns.
_WEIGHT = """
    scale: float32|bfloat16|float16 [E if offsets, N, G]
    require G > 0 and K % G == 0; scale has {G} columns, must divide the {K} columns of the weight
    zero_point: float32 [E if offsets, N, G]
    offsets: int32 [E]
    require len(grid) == 10; grid has {len(grid)} constants, must be Grid.constants
"""
FORWARD = define(
    "lowbit_linear",
    "Tensor x, Tensor packed, Tensor scale, Tensor? zero_point, Tensor? bias, Tensor? offsets, float[] grid, "
    "int code_min, int bits, int? act_bits",
    f"""
    {CODES}
    require act_bits is None or 2 <= act_bits <= 8; act_bits is {{act_bits}}, must be None or 2 to 8
    require bias is None or offsets is None; bias is given, must be None with offsets
    x: float [*T, K]
    require offsets is None or len(T) == 1; x has {{len(T) + 1}} dimensions, must have 2 with offsets
    packed: uint8 [E if offsets, N, row_bytes(K, bits)]
    {_WEIGHT}
    bias: float [N]
    -> out: like(x) [*T, N]
    """,
    reference=_forward,
)  # fmt: skip
TRANSPOSED = define(
    "lowbit_linear_transposed",
    "Tensor g, Tensor packed, Tensor scale, Tensor? zero_point, Tensor? offsets, float[] grid, int code_min, int bits, "
    "int cols",
    f"""
    {CODES}
    require cols >= 0; cols is {{cols}}, must be at least 0
    let K = cols
    packed: uint8 [E if offsets, N, row_bytes(K, bits)]
    g: float [*T, N]
    require offsets is None or len(T) == 1; g has {{len(T) + 1}} dimensions, must have 2 with offsets
    {_WEIGHT}
    -> out: like(g) [*T, K]
    """,
    reference=_transposed,
)  # fmt: skip


class LowbitLinear(OpFunction):
    """y = x W^T + bias; differentiable in x and bias."""

    op = FORWARD
    saves = ("packed", "scale", "zero_point", "offsets")

    @classmethod
    def save_more(cls, ctx: Any, call: Any, output: Tensor) -> None:
        """Keep shapes and dtypes of x and bias; their values are not needed."""
        ctx.cols, ctx.shape, ctx.dtype = call.x.shape[-1], output.shape, output.dtype
        ctx.bias_dtype = None if call.bias is None else call.bias.dtype

    @classmethod
    def gradients(cls, ctx: Any, saved: Any, *gs: Any) -> dict[str, Tensor | None]:
        """Return the transposed product for x, and the sum over tokens for the bias."""
        g, grads = gs[0], {}
        if cls.needs(ctx, "x"):
            grads["x"] = LowbitLinearTransposed.of(saved, g=g, cols=ctx.cols)
        if cls.needs(ctx, "bias"):
            leading = tuple(range(g.ndim - 1))  # an empty tuple would make sum() reduce all dimensions
            grads["bias"] = g.sum(leading, dtype=ctx.bias_dtype) if leading else g.to(ctx.bias_dtype)
        return grads

    @classmethod
    def tangent(cls, ctx: Any, saved: Any, tangents: Any) -> Any:
        """Return the product of the tangent, without quantized activations."""
        bias = None if tangents.bias is None else tangents.bias.to(ctx.dtype)
        if tangents.x is None:
            return None if bias is None else bias.expand(ctx.shape)
        y = LowbitLinear.of(saved, x=tangents.x, bias=None, act_bits=None)
        return y if bias is None else y + bias


class LowbitLinearTransposed(OpFunction):
    """x = g W; differentiable in g."""

    op = TRANSPOSED
    saves = ("packed", "scale", "zero_point", "offsets")

    @classmethod
    def gradients(cls, ctx: Any, saved: Any, *gs: Any) -> dict[str, Tensor | None]:
        """Return the product of the transposed op."""
        return {"g": LowbitLinear.of(saved, x=gs[0], bias=None, act_bits=None)}

    @classmethod
    def tangent(cls, ctx: Any, saved: Any, tangents: Any) -> Any:
        """Return the product of the tangent of g."""
        return None if tangents.g is None else LowbitLinearTransposed.of(saved, g=tangents.g)
