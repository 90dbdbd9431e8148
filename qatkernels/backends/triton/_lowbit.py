"""What the kernels of both products with a packed weight are made of, besides codes: experts, scales, sums."""

from __future__ import annotations

import triton
import triton.language as tl

from ._element import MIN_SCALE, by_steps, from_element, to_element


@triton.jit
def segments(offsets_ptr, rows, experts, GROUPED: tl.constexpr, EXPERTS: tl.constexpr, BLOCK_M: tl.constexpr):
    """First row, last row and tiles of each expert, of ``[EXPERTS]``; what follows the last one is nobody's."""
    expert = tl.arange(0, EXPERTS)
    start, end = expert * 0, expert * 0 + rows
    if GROUPED:
        end = tl.load(offsets_ptr + expert, expert < experts, other=rows)
        start = tl.load(offsets_ptr + expert - 1, (expert > 0) & (expert <= experts), other=0)
        start = tl.where(expert > experts, rows, start)
        start, end = tl.maximum(start, 0), tl.minimum(end, rows)  # bad offsets must not leave the tensors
    tiles = (tl.maximum(end - start, 0) + BLOCK_M - 1) // BLOCK_M
    return start, end, tiles


@triton.jit
def locate(tile, start, end, tiles, EXPERTS: tl.constexpr, BLOCK_M: tl.constexpr):
    """The expert of a tile of rows, the first row of the tile and the last of the expert."""
    index = tl.arange(0, EXPERTS)
    until = tl.cumsum(tiles, 0)
    expert = tl.sum((until <= tile).to(tl.int32), 0)
    mine = index == expert
    first = tl.sum(tl.where(mine, start + (tile - until + tiles) * BLOCK_M, 0), 0)
    return expert, first, tl.sum(tl.where(mine, end, 0), 0)


@triton.jit
def load_scales(scale_ptr, zero_ptr, index, mask, ZERO: tl.constexpr):
    """Scales and zero points as they are stored, early enough for others to work while they are on their way."""
    scale = tl.load(scale_ptr + index, mask, other=1.0)
    return scale, tl.load(zero_ptr + index, mask, other=0.0) if ZERO else scale


@triton.jit
def steps_of(scale, zero, STEPS: tl.constexpr, SHIFT: tl.constexpr, ZERO: tl.constexpr):
    """What multiplies a stored code, and what is added to it before."""
    scale = from_element(scale, tl.float32)
    scale = tl.where(scale < MIN_SCALE, tl.full(scale.shape, MIN_SCALE, tl.float32), scale)
    shift = tl.full(scale.shape, SHIFT, tl.float32)
    if ZERO:
        shift -= zero
    return by_steps(scale, STEPS), shift


@triton.jit
def scaled(sums, total, step, shift, ADD: tl.constexpr, SUMS: tl.constexpr):
    """Sums of codes ``[M, N]`` as sums of values, with the sums of x ``[M]``, steps and shifts ``[N]``."""
    if SUMS:
        if ADD != 0:
            sums -= (total * ADD)[:, None]
        return (sums.to(tl.float32) + total.to(tl.float32)[:, None] * shift[None, :]) * step[None, :]
    return sums.to(tl.float32) * step[None, :]


@triton.jit
def upper(x):
    """A float32 without the bits that bfloat16 has no place for; what is left of it is exact."""
    return (x.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)


@triton.jit
def multiply(x, w, acc, PARTS: tl.constexpr, DOT: tl.constexpr, SUM: tl.constexpr):
    """Return acc + x @ w of numbers x and operands w.

    Float32 numbers are the sum of three parts that bfloat16 holds, and within 2^-16 of the sum of two. They are added
    from the smallest on.
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
