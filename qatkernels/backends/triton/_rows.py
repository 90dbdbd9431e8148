"""Tiling of a weight: rows that share a scale, times columns. It depends on the shape only."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._element import (
    MIN_SCALE,
    OPTIONS,
    SCALE_STREAM,
    constant,
    from_element,
    normals_each,
    normals_of_tile,
    select_low,
)  # fmt: skip

TILE_ELEMENTS = 4096  # four 16-byte accesses of float32 for each thread of eight warps
CHUNK_COLUMNS = 16384  # columns that one program reduces


class Tiling(NamedTuple):
    """Tiles ``[tile_rows, tile_cols]``. A program processes ``chunk`` columns of its rows."""

    tile_rows: int
    tile_cols: int
    chunk: int
    chunks: int  # programs along a row
    programs: int


def tiling(rows: int, cols: int, chunk_columns: int = CHUNK_COLUMNS, elements: int = TILE_ELEMENTS) -> Tiling:
    """Return the tiling of a weight, with so many elements in a tile."""
    tile_cols = min(triton.next_power_of_2(max(cols, 8)), elements)
    tile_rows = elements // tile_cols
    chunk = max(tile_cols, min(chunk_columns, triton.cdiv(cols, tile_cols) * tile_cols))
    chunks = triton.cdiv(cols, chunk)
    return Tiling(tile_rows, tile_cols, chunk, chunks, triton.cdiv(rows, tile_rows) * chunks)


def shape_of(w: Tensor, scale: Tensor) -> tuple[int, int]:
    """Return (rows, cols)."""
    rows = scale.numel()
    return rows, (w.numel() // rows if rows else 0)


def compute_type(dtype: torch.dtype) -> Any:
    """Return the Triton dtype of computations with a weight."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def point(
    w: Tensor, scale: Tensor, zero_point: Tensor | None, seed: Tensor | None,
    grid: list[float], noise_std: float, scale_noise_std: float, dtype: torch.dtype,
) -> tuple[tuple[Any, ...], dict[str, Any]]:  # fmt: skip
    """Return the arguments that all kernels of the family share: run-time ones, and compile-time ones by name.

    An absent tensor is replaced by the scale. Compile-time flags prevent that it is read.
    """
    rows, cols = shape_of(w, scale)
    noisy, scale_noisy = seed is not None and noise_std != 0, seed is not None and scale_noise_std != 0
    pointers = (scale, scale if zero_point is None else zero_point, scale if seed is None else seed)
    constants = {
        "GRID": tuple(grid),
        "COMPUTE": compute_type(dtype),
        "ZERO": zero_point is not None,
        "NOISE": noisy,
        "SCALE_NOISE": scale_noisy,
        "BY_EIGHT": cols % 8 == 0,
    }
    return (*pointers, rows, cols, noise_std, scale_noise_std), constants | OPTIONS


@triton.jit
def rows_of_program(rows, chunks, R: tl.constexpr):
    """The rows of this program ``[R, 1]``, a mask of those that exist, and the program's chunk."""
    program = tl.program_id(0)
    row = (program // chunks).to(tl.int64) * R + tl.arange(0, R)
    return row[:, None], row[:, None] < rows, program % chunks


@triton.jit
def load_scale(
    scale_ptr, zero_ptr, seed_ptr, row, exists, scale_noise_std,
    COMPUTE: tl.constexpr, ZERO: tl.constexpr, SCALE_NOISE: tl.constexpr,
):  # fmt: skip
    """The scales of rows (with noise, at least MIN_SCALE) and their zero points, ``[R, 1]``."""
    scale = tl.load(scale_ptr + row, exists, other=1.0).to(COMPUTE)
    if SCALE_NOISE:
        drawn = normals_each(tl.load(seed_ptr), row, SCALE_STREAM)
        scale += (drawn * tl.full((), scale_noise_std, tl.float32)).to(COMPUTE)
    scale = select_low(scale, constant(MIN_SCALE, scale))
    zero = tl.zeros(scale.shape, COMPUTE)
    if ZERO:
        zero = tl.load(zero_ptr + row, exists, other=0.0).to(COMPUTE)
    return scale, zero


@triton.jit
def load_weight(
    w_ptr, seed_ptr, row, columns, cols, mask, noise_std,
    R: tl.constexpr, C: tl.constexpr, COMPUTE: tl.constexpr, NOISE: tl.constexpr, BY_EIGHT: tl.constexpr,
):  # fmt: skip
    """A tile of the weight, with its noise."""
    w = from_element(tl.load(w_ptr + row * cols + columns[None, :], mask, other=0.0), COMPUTE)
    if NOISE:
        drawn = normals_of_tile(tl.load(seed_ptr), row * cols, columns, R, C, BY_EIGHT)
        w += (drawn * tl.full((), noise_std, tl.float32)).to(COMPUTE)
    return w
