"""Products with packed weights in Triton.

A program computes a tile of the output. Codes become operands of `tl.dot` in registers. A weight is never rounded to 16
bits: tensor cores multiply the codes, which are exact in 8 and 16 bits, and scales multiply the float32 sums.

    y[m, n] = scale[n] * (sum_k x[m, k] * code[n, k] + shift[n] * sum_k x[m, k])        for one group, or a part of it

``code`` is the stored, unsigned code; ``shift`` is code_min + offset - zero point. Without a zero point the shift is a
compile-time constant. It is then added to the codes if they stay exact, and the sums of x are not needed. (On a grid
without a zero the codes plus shift are half-integers. For int8 operands they are doubled, and the scale is halved.) If
no tile size divides the groups, weights are dequantized one by one and multiplied in float32, without tensor cores.

In the transposed product the scales vary along the sum, so they multiply g, in float32. A float32 operand (g times a
scale, or an activation) is split into three bfloat16 numbers, each of which tensor cores multiply with the codes. Two
are enough for long sums, whose own float32 error is much larger.

Experts are found on the device: a program reads all offsets, counts tiles, and processes every n-th tile. Unassigned
rows form the tiles of one additional expert. With few tokens several programs share a sum (split-K), and a second
kernel adds their parts in a fixed order: there are no atomics, and results are the same in every run. In float64 the
whole weight is dequantized and multiplied by the library, or with experts by the kernel of `grouped_linear.py`, which
also reads the offsets on the device.

The floor of T tokens is the longer of two times: 2 T N K operations at the rate of the operands (8 or 16 bits on tensor
cores; three times as many for float32 activations, two or three times for the transposed product), or the bytes of x,
y, and the codes and scales of the experts that have tokens, over the bandwidth. The kernels are compiled ahead of time
and tested in the interpreter. They were not run on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..._torch_compat import integer_product
from ...ops._lowbit_linear import FORWARD, TRANSPOSED, unpacked
from ...ops._op import as_tuple
from ...ops.packed_weight import PackedWeight
from ...ops.packing import row_bytes
from ._codes import by_words, group_of, load_operands
from ._element import (
    INTERPRETED,
    OPTIONS,
    divide_rows,
    from_element,
    round_half_even,
    select_high,
    select_low,
    to_element,
)
from ._launchers import launches
from ._lowbit import load_scales, locate, multiply, scaled, segments, steps_of
from ._products import (
    CONFIGS,
    MAX_INTEGERS,
    NARROW,
    SMALLEST,
    Config,
    by_elements,
    choose,
    common_block,
    distinct,
    fitted,
    least_terms,
)
from ._rows import tiling
from .dynamic import token_scale
from .grouped_linear import grouped_linear_out, grouped_linear_transposed_out

BY_ROW, BY_TILE, BY_ELEMENT = 0, 1, 2  # scales multiply whole sums, the sum of each tile, or each element
_BY_ROW, _BY_TILE = tl.constexpr(BY_ROW), tl.constexpr(BY_TILE)
REDUCE = 1024  # elements that a program of the second kernel adds
#: From so many terms of a sum on two bfloat16 parts are enough: their error is a quarter of the float32 sum's.
ENOUGH_TERMS = 1024
#: From so many tokens on the library multiplies, where one scale belongs to a row of the weight.
LIBRARY_TOKENS = 1024
#: Bytes of the operands that are written out at a time, and the smallest number of rows. They stay in the L2 cache.
SLICE_BYTES, MIN_SLICE = 32 * 2**20, 256
OPERANDS = (16, 256)  # rows and columns of a tile of operands
SWIZZLE = tl.constexpr(8)  # rows of tiles that programs process together, so that they share data in the L2 cache


# The number of tokens is not specialized: Triton would compile variants for 1 and for multiples of 16.
@triton.jit(do_not_specialize=["rows"])
def quantize_tokens_kernel(
    x_ptr, codes_ptr, scale_ptr, rows, cols, QMAX: tl.constexpr, R: tl.constexpr, C: tl.constexpr
):
    row = (tl.program_id(0).to(tl.int64) * R + tl.arange(0, R))[:, None]
    exists = row < rows
    column = tl.arange(0, C)[None, :]
    scale = token_scale(x_ptr, row, exists, column, cols, QMAX, tl.float32, R, C)
    finite = scale < float("inf")
    for start in range(0, cols, C):
        mask = exists & (start + column < cols)
        x = from_element(tl.load(x_ptr + row * cols + start + column, mask, other=0.0), tl.float32)
        r = divide_rows(x, scale, False)
        limit = tl.full(r.shape, QMAX, tl.float32)
        code = tl.where(finite, round_half_even(select_high(select_low(r, -limit), limit)), 0.0)
        tl.store(codes_ptr + row * cols + start + column, code.to(tl.int8), mask)
    tl.store(scale_ptr + row, tl.where(finite, scale, float("nan")), exists)


@triton.jit(do_not_specialize=["numel"])
def reduce_kernel(parts_ptr, bias_ptr, y_ptr, numel, cols, SPLIT: tl.constexpr, BIAS: tl.constexpr, C: tl.constexpr):
    index = tl.program_id(0).to(tl.int64) * C + tl.arange(0, C)
    mask = index < numel
    y = tl.load(parts_ptr + index, mask, other=0.0)
    for part in tl.static_range(1, SPLIT):
        y += tl.load(parts_ptr + part * numel.to(tl.int64) + index, mask, other=0.0)
    if BIAS:
        y += from_element(tl.load(bias_ptr + index % cols, mask, other=0.0), tl.float32)
    tl.store(y_ptr + index, to_element(y, y_ptr.dtype.element_ty), mask)


@triton.jit(do_not_specialize=["rows"])
def lowbit_linear_kernel(
    x_ptr, packed_ptr, scale_ptr, zero_ptr, bias_ptr, offsets_ptr, token_scale_ptr, y_ptr,
    rows, outputs, cols, row_bytes, groups, experts,
    BITS: tl.constexpr, STEPS: tl.constexpr, SHIFT: tl.constexpr, ZERO: tl.constexpr, GROUP: tl.constexpr,
    WORDS: tl.constexpr, UNITS: tl.constexpr, DOT: tl.constexpr, PARTS: tl.constexpr,
    FACTOR: tl.constexpr, ADD: tl.constexpr, SUMS: tl.constexpr, SCALES: tl.constexpr,
    BIAS: tl.constexpr, ACT: tl.constexpr, GROUPED: tl.constexpr, EXPERTS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    SUM: tl.constexpr = tl.int32 if DOT.is_int() else tl.float32
    start, end, tiles = segments(offsets_ptr, rows, experts, GROUPED, EXPERTS, BLOCK_M)
    row_tiles, col_tiles = tl.sum(tiles, 0), tl.cdiv(outputs, BLOCK_N)
    blocks = tl.cdiv(cols, BLOCK_K)
    for tile in range(tl.program_id(0), row_tiles * col_tiles * SPLIT, tl.num_programs(0)):
        part = tile % SPLIT
        row_tile, col_tile = tl.swizzle2d(
            tile // SPLIT // col_tiles, tile // SPLIT % col_tiles, row_tiles, col_tiles, SWIZZLE
        )
        expert, first_row, last_row = locate(row_tile, start, end, tiles, EXPERTS, BLOCK_M)
        row = (first_row + tl.arange(0, BLOCK_M)).to(tl.int64)
        exists = row < last_row
        n = col_tile * BLOCK_N + tl.arange(0, BLOCK_N)
        valid = (n < outputs) & (expert < experts)
        weight_row = expert.to(tl.int64) * outputs + n
        first = part * tl.cdiv(blocks, SPLIT)
        last = tl.minimum(first + tl.cdiv(blocks, SPLIT), blocks)
        last = tl.where(expert < experts, last, first)  # unassigned rows: an empty sum

        acc = tl.zeros((BLOCK_M, BLOCK_N), SUM if SCALES == _BY_ROW else tl.float32)
        total = tl.zeros((BLOCK_M,), SUM)
        if SCALES == _BY_TILE:
            index = weight_row * groups + first * BLOCK_K // GROUP
            scale, zero = load_scales(scale_ptr, zero_ptr, index, valid & (first < last), ZERO)
        for block in range(first, last):
            k = block * BLOCK_K + tl.arange(0, BLOCK_K)
            x_mask = exists[:, None] & (k < cols)[None, :]
            x = tl.load(x_ptr + row[:, None] * cols + k[None, :], x_mask, other=0)
            x = from_element(x, DOT if PARTS == 1 else tl.float32)
            w = load_operands(
                packed_ptr, weight_row, valid, block * (BLOCK_K * BITS // 8), row_bytes, BITS, WORDS, UNITS,
                BLOCK_N, BLOCK_K, DOT, FACTOR, ADD,
            )  # fmt: skip
            if SCALES == _BY_ROW:
                acc = multiply(x, w, acc, PARTS, DOT, SUM)
                if SUMS:
                    total += tl.sum(x.to(SUM), 1)
            elif SCALES == _BY_TILE:
                step, shift = steps_of(scale, zero, STEPS, SHIFT, ZERO)
                index = weight_row * groups + (block + 1) * BLOCK_K // GROUP
                scale, zero = load_scales(scale_ptr, zero_ptr, index, valid & (block + 1 < last), ZERO)
                sums = multiply(x, w, tl.zeros((BLOCK_M, BLOCK_N), SUM), PARTS, DOT, SUM)
                if SUMS:
                    total = tl.sum(x.to(SUM), 1)
                acc += scaled(sums, total, step, shift, ADD, SUMS)
            else:
                index = weight_row[None, :] * groups + (k // GROUP)[:, None]
                scale, zero = load_scales(scale_ptr, zero_ptr, index, valid[None, :] & (k < cols)[:, None], ZERO)
                step, shift = steps_of(scale, zero, STEPS, SHIFT, ZERO)
                acc = multiply(x, (w + shift) * step, acc, PARTS, DOT, SUM)

        y = acc
        if SCALES == _BY_ROW:
            scale, zero = load_scales(scale_ptr, zero_ptr, weight_row, valid, ZERO)
            step, shift = steps_of(scale, zero, STEPS, SHIFT, ZERO)
            y = scaled(acc, total, step, shift, ADD, SUMS)
        if ACT:
            y *= tl.load(token_scale_ptr + row, exists & (expert < experts), other=0.0)[:, None]
        if BIAS:
            y += from_element(tl.load(bias_ptr + n, n < outputs, other=0.0), tl.float32)[None, :]
        place = (row + part.to(tl.int64) * rows)[:, None] * outputs + n[None, :]
        tl.store(y_ptr + place, to_element(y, y_ptr.dtype.element_ty), exists[:, None] & (n < outputs)[None, :])


@triton.jit(do_not_specialize=["rows"])
def lowbit_linear_transposed_kernel(
    g_ptr, packed_ptr, scale_ptr, zero_ptr, offsets_ptr, x_ptr,
    rows, outputs, cols, row_bytes, groups, experts,
    BITS: tl.constexpr, STEPS: tl.constexpr, SHIFT: tl.constexpr, ZERO: tl.constexpr, GROUP: tl.constexpr,
    WORDS: tl.constexpr, UNITS: tl.constexpr, DOT: tl.constexpr, PARTS: tl.constexpr,
    ADD: tl.constexpr, SUMS: tl.constexpr, SCALES: tl.constexpr, GROUPED: tl.constexpr, EXPERTS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """``cols`` are the columns of the output (tiles of ``BLOCK_N``), ``outputs`` the terms of a sum (``BLOCK_K``)."""
    start, end, tiles = segments(offsets_ptr, rows, experts, GROUPED, EXPERTS, BLOCK_M)
    row_tiles, col_tiles = tl.sum(tiles, 0), tl.cdiv(cols, BLOCK_N)
    blocks = tl.cdiv(outputs, BLOCK_K)
    for tile in range(tl.program_id(0), row_tiles * col_tiles * SPLIT, tl.num_programs(0)):
        part = tile % SPLIT
        row_tile, col_tile = tl.swizzle2d(
            tile // SPLIT // col_tiles, tile // SPLIT % col_tiles, row_tiles, col_tiles, SWIZZLE
        )
        expert, first_row, last_row = locate(row_tile, start, end, tiles, EXPERTS, BLOCK_M)
        row = (first_row + tl.arange(0, BLOCK_M)).to(tl.int64)
        exists = row < last_row
        k = col_tile * BLOCK_N + tl.arange(0, BLOCK_N)
        first = part * tl.cdiv(blocks, SPLIT)
        last = tl.minimum(first + tl.cdiv(blocks, SPLIT), blocks)
        last = tl.where(expert < experts, last, first)

        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        total = tl.zeros((BLOCK_M,), tl.float32)
        for block in range(first, last):
            n = block * BLOCK_K + tl.arange(0, BLOCK_K)
            valid = n < outputs
            weight_row = expert.to(tl.int64) * outputs + n
            g_mask = exists[:, None] & valid[None, :]
            g = from_element(tl.load(g_ptr + row[:, None] * outputs + n[None, :], g_mask, other=0.0), tl.float32)
            w = tl.trans(
                load_operands(
                    packed_ptr, weight_row, valid, col_tile * (BLOCK_N * BITS // 8), row_bytes, BITS, WORDS, UNITS,
                    BLOCK_K, BLOCK_N, DOT, 1, ADD,
                )
            )  # fmt: skip
            if SCALES == _BY_TILE:
                index = weight_row * groups + col_tile * BLOCK_N // GROUP
                scale, zero = load_scales(scale_ptr, zero_ptr, index, valid, ZERO)
                step, shift = steps_of(scale, zero, STEPS, SHIFT, ZERO)
                g *= step[None, :]
                if SUMS:
                    total += tl.sum(g * shift[None, :], 1)
            else:
                index = weight_row[:, None] * groups + (k // GROUP)[None, :]
                scale, zero = load_scales(scale_ptr, zero_ptr, index, valid[:, None] & (k < cols)[None, :], ZERO)
                step, shift = steps_of(scale, zero, STEPS, SHIFT, ZERO)
                w = (w + shift) * step
            acc = multiply(g, w, acc, PARTS, DOT, tl.float32)
        if SUMS:
            acc += total[:, None]

        place = (row + part.to(tl.int64) * rows)[:, None] * cols + k[None, :]
        tl.store(x_ptr + place, to_element(acc, x_ptr.dtype.element_ty), exists[:, None] & (k < cols)[None, :])


# With many tokens the library's product of 16-bit (8-bit) numbers is faster than ours. The codes are exact in these,
# so they are written out, a few rows of the weight at a time, and scales multiply the library's float32 (int32) sums.


@triton.jit(do_not_specialize=["rows"])
def operands_kernel(
    packed_ptr, operands_ptr, rows, cols, row_bytes, chunks,
    BITS: tl.constexpr, WORDS: tl.constexpr, UNITS: tl.constexpr, DOT: tl.constexpr, FACTOR: tl.constexpr,
    ADD: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Write operands ``FACTOR * code + ADD`` of packed rows."""
    program = tl.program_id(0)
    row = (program // chunks).to(tl.int64) * R + tl.arange(0, R)
    chunk = program % chunks
    k = chunk * C + tl.arange(0, C)
    w = load_operands(
        packed_ptr, row, row < rows, chunk * (C * BITS // 8), row_bytes, BITS, WORDS, UNITS, R, C, DOT, FACTOR, ADD
    )
    mask = (row < rows)[:, None] & (k < cols)[None, :]
    w = to_element(w, tl.bfloat16) if operands_ptr.dtype.element_ty == tl.bfloat16 else w
    tl.store(operands_ptr + row[:, None] * cols + k[None, :], tl.trans(w), mask)


@triton.jit(do_not_specialize=["rows", "first"])
def scale_sums_kernel(
    sums_ptr, total_ptr, scale_ptr, zero_ptr, bias_ptr, token_scale_ptr, y_ptr, rows, cols, first, outputs, chunks,
    STEPS: tl.constexpr, SHIFT: tl.constexpr, ZERO: tl.constexpr, ADD: tl.constexpr, SUMS: tl.constexpr,
    BIAS: tl.constexpr, ACT: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Write the columns ``first ... first + cols`` of y from sums over codes."""
    program = tl.program_id(0)
    row = (program // chunks).to(tl.int64) * R + tl.arange(0, R)
    column = (program % chunks) * C + tl.arange(0, C)
    exists, valid = row < rows, column < cols
    mask = exists[:, None] & valid[None, :]
    sums = tl.load(sums_ptr + row[:, None] * cols + column[None, :], mask, other=0)
    total = tl.load(total_ptr + row, exists, other=0) if SUMS else row
    n = first + column
    scale, zero = load_scales(scale_ptr, zero_ptr, n, valid, ZERO)
    step, shift = steps_of(scale, zero, STEPS, SHIFT, ZERO)
    y = scaled(sums, total, step, shift, ADD, SUMS)
    if ACT:
        y *= tl.load(token_scale_ptr + row, exists, other=0.0)[:, None]
    if BIAS:
        y += from_element(tl.load(bias_ptr + n, valid, other=0.0), tl.float32)[None, :]
    tl.store(y_ptr + row[:, None] * outputs + n[None, :], to_element(y, y_ptr.dtype.element_ty), mask)


def capability(device: torch.device) -> tuple[int, int]:
    """Return the compute capability of a device, or the oldest one of the table for the CPU."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else CONFIGS[-1].capability


@lru_cache
def processors(device: torch.device) -> int:
    """Return how many programs process the tiles of experts."""
    return 2 * torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 8


def whole_codes(shift: float, bits: int, zero: bool, integer: bool) -> tuple[int, float, bool]:
    """Return (factor, addend, sums): operands are ``factor * code + addend``; ``sums`` says if sums of x are needed.

    Args:
        shift: smallest code + offset of the grid.
        bits: bits of a stored code.
        zero: whether there is a zero point, which is not known at compile time.
        integer: whether operands are int8. Floats hold multiples of 1/2 up to 128, and integers up to 256, exactly.
    """
    most = (1 << bits) - 1
    if not integer:
        exact = (2 * shift).is_integer() and ((shift >= -128 and most + shift <= 128) or shift == 0)
        return (1, shift, False) if exact and not zero else (1, 0.0, True)
    factor = 1 if float(shift).is_integer() else 2
    if not zero and (factor * shift).is_integer() and factor * shift >= -128 and factor * (most + shift) <= 127:
        return factor, int(factor * shift), False
    return 1, (-128 if bits == 8 else 0), True


class _Weight:
    """A packed weight, with the arguments that the kernels take."""

    def __init__(
        self, packed: Tensor, scale: Tensor, zero_point: Tensor | None, offsets: Tensor | None, grid: list[float],
        code_min: int, bits: int, cols: int,
    ) -> None:  # fmt: skip
        self.packed, self.scale, self.zero, self.offsets = packed, scale, zero_point, offsets
        self.bits, self.cols, self.outputs, self.groups = bits, cols, packed.shape[-2], scale.shape[-1]
        self.group_size = cols // self.groups
        self.experts = 1 if offsets is None else packed.shape[0]
        self.steps, self.shift = grid[1], code_min + grid[2]
        self.row_bytes = row_bytes(cols, bits)

    @property
    def pointers(self) -> tuple[Tensor, ...]:
        """Codes, scales and zero points. The scales replace absent zero points; flags prevent that they are read."""
        return self.packed, self.scale, self.scale if self.zero is None else self.zero

    @property
    def sizes(self) -> tuple[int, ...]:
        """Run-time sizes."""
        return self.outputs, self.cols, self.row_bytes, self.groups, self.experts

    def whole_words(self, columns: int) -> bool:
        """Whether tiles of so many columns are loaded as 32-bit words, not as bytes."""
        return by_words(self.bits, self.row_bytes, self.packed.data_ptr(), columns)

    def constants(self, columns: int) -> dict[str, Any]:
        """Compile-time arguments that both kernels share; ``columns`` of the weight are in a tile."""
        grouped = self.offsets is not None
        words, units = group_of(self.bits)
        words = words if self.whole_words(columns) else 0
        # With a single group every tile is in group 0.
        group = self.group_size if self.groups > 1 else 1 << 30
        return {
            "BITS": self.bits, "STEPS": self.steps, "SHIFT": self.shift, "ZERO": self.zero is not None,
            "GROUP": group, "WORDS": words, "UNITS": units, "GROUPED": grouped,
            "EXPERTS": triton.next_power_of_2(self.experts + 1) if grouped else 1,
        }  # fmt: skip

    def programs(self, config: Config, tokens: int, columns: int) -> int:
        """Return the programs of a launch: one for each tile, or with experts as many as the GPU runs at once."""
        tiles = triton.cdiv(tokens, config.block_m)
        if self.offsets is None:
            return tiles * triton.cdiv(columns, config.block_n) * config.split
        bound = (tiles + self.experts + 1) * triton.cdiv(columns, config.block_n) * config.split
        return min(bound, processors(self.packed.device))


def _blocks(config: Config) -> dict[str, int]:
    return {
        "BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "BLOCK_K": config.block_k, "SPLIT": config.split,
        "num_warps": config.warps, "num_stages": config.stages,
    }  # fmt: skip


def _with_parts(out: Tensor, split: int, bias: Tensor | None, launch: Callable[[Tensor], None]) -> None:
    """Launch into the output, or into partial sums that a second kernel adds."""
    if split == 1:
        launch(out)
        return
    parts = out.new_empty((split, *out.shape), dtype=torch.float32)
    launch(parts)
    reduce_kernel[(triton.cdiv(out.numel(), REDUCE),)](
        parts, out if bias is None else bias, out, out.numel(), out.shape[-1], SPLIT=split, BIAS=bias is not None,
        C=REDUCE, num_warps=4,
    )  # fmt: skip


def _quantize_tokens(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    rows, cols = x.shape
    codes, scale = torch.empty_like(x, dtype=torch.int8), x.new_empty(rows, dtype=torch.float32)
    tiles = tiling(rows, cols)
    quantize_tokens_kernel[(triton.cdiv(rows, tiles.tile_rows),)](
        x, codes, scale, rows, cols, QMAX=2.0 ** (bits - 1) - 1, R=tiles.tile_rows, C=tiles.tile_cols, **OPTIONS
    )
    return codes, scale


_DOTS = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.int8: tl.int8}


def _plan(device: torch.device, dtype: torch.dtype, w: _Weight, tokens: int) -> tuple[Config, int, Any, int]:
    """Return the configuration of a product, where scales multiply, the dtype of operands, and the parts of x."""
    integer, each = dtype == torch.int8, triton.cdiv(tokens, w.experts)
    least, parts = least_terms(w.bits, w.whole_words(SMALLEST), integer), 3 if dtype == torch.float32 else 1
    scales = BY_TILE if w.groups > 1 or (integer and w.cols > MAX_INTEGERS) else BY_ROW
    config = choose(capability(device), "parts" if parts > 1 else "rows" if scales == BY_ROW else "groups", each)
    if w.groups > 1:
        block = common_block(config.block_k, w.group_size, least)
        if block is None:
            scales, parts, config = BY_ELEMENT, 1, choose(capability(device), "ieee", each)
        else:
            config = replace(config, block_k=block)
    words = w.whole_words(config.block_k)
    if (scales == BY_TILE and (w.zero is not None or parts > 1)) or not words:
        config = replace(config, block_n=min(config.block_n, NARROW))
    if w.cols * dtype.itemsize % 16 or not words:
        config = by_elements(config)
    return fitted(config, tokens, w.outputs, w.cols, least), scales, _dot(dtype, scales, parts), parts


def _plan_transposed(device: torch.device, dtype: torch.dtype, w: _Weight, tokens: int) -> tuple[Config, int, Any, int]:
    """Return the same of a transposed product, with the parts of g."""
    each, scales = triton.cdiv(tokens, w.experts), BY_TILE
    config, parts = choose(capability(device), "parts", each), 3
    if w.groups > 1:
        block = common_block(config.block_n, w.group_size, SMALLEST)
        if block is None:
            scales, parts, config = BY_ELEMENT, 1, choose(capability(device), "ieee", each)
        else:
            config = replace(config, block_n=block)
    if w.outputs * dtype.itemsize % 16:
        config = by_elements(config)
    if parts > 1 and dtype != torch.float32 and w.outputs >= ENOUGH_TERMS:
        parts = 2
    least = least_terms(w.bits, w.whole_words(SMALLEST), False)
    return fitted(config, tokens, w.cols, w.outputs, least), scales, _dot(dtype, scales, parts), parts


def _dot(dtype: torch.dtype, scales: int, parts: int) -> Any:
    """Return the dtype of operands. The interpreter would multiply bfloat16 as integers, so it uses float32."""
    dot = tl.float32 if scales == BY_ELEMENT else tl.bfloat16 if parts > 1 else _DOTS[dtype]
    return tl.float32 if INTERPRETED and dot == tl.bfloat16 else dot


def library_product(x: Tensor, w: Tensor) -> Tensor:
    """Return x Wᵀ in int32 or float32, by the library of the device."""
    if x.dtype == torch.int8:
        return integer_product(x, w.T)
    if x.device.type == "cuda":
        return torch.mm(x, w.T, out_dtype=torch.float32)
    return x.float() @ w.float().T  # the interpreter: a CPU has no product of 16-bit numbers with a float32 result


def _by_library(
    x: Tensor, w: _Weight, bias: Tensor | None, token_scale: Tensor | None, whole: tuple[int, float, bool], y: Tensor
) -> None:
    """Write y with the library's products."""
    (tokens, cols), (factor, add, sums) = x.shape, whole
    slice_rows = max(MIN_SLICE, SLICE_BYTES // (cols * x.element_size()) // MIN_SLICE * MIN_SLICE)
    operands = x.new_empty((min(slice_rows, w.outputs), cols))
    total = x.sum(-1, dtype=torch.int32 if x.dtype == torch.int8 else torch.float32) if sums else w.scale
    tile_rows, tile_cols = OPERANDS
    words, units = group_of(w.bits)
    words = words if w.whole_words(tile_cols) else 0
    chunks = triton.cdiv(cols, tile_cols)
    for first in range(0, w.outputs, slice_rows):
        rows = min(slice_rows, w.outputs - first)
        operands_kernel[(triton.cdiv(rows, tile_rows) * chunks,)](
            w.packed[first:], operands, rows, cols, w.row_bytes, chunks, BITS=w.bits, WORDS=words, UNITS=units,
            DOT=_dot(x.dtype, BY_ROW, 1), FACTOR=factor, ADD=add, R=tile_rows, C=tile_cols, num_warps=4,
        )  # fmt: skip
        found = library_product(x, operands[:rows])
        tiles = tiling(tokens, rows, chunk_columns=1)
        scale_sums_kernel[(tiles.programs,)](
            found, total, *w.pointers[1:], w.scale if bias is None else bias,
            w.scale if token_scale is None else token_scale, y, tokens, rows, first, w.outputs, tiles.chunks,
            STEPS=w.steps * factor, SHIFT=w.shift, ZERO=w.zero is not None, ADD=add, SUMS=sums, BIAS=bias is not None,
            ACT=token_scale is not None, R=tiles.tile_rows, C=tiles.tile_cols, num_warps=8,
        )  # fmt: skip


@launches("lowbit_linear")
def lowbit_linear_out(
    x: Tensor, packed: Tensor, scale: Tensor, zero_point: Tensor | None, bias: Tensor | None, offsets: Tensor | None,
    grid: list[float], code_min: int, bits: int, act_bits: int | None, out: Tensor,
) -> None:  # fmt: skip
    """Write y. Arguments as the op's."""
    if x.dtype == torch.float64 or 0 in (x.numel(), packed.numel()):  # float64, or nothing to compute
        if offsets is not None:
            numbers = x if act_bits is None else torch.ops.qatkernels.fake_quantize_dynamic(x, act_bits)
            values = unpacked(packed, scale, zero_point, grid, code_min, bits, x.shape[-1]).to(x.dtype)
            grouped_linear_out(numbers, values, offsets, out)
            return
        args = (x, packed, scale, zero_point, bias, offsets, grid, code_min, bits, act_bits)
        out.copy_(as_tuple(FORWARD.reference(*args))[0])
        return
    w = _Weight(packed, scale, zero_point, offsets, grid, code_min, bits, x.shape[-1])
    x, y = x.view(-1, w.cols), out.view(-1, w.outputs)
    tokens = x.shape[0]
    token_scale = w.scale
    if act_bits is not None:
        x, token_scale = _quantize_tokens(x, act_bits)
    config, scales, dot, parts = _plan(x.device, x.dtype, w, tokens)
    factor, add, sums = (1, 0.0, False)
    if scales != BY_ELEMENT:
        factor, add, sums = whole_codes(w.shift, bits, zero_point is not None, x.dtype == torch.int8)
    if scales == BY_ROW and parts == 1 and offsets is None and tokens >= LIBRARY_TOKENS:
        _by_library(x, w, bias, None if act_bits is None else token_scale, (factor, add, sums), y)
        return
    alone = bias is not None and config.split == 1
    constants = w.constants(config.block_k) | {"STEPS": w.steps * factor}

    def launch(target: Tensor) -> None:
        lowbit_linear_kernel[(w.programs(config, tokens, w.outputs),)](
            x, *w.pointers, bias if alone else w.scale, w.scale if offsets is None else w.offsets, token_scale, target,
            tokens, *w.sizes, **constants, DOT=dot, PARTS=parts, FACTOR=factor, ADD=add, SUMS=sums, SCALES=scales,
            BIAS=alone, ACT=act_bits is not None, **_blocks(config),
        )  # fmt: skip

    _with_parts(y, config.split, bias, launch)


@launches("lowbit_linear_transposed")
def lowbit_linear_transposed_out(
    g: Tensor, packed: Tensor, scale: Tensor, zero_point: Tensor | None, offsets: Tensor | None, grid: list[float],
    code_min: int, bits: int, cols: int, out: Tensor,
) -> None:  # fmt: skip
    """Write x. Arguments as the op's."""
    if g.dtype == torch.float64 or 0 in (g.numel(), packed.numel()):
        if offsets is not None:
            values = unpacked(packed, scale, zero_point, grid, code_min, bits, cols).to(g.dtype)
            grouped_linear_transposed_out(g, values, offsets, out)
            return
        args = (g, packed, scale, zero_point, offsets, grid, code_min, bits, cols)
        out.copy_(as_tuple(TRANSPOSED.reference(*args))[0])
        return
    w = _Weight(packed, scale, zero_point, offsets, grid, code_min, bits, cols)
    g, y = g.view(-1, w.outputs), out.view(-1, cols)
    tokens = g.shape[0]
    config, scales, dot, parts = _plan_transposed(g.device, g.dtype, w, tokens)
    add, sums = (0.0, False) if scales == BY_ELEMENT else whole_codes(w.shift, bits, zero_point is not None, False)[1:]

    def launch(target: Tensor) -> None:
        lowbit_linear_transposed_kernel[(w.programs(config, tokens, cols),)](
            g, *w.pointers, w.scale if offsets is None else w.offsets, target, tokens, *w.sizes,
            **w.constants(config.block_n), DOT=dot, PARTS=parts, ADD=add, SUMS=sums, SCALES=scales, **_blocks(config),
        )  # fmt: skip

    _with_parts(y, config.split, None, launch)


def warm_up(
    weight: PackedWeight,
    dtype: torch.dtype = torch.bfloat16,
    *,
    bias: Tensor | None = None,
    act_bits: int | None = None,
) -> None:
    """Compile the kernels of products with a weight, forward and transposed, for any number of tokens.

    Triton compiles a kernel at its first launch. A server calls this for each shape of weight before it serves. The
    kernels do not depend on the number of tokens but on the configuration; each configuration is launched once.

    Args:
        weight: packed weight on a GPU, ``[N, K]``, or ``[E, N, K]`` for grouped products.
        dtype: dtype of activations and gradients.
        bias: the bias of the products, if they have one.
        act_bits: as for :func:`qatkernels.lowbit_linear`.
    """
    grid = (weight.constants, weight.grid.code_min, weight.bits)
    parts, (rows, cols), offsets = (weight.packed, weight.scale, weight.zero_point), weight.shape[-2:], None
    if weight.packed.ndim == 3:
        offsets = torch.zeros(weight.shape[0], dtype=torch.int32, device=weight.device)
    w = _Weight(*parts, offsets, *grid, cols)
    codes = torch.int8 if act_bits is not None else dtype
    for tokens in distinct(lambda t: _plan(weight.device, codes, w, t)):
        x = torch.zeros(tokens, cols, dtype=dtype, device=weight.device)
        lowbit_linear_out(x, *parts, bias, offsets, *grid, act_bits, x.new_empty(tokens, rows))
    for tokens in distinct(lambda t: _plan_transposed(weight.device, dtype, w, t)):
        g = torch.zeros(tokens, rows, dtype=dtype, device=weight.device)
        lowbit_linear_transposed_out(g, *parts, offsets, *grid, cols, g.new_empty(tokens, cols))
