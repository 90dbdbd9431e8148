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

With many tokens kernels write operands out, and the library multiplies (`_library.py`).

Experts are found on the device: a program reads all offsets, counts tiles, and processes every n-th tile. Unassigned
rows form the tiles of one additional expert. With few tokens several programs share a sum (split-K), and a second
kernel adds their parts in a fixed order: there are no atomics, and results are the same in every run. In float64 the
whole weight is dequantized and multiplied by the library, or with experts by the kernel of `grouped_linear.py`, which
also reads the offsets on the device.

The floor of T tokens is the longer of two times: 2 T N K operations at the rate of the operands (8 or 16 bits on tensor
cores; three times as many for float32 activations, two or three times for the transposed product), or the bytes of x,
y, and the codes and scales of the experts that have tokens, over the bandwidth.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...ops._lowbit_linear import FORWARD, TRANSPOSED, unpacked
from ...ops._op import as_tuple
from ...ops.packed_weight import PackedWeight
from ._codes import load_operands
from ._element import (
    OPTIONS,
    divide_rows,
    from_element,
    round_half_even,
    select_high,
    select_low,
    to_element,
)
from ._launchers import launches
from ._library import by_library, library_serves, several_variants
from ._lowbit import load_scales, locate, multiply, scaled, segments, steps_of
from ._products import (
    CONFIGS,
    HOPPER,
    MAX_INTEGERS,
    NARROW,
    NARROW_HOPPER,
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
from ._weight import BY_ELEMENT, BY_ROW, BY_TILE, ENOUGH_TERMS, Weight, operand_type, whole_codes
from .dynamic import token_scale
from .grouped_linear import grouped_linear_out, grouped_linear_transposed_out

_BY_ROW, _BY_TILE = tl.constexpr(BY_ROW), tl.constexpr(BY_TILE)
REDUCE = 1024  # elements that a program of the second kernel adds
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


def capability(device: torch.device) -> tuple[int, int]:
    """Return the compute capability of a device, or the oldest one of the table for the CPU."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else CONFIGS[-1].capability


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


class Choice(NamedTuple):
    """How a product is computed.

    Attributes:
        config: the configuration of our kernel, or None if the library multiplies.
        scales: where scales multiply.
        dot: dtype of our kernel's operands.
        parts: bfloat16 numbers into which it splits an activation.
        sliced: whether the last slice of the library's product needs kernels of its own.
    """

    config: Config | None
    scales: int
    dot: Any = None
    parts: int = 1
    sliced: bool = False


def _plan(device: torch.device, dtype: torch.dtype, w: Weight, tokens: int) -> Choice:
    """Choose how a product is computed."""
    integer, each = dtype == torch.int8, triton.cdiv(tokens, w.experts)
    least, parts = least_terms(w.bits, w.whole_words(SMALLEST), integer), 3 if dtype == torch.float32 else 1
    scales = BY_TILE if w.groups > 1 or (integer and w.cols > MAX_INTEGERS) else BY_ROW
    if library_serves(dtype, w, tokens, w.cols, codes=scales == BY_ROW):
        size = dtype.itemsize if scales == BY_ROW else 4
        sliced = several_variants(w.outputs, w.cols, size, tokens, integers=integer and scales == BY_ROW)
        return Choice(None, scales, sliced=sliced)
    config = choose(capability(device), "parts" if parts > 1 else "rows" if scales == BY_ROW else "groups", each)
    if w.groups > 1:
        block = common_block(config.block_k, w.group_size, least)
        if block is None:
            scales, parts, config = BY_ELEMENT, 1, choose(capability(device), "ieee", each)
        else:
            config = replace(config, block_k=block)
    words = w.whole_words(config.block_k)
    narrow = parts > 1 or (w.zero is not None and config.capability != HOPPER)
    if (scales == BY_TILE and narrow) or not words:
        config = replace(config, block_n=min(config.block_n, NARROW))
    elif (config.block_m < 64 and (w.bits > 4 or w.zero is not None)) or (w.bits > 4 and w.zero is not None):
        config = replace(config, block_n=min(config.block_n, NARROW_HOPPER))
    if w.cols * dtype.itemsize % 16 or not words:
        config = by_elements(config)
    config = fitted(config, tokens, w.outputs, w.cols, least)
    return Choice(config, scales, operand_type(dtype, scales, parts), parts)


def _plan_transposed(device: torch.device, dtype: torch.dtype, w: Weight, tokens: int) -> Choice:
    """Choose how a transposed product is computed."""
    each, scales = triton.cdiv(tokens, w.experts), BY_TILE
    if library_serves(dtype, w, tokens, w.outputs, codes=False, transposed=True):
        return Choice(None, scales, sliced=several_variants(w.cols, w.outputs, 4, tokens))
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
    config = fitted(config, tokens, w.cols, w.outputs, least)
    return Choice(config, scales, operand_type(dtype, scales, parts), parts)


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
    w = Weight(packed, scale, zero_point, offsets, grid, code_min, bits, x.shape[-1])
    x, y = x.view(-1, w.cols), out.view(-1, w.outputs)
    tokens = x.shape[0]
    token_scale = w.scale
    if act_bits is not None:
        x, token_scale = _quantize_tokens(x, act_bits)
    config, scales, dot, parts, _ = _plan(x.device, x.dtype, w, tokens)
    if config is None:
        by_library(
            x, w, y, codes=scales == BY_ROW, bias=bias, token_scale=None if act_bits is None else token_scale
        )  # fmt: skip
        return
    factor, add, sums = (1, 0.0, False)
    if scales != BY_ELEMENT:
        factor, add, sums = whole_codes(w.shift, bits, zero_point is not None, x.dtype == torch.int8)
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
    w = Weight(packed, scale, zero_point, offsets, grid, code_min, bits, cols)
    g, y = g.view(-1, w.outputs), out.view(-1, cols)
    tokens = g.shape[0]
    config, scales, dot, parts, _ = _plan_transposed(g.device, g.dtype, w, tokens)
    if config is None:
        by_library(g, w, y, codes=False, transposed=True)
        return
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
    w = Weight(*parts, offsets, *grid, cols)
    codes = torch.int8 if act_bits is not None else dtype
    for tokens in distinct(lambda t: _plan(weight.device, codes, w, t)):
        x = torch.zeros(tokens, cols, dtype=dtype, device=weight.device)
        lowbit_linear_out(x, *parts, bias, offsets, *grid, act_bits, x.new_empty(tokens, rows))
    for tokens in distinct(lambda t: _plan_transposed(weight.device, dtype, w, t)):
        g = torch.zeros(tokens, rows, dtype=dtype, device=weight.device)
        lowbit_linear_transposed_out(g, *parts, offsets, *grid, cols, g.new_empty(tokens, cols))
