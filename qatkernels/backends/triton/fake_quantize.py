"""Fake quantization in Triton: forward, backward and forward mode, each one pass over memory."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._element import by_steps, code_of, constant, divide_rows, from_element, to_element, value_of
from ._launchers import launches
from ._rows import TILE_ELEMENTS, load_scale, load_weight, point, rows_of_program, shape_of, tiling


@triton.jit
def slopes_of(w, scale, zero, GRID: tl.constexpr):
    """Masks of r below and above the pass-through range, and dy/ds."""
    return slopes_at(divide_rows(w, scale, True), w, zero, GRID)


@triton.jit
def slopes_at(r, w, zero, GRID: tl.constexpr):
    """The same, given the ratio r = w / scale."""
    below = r < constant(GRID[5], r) - zero
    above = r > constant(GRID[6], r) - zero
    code = code_of(w, r, zero, GRID)
    level = by_steps(code + (constant(GRID[2], r) - zero), GRID[1])
    inside = level - r * constant(GRID[9], r)
    beyond = tl.where(below, constant(GRID[7], r) - zero, constant(GRID[8], r) - zero)
    return below | above, tl.where(below | above, beyond, inside)


@triton.jit
def fake_quantize_fwd_kernel(
    w_ptr, y_ptr, scale_ptr, zero_ptr, seed_ptr, rows, cols, noise_std, scale_noise_std, chunks,
    GRID: tl.constexpr, COMPUTE: tl.constexpr, ZERO: tl.constexpr, NOISE: tl.constexpr, SCALE_NOISE: tl.constexpr,
    BY_EIGHT: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    row, exists, chunk = rows_of_program(rows, chunks, R)
    scale, zero = load_scale(scale_ptr, zero_ptr, seed_ptr, row, exists, scale_noise_std, COMPUTE, ZERO, SCALE_NOISE)
    columns = chunk.to(tl.int64) * C + tl.arange(0, C)
    mask = exists & (columns < cols)[None, :]
    w = load_weight(w_ptr, seed_ptr, row, columns, cols, mask, noise_std, R, C, COMPUTE, NOISE, BY_EIGHT)
    code = code_of(w, divide_rows(w, scale, False), zero, GRID)
    y = value_of(code, scale, zero, GRID)
    tl.store(y_ptr + row * cols + columns[None, :], to_element(y, y_ptr.dtype.element_ty), mask)


@triton.jit
def fake_quantize_bwd_kernel(
    w_ptr, g_ptr, dw_ptr, ds_ptr, dz_ptr, scale_ptr, zero_ptr, seed_ptr, rows, cols, noise_std, scale_noise_std, chunks,
    grad_scale,
    GRID: tl.constexpr, COMPUTE: tl.constexpr, ZERO: tl.constexpr, NOISE: tl.constexpr, SCALE_NOISE: tl.constexpr,
    BY_EIGHT: tl.constexpr, R: tl.constexpr, C: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    row, exists, chunk = rows_of_program(rows, chunks, R)
    scale, zero = load_scale(scale_ptr, zero_ptr, seed_ptr, row, exists, scale_noise_std, COMPUTE, ZERO, SCALE_NOISE)
    sum_s = tl.zeros((R, C), COMPUTE)
    sum_z = tl.zeros((R, C), COMPUTE)
    for start in tl.static_range(0, CHUNK, C):
        columns = chunk.to(tl.int64) * CHUNK + start + tl.arange(0, C)
        mask = exists & (columns < cols)[None, :]
        offset = row * cols + columns[None, :]
        w = load_weight(w_ptr, seed_ptr, row, columns, cols, mask, noise_std, R, C, COMPUTE, NOISE, BY_EIGHT)
        g = from_element(tl.load(g_ptr + offset, mask, other=0.0), COMPUTE)
        beyond, slope = slopes_of(w, scale, zero, GRID)
        tl.store(dw_ptr + offset, to_element(tl.where(beyond, 0.0, g), dw_ptr.dtype.element_ty), mask)
        sum_s += tl.where(mask, g * slope, 0.0)
        if ZERO:
            sum_z += tl.where(beyond, g * -scale, 0.0)
    out = row * chunks + chunk
    factor = tl.full((), grad_scale, tl.float32)
    tl.store(ds_ptr + out, tl.sum(sum_s, 1)[:, None] * factor, exists)
    if ZERO:
        tl.store(dz_ptr + out, tl.sum(sum_z, 1)[:, None] * factor, exists)


@triton.jit
def sum_parts_kernel(parts_ptr, sums_ptr, rows, parts, grad_scale, R: tl.constexpr, C: tl.constexpr):
    """Sums of the rows of ``[rows, parts]`` times grad_scale, each in a fixed order."""
    row = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)[:, None]
    sums = tl.zeros((R, C), tl.float32)
    for start in range(0, parts, C):
        column = start + tl.arange(0, C)[None, :]
        sums += tl.load(parts_ptr + row * parts + column, (row < rows) & (column < parts), other=0.0)
    total = tl.sum(sums, 1)[:, None] * tl.full((), grad_scale, tl.float32)
    tl.store(sums_ptr + row, total, row < rows)


@triton.jit
def fake_quantize_jvp_kernel(
    w_ptr, tangent_w_ptr, tangent_scale_ptr, tangent_zero_ptr, y_ptr, value_ptr, scale_ptr, zero_ptr, seed_ptr, rows,
    cols, noise_std, scale_noise_std, chunks,
    GRID: tl.constexpr, COMPUTE: tl.constexpr, ZERO: tl.constexpr, NOISE: tl.constexpr, SCALE_NOISE: tl.constexpr,
    BY_EIGHT: tl.constexpr, ALONG_W: tl.constexpr, ALONG_S: tl.constexpr, ALONG_Z: tl.constexpr,
    VALUE: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    row, exists, chunk = rows_of_program(rows, chunks, R)
    scale, zero = load_scale(scale_ptr, zero_ptr, seed_ptr, row, exists, scale_noise_std, COMPUTE, ZERO, SCALE_NOISE)
    columns = chunk.to(tl.int64) * C + tl.arange(0, C)
    mask = exists & (columns < cols)[None, :]
    offset = row * cols + columns[None, :]
    w = load_weight(w_ptr, seed_ptr, row, columns, cols, mask, noise_std, R, C, COMPUTE, NOISE, BY_EIGHT)
    r = divide_rows(w, scale, True)
    beyond, slope = slopes_at(r, w, zero, GRID)
    if VALUE:
        value = value_of(code_of(w, r, zero, GRID), scale, zero, GRID)
        tl.store(value_ptr + offset, to_element(value, value_ptr.dtype.element_ty), mask)
    y = tl.zeros((R, C), COMPUTE)
    if ALONG_W:
        y = tl.where(beyond, 0.0, from_element(tl.load(tangent_w_ptr + offset, mask, other=0.0), COMPUTE))
    if ALONG_S:
        y += slope * tl.load(tangent_scale_ptr + row, exists, other=0.0).to(COMPUTE)
    if ALONG_Z:
        along = tl.load(tangent_zero_ptr + row, exists, other=0.0).to(COMPUTE)
        y += tl.where(beyond, -tl.broadcast_to(scale, y.shape), 0.0) * along
    tl.store(y_ptr + offset, to_element(y, y_ptr.dtype.element_ty), mask)


@launches("fake_quantize")
def fake_quantize_out(
    w: Tensor, scale: Tensor, zero_point: Tensor | None, seed: Tensor | None, grid: list[float],
    noise_std: float, scale_noise_std: float, grad_scale: float, dtype: torch.dtype | None, out: Tensor,
) -> None:  # fmt: skip
    """Write y. Arguments as the op's."""
    if w.numel() == 0:
        return
    args, constants = point(w, scale, zero_point, seed, grid, noise_std, scale_noise_std, w.dtype)
    # On an H100 noise on 16-bit weights takes 15% less time with the larger tile. Other calls take the same.
    elements = 2 * TILE_ELEMENTS if w.element_size() == 2 else TILE_ELEMENTS
    tiles = tiling(*shape_of(w, scale), chunk_columns=1, elements=elements)
    fake_quantize_fwd_kernel[(tiles.programs,)](
        w, out, *args, tiles.chunks, **constants, R=tiles.tile_rows, C=tiles.tile_cols
    )


