"""Parts that both kernels of products with a packed weight share: experts, scales, sums (`_codes.py` has codes)."""

from __future__ import annotations

import triton
import triton.language as tl

from ._element import MIN_SCALE, by_steps, constant, from_element, select_low, to_element


@triton.jit
def segments(offsets_ptr, rows, experts, GROUPED: tl.constexpr, EXPERTS: tl.constexpr, BLOCK_M: tl.constexpr):
    """First row, end row and number of tiles of each expert, ``[EXPERTS]``.

    The entry after the last expert stands for the unassigned rows, those at or beyond offsets[-1].
    """
    expert = tl.arange(0, EXPERTS)
    start, end = expert * 0, expert * 0 + rows
    if GROUPED:
        end = tl.load(offsets_ptr + expert, expert < experts, other=rows)
        start = tl.load(offsets_ptr + expert - 1, (expert > 0) & (expert <= experts), other=0)
        start = tl.where(expert > experts, rows, start)
        start, end = (
            tl.maximum(start, 0),
            tl.minimum(end, rows),
        )  # wrong offsets must not lead to accesses outside the tensors
    tiles = (tl.maximum(end - start, 0) + BLOCK_M - 1) // BLOCK_M
    return start, end, tiles


@triton.jit
def locate(tile, start, end, tiles, EXPERTS: tl.constexpr, BLOCK_M: tl.constexpr):
    """The expert of a tile of rows, the first row of the tile, and the end row of the expert."""
    index = tl.arange(0, EXPERTS)
    until = tl.cumsum(tiles, 0)
    expert = tl.sum((until <= tile).to(tl.int32), 0)
    mine = index == expert
    first = tl.sum(tl.where(mine, start + (tile - until + tiles) * BLOCK_M, 0), 0)
    return expert, first, tl.sum(tl.where(mine, end, 0), 0)


@triton.jit
def load_scales(scale_ptr, zero_ptr, index, mask, ZERO: tl.constexpr):
    """Load scales and zero points without converting them, so that other work can hide the load latency."""
    scale = tl.load(scale_ptr + index, mask, other=1.0)
    return scale, tl.load(zero_ptr + index, mask, other=0.0) if ZERO else scale


@triton.jit
def steps_of(scale, zero, STEPS: tl.constexpr, SHIFT: tl.constexpr, ZERO: tl.constexpr):
    """Return (step, shift): the value of a stored code is (code + shift) * step."""
    scale = from_element(scale, tl.float32)
    scale = select_low(scale, constant(MIN_SCALE, scale))
    shift = tl.full(scale.shape, SHIFT, tl.float32)
    if ZERO:
        shift -= zero
    return by_steps(scale, STEPS), shift


@triton.jit
def scaled(sums, total, step, shift, ADD: tl.constexpr, SUMS: tl.constexpr):
    """Turn sums over codes ``[M, N]`` into sums over values, with sums of x ``[M]``, steps and shifts ``[N]``."""
    if SUMS:
        if ADD != 0:
            sums -= (total * ADD)[:, None]
        return (sums.to(tl.float32) + total.to(tl.float32)[:, None] * shift[None, :]) * step[None, :]
    return sums.to(tl.float32) * step[None, :]


@triton.jit
def upper(x):
    """Truncate a float32 to the bits that bfloat16 has. The difference to x is exact."""
    return (x.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)


@triton.jit
def multiply(x, w, acc, PARTS: tl.constexpr, DOT: tl.constexpr, SUM: tl.constexpr):
    """Return acc + x @ w.

    A float32 x is split into PARTS bfloat16 numbers, each of which is multiplied with w: the sum of three is exactly x,
    the sum of two is within 2^-16 of x. The product of the smallest part is added first.
    """
    if PARTS == 1:
        return tl.dot(x, w, acc, input_precision="ieee", out_dtype=SUM)
    else:
        first = upper(x)
        rest = x - first
        if PARTS == 3:
            second = upper(rest)
            acc = tl.dot((rest - second).to(DOT), w, acc, input_precision="ieee")
            rest = second
        acc = tl.dot(to_element(rest, tl.bfloat16).to(DOT), w, acc, input_precision="ieee")
        return tl.dot(first.to(DOT), w, acc, input_precision="ieee")
