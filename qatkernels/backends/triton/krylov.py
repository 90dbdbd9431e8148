"""One pass of Gram-Schmidt in Triton. All rows of a block of columns are in registers, so the basis is read once.

Two tiles are being loaded while one is summed. With up to 128 rows a thread uses at most 128 registers, so four blocks
fit a multiprocessor and 64 KiB are in flight; 20 KiB would saturate the memory. These figures are from the machine
code. Nothing was measured on a GPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._element import OPTIONS, from_element
from ._launchers import launches

TILE_ELEMENTS = 2048
WARP_ELEMENTS = 512  # elements of a tile for each warp
LEAST_COLUMNS = 16  # of a tile, 32 bytes of bfloat16, the least that memory moves
MOST_ROWS = 256  # of a tile
MOST_PROGRAMS = 528  # whose partial sums are added afterwards: four for each multiprocessor of an H100


# The number of rows is not specialized: Lanczos has another one at each step.
@triton.jit(do_not_specialize=["rows"])
def gram_schmidt_kernel(
    basis_ptr, w_ptr, h_ptr, w_new_ptr, partial_ptr, rows, cols, stride,
    UPDATE: tl.constexpr, DOT: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    row = tl.arange(0, R).to(tl.int64)
    there = row < rows
    sums = tl.zeros((R, C), tl.float64)
    squares = tl.zeros((C,), tl.float64)
    h = tl.zeros((R,), tl.float64)
    if UPDATE:
        h = tl.load(h_ptr + row, there, other=0.0)
    first = tl.program_id(0).to(tl.int64) * C
    for start in tl.range(first, cols, stride, num_stages=3):
        columns = start + tl.arange(0, C)
        mask = columns < cols
        w = tl.load(w_ptr + columns, mask, other=0.0).to(tl.float64)
        tile = tl.load(basis_ptr + row[:, None] * cols + columns[None, :], there[:, None] & mask[None, :], other=0.0)
        b = from_element(tile, tl.float64)
        if UPDATE:
            w -= tl.sum(h[:, None] * b, 0)
        rounded = w.to(w_new_ptr.dtype.element_ty)
        tl.store(w_new_ptr + columns, rounded, mask)
        w = rounded.to(tl.float64)
        if DOT:
            sums += b * w[None, :]
            squares += w * w
    if DOT:
        out = partial_ptr + tl.program_id(0).to(tl.int64) * (rows + 1)
        tl.store(out + row, tl.sum(sums, 1), there)
        tl.store(out + rows, tl.sum(squares, 0))


def _launch(basis: Tensor, w: Tensor, h: Tensor | None, w_new: Tensor, partial: Tensor | None) -> None:
    rows, cols = basis.shape
    tile_rows = triton.next_power_of_2(max(rows, 1))
    tile_cols = _columns(rows)
    options = OPTIONS | {"num_warps": tile_rows * tile_cols // WARP_ELEMENTS}
    programs = _programs(rows, cols)
    gram_schmidt_kernel[(programs,)](
        basis, w, w if h is None else h, w_new, w if partial is None else partial, rows, cols, programs * tile_cols,
        UPDATE=h is not None, DOT=partial is not None, R=tile_rows, C=tile_cols, **options,
    )  # fmt: skip


def _columns(rows: int) -> int:
    return max(TILE_ELEMENTS // triton.next_power_of_2(max(rows, 1)), LEAST_COLUMNS)


def _programs(rows: int, cols: int) -> int:
    return min(triton.cdiv(cols, _columns(rows)), MOST_PROGRAMS)


@launches("gram_schmidt")
def gram_schmidt_out(basis: Tensor, w: Tensor, h: Tensor | None, w_new: Tensor, dots: Tensor, sq: Tensor) -> None:
    """Write w_new, dots and sq. Arguments as the op's. More than 256 rows take two passes, the update first."""
    h = None if h is None else h.to(torch.float64)
    parts = range(0, max(basis.shape[0], 1), MOST_ROWS)
    if len(parts) > 1 and h is not None:
        exact = w.new_empty(w.shape, dtype=torch.float64)  # rounded once, at the end
        for i in parts:
            last = i == parts[-1]
            _launch(basis[i : i + MOST_ROWS], w, h[i : i + MOST_ROWS], w_new if last else exact, None)
            w = w_new if last else exact
        h = None
    for i in parts:
        part = basis[i : i + MOST_ROWS]
        partial = dots.new_empty(_programs(part.shape[0], w.numel()), part.shape[0] + 1)
        if w.numel():
            _launch(part, w, h, w_new, partial)
        total = partial.sum(0)
        dots[i : i + MOST_ROWS].copy_(total[:-1])
        sq.copy_(total[-1])
