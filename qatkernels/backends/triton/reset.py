"""The reset of WinQ in Triton: one read and one write of the weight."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ._element import code_of, divide_rows, from_element, to_element, value_of
from ._launchers import launches
from ._rows import load_scale, point, rows_of_program, shape_of, tiling


@triton.jit
def reset_kernel(
    w_ptr, scale_ptr, zero_ptr, seed_ptr, rows, cols, noise_std, scale_noise_std, chunks,
    GRID: tl.constexpr, COMPUTE: tl.constexpr, ZERO: tl.constexpr, NOISE: tl.constexpr, SCALE_NOISE: tl.constexpr,
    BY_EIGHT: tl.constexpr, KEEP: tl.constexpr, MOVE: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    row, exists, chunk = rows_of_program(rows, chunks, R)
    scale, zero = load_scale(scale_ptr, zero_ptr, seed_ptr, row, exists, scale_noise_std, COMPUTE, ZERO, SCALE_NOISE)
    columns = chunk.to(tl.int64) * C + tl.arange(0, C)
    mask = exists & (columns < cols)[None, :]
    offset = row * cols + columns[None, :]
    element = tl.load(w_ptr + offset, mask, other=0.0)
    w = from_element(element, COMPUTE)
    code = code_of(w, divide_rows(w, scale, False), zero, GRID)
    y = value_of(code, scale, zero, GRID)
    moved = to_element(w * tl.full((), KEEP, COMPUTE) + y * tl.full((), MOVE, COMPUTE), w_ptr.dtype.element_ty)
    again = from_element(moved, COMPUTE)
    same = code_of(again, divide_rows(again, scale, False), zero, GRID) == code
    tl.store(w_ptr + offset, tl.where(same, moved, element), mask)


@launches("reset_")
def reset_(w: Tensor, scale: Tensor, zero_point: Tensor | None, grid: list[float], quantized_weight: float) -> None:
    """Move w towards its levels, in place. Arguments as the op's."""
    if w.numel() == 0:
        return
    args, constants = point(w, scale, zero_point, None, grid, 0.0, 0.0, w.dtype)
    tiles = tiling(*shape_of(w, scale), chunk_columns=1)
    reset_kernel[(tiles.programs,)](
        w, *args, tiles.chunks, **constants, KEEP=1 - quantized_weight, MOVE=quantized_weight,
        R=tiles.tile_rows, C=tiles.tile_cols,
    )  # fmt: skip
