"""Quantizes to integer codes and back, in Triton."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._element import code_of, divide_rows, from_element, to_element, value_of
from ._launchers import launches
from ._rows import load_scale, point, rows_of_program, shape_of, tiling


@triton.jit
def quantize_kernel(
    w_ptr, codes_ptr, scale_ptr, zero_ptr, seed_ptr, rows, cols, noise_std, scale_noise_std, chunks,
    GRID: tl.constexpr, COMPUTE: tl.constexpr, ZERO: tl.constexpr, NOISE: tl.constexpr, SCALE_NOISE: tl.constexpr,
    BY_EIGHT: tl.constexpr, CODE_MIN: tl.constexpr, CODE_MAX: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    row, exists, chunk = rows_of_program(rows, chunks, R)
    scale, zero = load_scale(scale_ptr, zero_ptr, seed_ptr, row, exists, scale_noise_std, COMPUTE, ZERO, SCALE_NOISE)
    columns = chunk.to(tl.int64) * C + tl.arange(0, C)
    mask = exists & (columns < cols)[None, :]
    offset = row * cols + columns[None, :]
    w = from_element(tl.load(w_ptr + offset, mask, other=0.0), COMPUTE)
    code = code_of(w, divide_rows(w, scale, False), zero, GRID)
    code = tl.where(code == code, code, 0.0)
    code = tl.minimum(tl.maximum(code, CODE_MIN), CODE_MAX)
    tl.store(codes_ptr + offset, code.to(tl.int32).to(codes_ptr.dtype.element_ty), mask)


@triton.jit
def dequantize_kernel(
    codes_ptr, y_ptr, scale_ptr, zero_ptr, seed_ptr, rows, cols, noise_std, scale_noise_std, chunks,
    GRID: tl.constexpr, COMPUTE: tl.constexpr, ZERO: tl.constexpr, NOISE: tl.constexpr, SCALE_NOISE: tl.constexpr,
    BY_EIGHT: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    row, exists, chunk = rows_of_program(rows, chunks, R)
    scale, zero = load_scale(scale_ptr, zero_ptr, seed_ptr, row, exists, scale_noise_std, COMPUTE, ZERO, SCALE_NOISE)
    columns = chunk.to(tl.int64) * C + tl.arange(0, C)
    mask = exists & (columns < cols)[None, :]
    offset = row * cols + columns[None, :]
    codes = tl.load(codes_ptr + offset, mask, other=0).to(COMPUTE)
    y = value_of(codes, scale, zero, GRID)
    tl.store(y_ptr + offset, to_element(y, y_ptr.dtype.element_ty), mask)


@launches("quantize")
def quantize_out(
    w: Tensor, scale: Tensor, zero_point: Tensor | None, grid: list[float], code_min: int, code_max: int, out: Tensor
) -> None:
    """Write the codes. Arguments as the op's."""
    if w.numel() == 0:
        return
    args, constants = point(w, scale, zero_point, None, grid, 0.0, 0.0, w.dtype)
    tiles = tiling(*shape_of(w, scale), chunk_columns=1)
    quantize_kernel[(tiles.programs,)](
        w, out, *args, tiles.chunks, **constants,
        CODE_MIN=code_min, CODE_MAX=code_max, R=tiles.tile_rows, C=tiles.tile_cols,
    )  # fmt: skip


@launches("dequantize")
def dequantize_out(
    codes: Tensor, scale: Tensor, zero_point: Tensor | None, grid: list[float], dtype: torch.dtype, out: Tensor
) -> None:
    """Write the weights. Arguments as the op's."""
    if codes.numel() == 0:
        return
    args, constants = point(codes, scale, zero_point, None, grid, 0.0, 0.0, dtype)
    tiles = tiling(*shape_of(codes, scale), chunk_columns=1)
    dequantize_kernel[(tiles.programs,)](
        codes, out, *args, tiles.chunks, **constants, R=tiles.tile_rows, C=tiles.tile_cols
    )
