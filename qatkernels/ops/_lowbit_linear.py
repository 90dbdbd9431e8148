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
    with without_autocast():  # sums are float32, also where autocast would have matmul round to 16 bits
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


#: Scales, zero points and grid of a packed weight of K columns.
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
    def keep(cls, ctx: Any, call: Any, output: Tensor) -> None:
        """Keep of x and bias what shapes and dtypes need, not their values."""
        ctx.cols, ctx.shape, ctx.dtype = call.x.shape[-1], output.shape, output.dtype
        ctx.bias_dtype = None if call.bias is None else call.bias.dtype

    @classmethod
    def gradients(cls, ctx: Any, kept: Any, *gs: Any) -> dict[str, Tensor | None]:
        """The product with the weight itself, and the sum over tokens."""
        g, found = gs[0], {}
        if cls.needs(ctx, "x"):
            found["x"] = LowbitLinearTransposed.of(kept, g=g, cols=ctx.cols)
        if cls.needs(ctx, "bias"):
            leading = tuple(range(g.ndim - 1))  # none of them would mean all to sum()
            found["bias"] = g.sum(leading, dtype=ctx.bias_dtype) if leading else g.to(ctx.bias_dtype)
        return found

    @classmethod
    def tangent(cls, ctx: Any, kept: Any, tangents: Any) -> Any:
        """The unquantized product of the tangent."""
        bias = None if tangents.bias is None else tangents.bias.to(ctx.dtype)
        if tangents.x is None:
            return None if bias is None else bias.expand(ctx.shape)
        y = LowbitLinear.of(kept, x=tangents.x, bias=None, act_bits=None)
        return y if bias is None else y + bias


class LowbitLinearTransposed(OpFunction):
    """x = g W; differentiable in g."""

    op = TRANSPOSED
    saves = ("packed", "scale", "zero_point", "offsets")

    @classmethod
    def gradients(cls, ctx: Any, kept: Any, *gs: Any) -> dict[str, Tensor | None]:
        """The product with the transpose."""
        return {"g": LowbitLinear.of(kept, x=gs[0], bias=None, act_bits=None)}

    @classmethod
    def tangent(cls, ctx: Any, kept: Any, tangents: Any) -> Any:
        """The product of the tangent."""
        return None if tangents.g is None else LowbitLinearTransposed.of(kept, g=tangents.g)