@launches("fake_quantize_backward")
def fake_quantize_backward_out(
    g: Tensor, w: Tensor, scale: Tensor, zero_point: Tensor | None, seed: Tensor | None, grid: list[float],
    noise_std: float, scale_noise_std: float, grad_scale: float, dw: Tensor, ds: Tensor, dz: Tensor,
) -> None:  # fmt: skip
    """Write dw, ds and dz. Arguments as the op's."""
    if w.numel() == 0:
        ds.zero_()
        dz.zero_()
        return
    args, constants = point(w, scale, zero_point, seed, grid, noise_std, scale_noise_std, w.dtype)
    rows, cols = shape_of(w, scale)
    # On an H100 the larger tile takes 9% less time for 16-bit weights without noise, and 5% less for float32 with
    # noise. Other calls take up to 30% longer with it, short rows among them.
    larger = cols >= TILE_ELEMENTS and (w.element_size() == 2) != constants["NOISE"] and w.element_size() <= 4
    tiles = tiling(rows, cols, elements=2 * TILE_ELEMENTS if larger else TILE_ELEMENTS)
    wide = torch.float64 if w.dtype == torch.float64 else torch.float32
    direct = tiles.chunks == 1 and wide == torch.float32
    shape = (scale.numel(), tiles.chunks)
    partial_s = ds if direct else ds.new_empty(shape, dtype=wide)
    partial_z = dz if direct else ds.new_empty(shape if zero_point is not None else 0, dtype=wide)
    fake_quantize_bwd_kernel[(tiles.programs,)](
        w, g, dw, partial_s, partial_z, *args, tiles.chunks, grad_scale if direct else 1.0,
        **constants, R=tiles.tile_rows, C=tiles.tile_cols, CHUNK=tiles.chunk,
    )  # fmt: skip
    if not direct:
        _sum_parts(partial_s, grad_scale, ds)
        if zero_point is not None:
            _sum_parts(partial_z, grad_scale, dz)


