"""Dynamic activation quantization in Triton: a program finds max(abs(x)) of each of its tokens, then quantizes."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ._element import OPTIONS, divide, divide_rows, from_element, round_half_even, select_high, select_low, to_element
from ._launchers import launches
from ._rows import compute_type, tiling


@triton.jit
def magnitude_bits(x):
    """The bits of abs(x) as an integer. They are ordered like the magnitudes; NaN is the largest."""
    if x.dtype == tl.float64:
        return x.to(tl.int64, bitcast=True) & 0x7FFFFFFFFFFFFFFF
    else:  # Triton also compiles what follows a return, so this must be a branch
        return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def token_scale(
    x_ptr, row, exists, column, cols, QMAX: tl.constexpr, COMPUTE: tl.constexpr, R: tl.constexpr, C: tl.constexpr
):
    """The scales ``[R, 1]`` of rows; NaN or infinite if an element is."""
    most = magnitude_bits(tl.zeros((R, C), COMPUTE))
    for start in range(0, cols, C):
        mask = exists & (start + column < cols)
        x = from_element(tl.load(x_ptr + row * cols + start + column, mask, other=0.0), COMPUTE)
        most = tl.maximum(most, magnitude_bits(x))
    largest = tl.max(most, 1)[:, None].to(COMPUTE, bitcast=True)
    scale = divide(largest, tl.full(largest.shape, QMAX, COMPUTE))
    return select_low(scale, tl.full(scale.shape, 1.1754943508222875e-38, COMPUTE))


@triton.jit
def fake_quantize_dynamic_kernel(
    x_ptr, y_ptr, rows, cols, QMAX: tl.constexpr, COMPUTE: tl.constexpr, R: tl.constexpr, C: tl.constexpr
):
    row = (tl.program_id(0).to(tl.int64) * R + tl.arange(0, R))[:, None]
    exists = row < rows
    column = tl.arange(0, C)[None, :]
    scale = token_scale(x_ptr, row, exists, column, cols, QMAX, COMPUTE, R, C)
    for start in range(0, cols, C):
        mask = exists & (start + column < cols)
        x = from_element(tl.load(x_ptr + row * cols + start + column, mask, other=0.0), COMPUTE)
        r = divide_rows(x, scale, False)
        limit = tl.full(r.shape, QMAX, COMPUTE)
        y = (round_half_even(select_high(select_low(r, -limit), limit)) + 0.0) * scale
        tl.store(y_ptr + row * cols + start + column, to_element(y, y_ptr.dtype.element_ty), mask)


@launches("fake_quantize_dynamic")
def fake_quantize_dynamic_out(x: Tensor, bits: int, out: Tensor) -> None:
    """Write y. Arguments as the op's."""
    if x.numel() == 0:
        return
    rows, cols = x.numel() // x.shape[-1], x.shape[-1]
    tiles = tiling(rows, cols)
    fake_quantize_dynamic_kernel[(triton.cdiv(rows, tiles.tile_rows),)](
        x, out, rows, cols, QMAX=2.0 ** (bits - 1) - 1, COMPUTE=compute_type(x.dtype),
        R=tiles.tile_rows, C=tiles.tile_cols, **OPTIONS,
    )  # fmt: skip
