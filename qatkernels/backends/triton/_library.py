"""Products of many tokens with a packed weight: kernels write operands in 8 or 16 bits, the library multiplies them.

With many tokens the library's product is faster than ours, by more than it costs to write the operands out. They are
written a slice at a time, so that the memory for them is bounded. A weight is still never rounded to 16 bits. There are
two kinds of operands:

* *Codes*, where one scale belongs to a row of the weight and the sums are over its columns. They are exact in 8 or 16
  bits, and scales multiply the float32 (int32) sums.
* *Parts*, for groups and for the transposed product. A dequantized float32 weight is the sum of two bfloat16 numbers,
  within 2^-17. Each is multiplied in float32, and the two sums are added. Activations are bfloat16, or integers of
  tokens, which are exact in bfloat16. Those in float16 are not exact in bfloat16, and float16 has too small a range
  for the second part, so they stay with the kernels of `lowbit_linear.py`.

A slice is one of rows of the weight, or of columns in the transposed product. Each slice is thus some columns of the
output, and no product needs to add to the sums of another one.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..._torch_compat import integer_product
from ._codes import group_of, load_operands
from ._element import from_element, to_element
from ._lowbit import load_scales, scaled, steps_of
from ._products import MIN_TERMS, SMALLEST, common_block
from ._weight import BY_ELEMENT, BY_ROW, BY_TILE, ENOUGH_TERMS, Weight, operand_type, whole_codes

#: From so many tokens on the library multiplies codes. On an H100 it is equally fast there for a weight of
#: 8192 x 28672, and faster by a sixth for one of 4096 x 4096. For integers of tokens it is twice as many.
CODES_TOKENS = 512
#: From so many tokens on the library multiplies parts. Writing them takes as long as two copies of a 16-bit weight and
#: does not depend on the tokens. With fewer tokens our kernel ends sooner than that.
PARTS_TOKENS = 256
#: The same for groups that tiles of our kernel divide. On an H100 it takes 1.4 us a token for a weight of 8192 x 28672,
#: the library 1.2 us, after 300 us.
GROUPS_TOKENS = 2048
#: Most bytes of operands that are written out at a time. This bounds the memory.
SLICE_BYTES = 256 * 2**20
#: A slice has at least so many results, so that the library has a tile for each multiprocessor, and so many bytes, so
#: that kernels are not too short. Slices are no longer than that because then they stay in the L2 cache: it is 7%
#: faster on an H100.
SLICE_RESULTS, LEAST_SLICE_BYTES = 2**22, 32 * 2**20
#: A slice is a multiple of this many rows or columns, that is of the tiles of our kernels and the library's.
SLICE_UNIT = 256
TILE = 4096  # elements of a tile of operands: with four warps, 32 for each thread
TILE_COLUMNS = 256  # of these at most so many along a row; must divide SLICE_UNIT

_BY_ROW, _BY_TILE = tl.constexpr(BY_ROW), tl.constexpr(BY_TILE)
_SLICE_UNIT = tl.constexpr(SLICE_UNIT)


# Where a slice starts, and how many tiles of it lie along a row, are not specialized: that would be more variants.
@triton.jit(do_not_specialize=["rows", "first", "chunks"])
def operands_kernel(
    packed_ptr, scale_ptr, zero_ptr, operands_ptr, rest_ptr, rows, cols, row_bytes, groups, stride, first, chunks,
    BITS: tl.constexpr, WORDS: tl.constexpr, UNITS: tl.constexpr, STEPS: tl.constexpr, SHIFT: tl.constexpr,
    ZERO: tl.constexpr, GROUP: tl.constexpr, DOT: tl.constexpr, FACTOR: tl.constexpr, ADD: tl.constexpr,
    SCALES: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Write operands of packed rows, from column ``first * C`` on: ``FACTOR * code + ADD``, or weights in two parts."""
    program = tl.program_id(0)
    row = (program // chunks).to(tl.int64) * R + tl.arange(0, R)
    chunk = program % chunks
    at = first + chunk
    column = tl.arange(0, C)
    k = at * C + column
    w = tl.trans(
        load_operands(
            packed_ptr, row, row < rows, at * (C * BITS // 8), row_bytes, BITS, WORDS, UNITS, R, C, DOT, FACTOR, ADD
        )
    )  # fmt: skip
    mask = (row < rows)[:, None] & (k < cols)[None, :]
    place = row[:, None] * stride + (chunk * C + column)[None, :]
    if SCALES != _BY_ROW:
        if SCALES == _BY_TILE:
            scale, zero = load_scales(scale_ptr, zero_ptr, row * groups + at * C // GROUP, row < rows, ZERO)
            step, shift = steps_of(scale, zero, STEPS, SHIFT, ZERO)
            w = (w + shift[:, None]) * step[:, None]
        else:
            scale, zero = load_scales(scale_ptr, zero_ptr, row[:, None] * groups + (k // GROUP)[None, :], mask, ZERO)
            step, shift = steps_of(scale, zero, STEPS, SHIFT, ZERO)
            w = (w + shift) * step
        rest = w - from_element(to_element(w, tl.bfloat16), tl.float32)
        tl.store(rest_ptr + place, to_element(rest, tl.bfloat16), mask)
    w = to_element(w, tl.bfloat16) if operands_ptr.dtype.element_ty == tl.bfloat16 else w
    tl.store(operands_ptr + place, w, mask)


@triton.jit(do_not_specialize=["rows", "first", "chunks"])
def finish_kernel(
    sums_ptr, rest_ptr, total_ptr, scale_ptr, zero_ptr, bias_ptr, token_scale_ptr, y_ptr,
    rows, cols, first, outputs, chunks,
    STEPS: tl.constexpr, SHIFT: tl.constexpr, ZERO: tl.constexpr, ADD: tl.constexpr, SUMS: tl.constexpr,
    PARTS: tl.constexpr, BIAS: tl.constexpr, ACT: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Write ``cols`` columns of y, from slice unit ``first`` on: sums over codes, or two sums over parts of weights."""
    program = tl.program_id(0)
    row = (program // chunks).to(tl.int64) * R + tl.arange(0, R)
    column = (program % chunks) * C + tl.arange(0, C)
    exists, valid = row < rows, column < cols
    mask = exists[:, None] & valid[None, :]
    n = first * _SLICE_UNIT + column
    y = tl.load(sums_ptr + row[:, None] * cols + column[None, :], mask, other=0)
    if PARTS == 2:
        y += tl.load(rest_ptr + row[:, None] * cols + column[None, :], mask, other=0)
    else:
        total = tl.load(total_ptr + row, exists, other=0) if SUMS else row
        scale, zero = load_scales(scale_ptr, zero_ptr, n, valid, ZERO)
        step, shift = steps_of(scale, zero, STEPS, SHIFT, ZERO)
        y = scaled(y, total, step, shift, ADD, SUMS)
    if ACT:
        y *= tl.load(token_scale_ptr + row, exists, other=0.0)[:, None]
    if BIAS:
        y += from_element(tl.load(bias_ptr + n, valid, other=0.0), tl.float32)[None, :]
    tl.store(y_ptr + row[:, None] * outputs + n[None, :], to_element(y, y_ptr.dtype.element_ty), mask)


def library_serves(
    dtype: torch.dtype, w: Weight, tokens: int, terms: int, *, codes: bool, transposed: bool = False
) -> bool:
    """Return whether the library multiplies.

    Args:
        dtype: dtype of the activations, int8 if they are integers of tokens.
        w: the weight.
        tokens: number of tokens.
        terms: terms of a sum.
        codes: whether operands are codes; else they are parts.
        transposed: whether the sums are over rows of the weight.
    """
    if w.offsets is not None or dtype == torch.float32:
        return False
    if codes:
        multiples = w.cols % 8 == 0 and w.outputs % 8 == 0  # the library's product of integers takes no other sizes
        return tokens >= 2 * CODES_TOKENS and multiples if dtype == torch.int8 else tokens >= CODES_TOKENS
    tiled = not transposed and common_block(TILE_COLUMNS, w.group_size, MIN_TERMS) is not None
    return tokens >= (GROUPS_TOKENS if tiled else PARTS_TOKENS) and terms >= ENOUGH_TERMS and dtype != torch.float16


def library_product(x: Tensor, w: Tensor) -> Tensor:
    """Return x W in int32 or float32, by the library of the device."""
    if x.dtype == torch.int8:
        return integer_product(x, w)
    if x.device.type == "cuda":
        return torch.mm(x, w, out_dtype=torch.float32)
    return x.float() @ w.float()  # the interpreter: a CPU has no product of 16-bit numbers with a float32 result


def slice_length(length: int, size: int, tokens: int, *, integers: bool = False) -> int:
    """Return how much of a length is in a slice: as little as keeps the library busy, and equal slices.

    Args:
        length: rows or columns to divide.
        size: bytes of the operands of one row or column.
        tokens: number of tokens.
        integers: whether operands are int8, whose products take half as long; then slices have twice the results.
    """
    most = max(SLICE_BYTES // size // SLICE_UNIT, 1) * SLICE_UNIT
    wanted = max(triton.cdiv(SLICE_RESULTS << integers, tokens), triton.cdiv(LEAST_SLICE_BYTES, size))
    most = min(most, triton.cdiv(wanted, SLICE_UNIT) * SLICE_UNIT)
    each = triton.cdiv(length, triton.cdiv(length, most))
    return min(length, triton.cdiv(each, SLICE_UNIT) * SLICE_UNIT)


def several_variants(width: int, terms: int, size: int, tokens: int, *, integers: bool = False) -> bool:
    """Return whether the last slice needs kernels of its own.

    Triton compiles a kernel once for lengths that are multiples of 16, and once for others. All slices but the last
    are such multiples.
    """
    return width % 16 != 0 and slice_length(width, terms * size, tokens, integers=integers) < width


def by_library(
    x: Tensor, w: Weight, y: Tensor, *, codes: bool, transposed: bool = False, bias: Tensor | None = None,
    token_scale: Tensor | None = None,
) -> None:  # fmt: skip
    """Write y = x Wᵀ (x W if transposed), times ``token_scale`` and plus ``bias``, with the library's products.

    Args:
        x: activations ``[tokens, terms]``.
        w: the weight.
        y: the output ``[tokens, outputs or columns of the weight]``.
        codes: whether operands are codes; else they are parts.
        transposed: whether the sums are over rows of the weight.
        bias: added to each row of y, or None.
        token_scale: what the integers of tokens are multiplied with, or None.
    """
    if not codes and x.dtype == torch.int8:
        x = x.to(torch.bfloat16)
    factor, add, sums = (1, 0.0, False)
    if codes:
        factor, add, sums = whole_codes(w.shift, w.bits, w.zero is not None, x.dtype == torch.int8)
    total = x.sum(-1, dtype=torch.int32 if x.dtype == torch.int8 else torch.float32) if sums else w.scale
    (tokens, terms), width, parts = x.shape, y.shape[1], 1 if codes else 2
    each = slice_length(width, parts * terms * x.element_size(), tokens, integers=x.dtype == torch.int8)
    operands = x.new_empty((parts, terms, each) if transposed else (parts, each, terms))
    for first in range(0, width, each):
        length = min(each, width - first)
        part = operands[:, :, :length] if transposed else operands[:, :length]
        _write(w, part, 0 if transposed else first, first if transposed else 0, codes, factor, add)
        found = [library_product(x, p if transposed else p.T) for p in part]
        chunks = triton.cdiv(length, TILE_COLUMNS)
        finish_kernel[(triton.cdiv(tokens, TILE // TILE_COLUMNS) * chunks,)](
            found[0], found[-1], total, *w.pointers[1:], w.scale if bias is None else bias,
            w.scale if token_scale is None else token_scale, y,
            tokens, length, first // SLICE_UNIT, width, chunks,
            STEPS=w.steps * factor, SHIFT=w.shift, ZERO=w.zero is not None, ADD=add, SUMS=sums, PARTS=parts,
            BIAS=bias is not None, ACT=token_scale is not None, R=TILE // TILE_COLUMNS, C=TILE_COLUMNS, num_warps=8,
        )  # fmt: skip


def _write(w: Weight, operands: Tensor, row: int, column: int, codes: bool, factor: int, add: float) -> None:
    """Write operands ``[parts, rows, columns]`` of the weight from a row and a column on."""
    _, rows, cols = operands.shape
    tile_cols, scales = TILE_COLUMNS, BY_ROW if codes else BY_TILE
    if not codes and w.groups > 1:
        block = common_block(TILE_COLUMNS, w.group_size, SMALLEST)
        tile_cols, scales = (TILE_COLUMNS, BY_ELEMENT) if block is None else (block, BY_TILE)
    words, units = group_of(w.bits)
    tile_rows, chunks = TILE // tile_cols, triton.cdiv(cols, tile_cols)
    packed, scale, zero = (t[row:] for t in w.pointers)
    operands_kernel[(triton.cdiv(rows, tile_rows) * chunks,)](
        packed, scale, zero, operands[0], operands[-1], rows, w.cols, w.row_bytes, w.groups, operands.stride(1),
        column // tile_cols, chunks,
        BITS=w.bits, WORDS=words if w.whole_words(tile_cols) else 0, UNITS=units, STEPS=w.steps, SHIFT=w.shift,
        ZERO=w.zero is not None, GROUP=w.group_size if w.groups > 1 else 1 << 30,
        DOT=operand_type(operands.dtype, BY_ROW, 1) if codes else tl.float32, FACTOR=factor, ADD=add, SCALES=scales,
        R=tile_rows, C=tile_cols, num_warps=4,
    )  # fmt: skip