def _sum_parts(parts: Tensor, grad_scale: float, out: Tensor) -> None:
    """Write the sums of rows times grad_scale, which a kernel would take as float32, also for float64."""
    if parts.dtype == torch.float64:
        out.copy_((parts.sum(-1) * grad_scale).view(out.shape))
        return
    rows, columns = parts.shape
    tile = min(1024, triton.next_power_of_2(columns))
    tile_rows = max(1, 256 // tile)
    sum_parts_kernel[(triton.cdiv(rows, tile_rows),)](
        parts, out, rows, columns, grad_scale, R=tile_rows, C=tile, num_warps=4
    )


def _tangent_out(
    tangent_w: Tensor | None, tangent_scale: Tensor | None, tangent_zero_point: Tensor | None,
    w: Tensor, scale: Tensor, zero_point: Tensor | None, seed: Tensor | None, grid: list[float],
    noise_std: float, scale_noise_std: float, grad_scale: float, *, out: Tensor, value: Tensor | None = None,
) -> None:  # fmt: skip
    if w.numel() == 0:
        return
    # grad_scale multiplies the tangents of the scales here. As a kernel argument it would be float32, also for float64.
    scaled = (None if t is None else t * grad_scale for t in (tangent_scale, tangent_zero_point))
    tangents = [scale if t is None else t for t in (tangent_w, *scaled)]
    args, constants = point(w, scale, zero_point, seed, grid, noise_std, scale_noise_std, w.dtype)
    tiles = tiling(*shape_of(w, scale), chunk_columns=1)
    fake_quantize_jvp_kernel[(tiles.programs,)](
        w, *tangents, out, out if value is None else value, *args, tiles.chunks, **constants,
        ALONG_W=tangent_w is not None, ALONG_S=tangent_scale is not None, ALONG_Z=tangent_zero_point is not None,
        VALUE=value is not None, R=tiles.tile_rows, C=tiles.tile_cols,
    )  # fmt: skip


@launches("fake_quantize_jvp")
def fake_quantize_jvp_out(*args: Any) -> None:
    """Write the tangent of y. Arguments as the op's."""
    _tangent_out(*args[:11], out=args[-1])


@launches("fake_quantize_dual")
def fake_quantize_dual_out(*args: Any) -> None:
    """Write y and its tangent. Arguments as the op's."""
    _tangent_out(*args[:11], out=args[-1], value=args[-2])
