"""Products of tokens with their experts' weights in Triton: one launch for any distribution of the tokens.

Offsets are read on the device in every dtype, so no launch waits for them. The grid has enough programs for every
possible distribution. Each program searches the offsets for its expert and tile. At most one program for each expert
and column of tiles has nothing to do. Sums are float32 (float64 for float64), in an order that depends only on shapes
and offsets. Strides are arbitrary.

The floor of each of the three over the n tokens that have an expert is 2 n N K operations at the rate of the tensor
cores, or the bytes that must move, whichever takes longer: tokens in and out, and the weights of the experts that have
tokens (for `grouped_outer` the weights of all experts, since those without tokens are written as zeros). A partial last
tile costs as much as a full one: with t tokens and tiles of R rows at best t / (R ceil(t / R)) of the rate is reached.
For float32 it is the rate of ordinary multiply-adds, because tensor cores would round; float64 has tensor cores on
Ampere and Hopper.

The tilings were not tuned on a GPU. On an H100 the products reach half of the floor at best (docs/benchmarks.md).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._element import INTERPRETED, to_element
from ._launchers import launches


@dataclass(frozen=True)
class Config:
    """A tiling: rows, columns and depth of a tile, warps, and stages of its pipeline."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


#: Tilings by the maximum number of tokens of an expert on average. The first that is large enough is used.
CONFIGS: tuple[tuple[float, Config], ...] = (
    (32, Config(16, 128, 64, 4, 4)),
    (128, Config(64, 128, 64, 4, 4)),
    (float("inf"), Config(128, 128, 64, 8, 3)),
)


#: Tilings of float32 and float64, for any number of tokens.
WIDE = {torch.float32: Config(64, 64, 32, 4, 3), torch.float64: Config(32, 32, 16, 4, 2)}


def choose(tokens: int, experts: int, dtype: torch.dtype) -> Config:
    """Return the tiling for a number of tokens."""
    if dtype in WIDE:
        return WIDE[dtype]
    return next(config for limit, config in CONFIGS if tokens <= limit * max(experts, 1))


@triton.jit
def multiply(a, b, acc):
    """Return acc + a @ b in the dtype of acc. The interpreter cannot multiply bfloat16, so it gets other operands."""
    if INTERPRETED:
        a, b = a.to(acc.dtype), b.to(acc.dtype)
    return tl.dot(a, b, acc, input_precision="ieee", out_dtype=acc.dtype)


@triton.jit
def no_sum(y_ptr, R: tl.constexpr, C: tl.constexpr):
    """A tile of zeros, in the dtype in which products for an output are summed."""
    return tl.zeros((R, C), tl.float64 if y_ptr.dtype.element_ty == tl.float64 else tl.float32)


@triton.jit
def grouped_rows_kernel(
    x_ptr, w_ptr, ends_ptr, y_ptr, tokens, outputs, depth, experts,
    x_row, x_column, w_expert, w_output, w_depth,
    R: tl.constexpr, C: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    start, first, last, expert = 0, 0, 0, -1
    for e in range(experts):
        end = tl.maximum(
            tl.minimum(tl.load(ends_ptr + e), tokens), start
        )  # wrong offsets must not lead to accesses outside the tensors
        tiles = tl.cdiv(end - start, R)
        mine = (expert < 0) & (tile < tiles)
        first = tl.where(mine, start + tile * R, first)
        last = tl.where(mine, end, last)
        expert = tl.where(mine, e, expert)
        tile = tl.where(expert < 0, tile - tiles, tile)
        start = end
    first = tl.where(expert < 0, start + tile * R, first)  # unassigned rows
    last = tl.where(expert < 0, tokens, last)
    row = tl.cast(first, tl.int64) + tl.arange(0, R)
    column = tl.program_id(1).to(tl.int64) * C + tl.arange(0, C)
    acc = no_sum(y_ptr, R, C)
    if expert >= 0:
        k = tl.arange(0, D)
        x = x_ptr + row[:, None] * x_row + k[None, :].to(tl.int64) * x_column
        w = (
            w_ptr
            + tl.cast(expert, tl.int64) * w_expert
            + column[None, :] * w_output
            + k[:, None].to(tl.int64) * w_depth
        )
        for done in range(0, depth, D):
            inside = k < depth - done
            a = tl.load(x, (row < last)[:, None] & inside[None, :], other=0.0)
            b = tl.load(w, (column < outputs)[None, :] & inside[:, None], other=0.0)
            acc = multiply(a, b, acc)
            x += D * x_column
            w += D * w_depth
    inside = (row < last)[:, None] & (column < outputs)[None, :]
    tl.store(y_ptr + row[:, None] * outputs + column[None, :], to_element(acc, y_ptr.dtype.element_ty), inside)


@triton.jit
def grouped_outer_kernel(
    g_ptr, x_ptr, ends_ptr, w_ptr, tokens, rows, columns, g_row, g_column, x_row, x_column,
    R: tl.constexpr, C: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    expert = tl.program_id(0)
    start = tl.maximum(tl.load(ends_ptr + expert - 1, expert > 0, other=0), 0)
    end = tl.minimum(tl.load(ends_ptr + expert), tokens)
    row = tl.program_id(1).to(tl.int64) * R + tl.arange(0, R)
    column = tl.program_id(2).to(tl.int64) * C + tl.arange(0, C)
    token = start.to(tl.int64) + tl.arange(0, D)
    g = g_ptr + row[:, None] * g_column + token[None, :] * g_row
    x = x_ptr + token[:, None] * x_row + column[None, :] * x_column
    acc = no_sum(w_ptr, R, C)
    for done in range(start, end, D):
        inside = tl.arange(0, D) < end - done
        a = tl.load(g, (row < rows)[:, None] & inside[None, :], other=0.0)
        b = tl.load(x, (column < columns)[None, :] & inside[:, None], other=0.0)
        acc = multiply(a, b, acc)
        g += D * g_row
        x += D * x_row
    w = w_ptr + (expert.to(tl.int64) * rows + row[:, None]) * columns + column[None, :]
    tl.store(w, to_element(acc, w_ptr.dtype.element_ty), (row < rows)[:, None] & (column < columns)[None, :])


def _rows(x: Tensor, w: Tensor, offsets: Tensor, out: Tensor, output: int, depth: int) -> None:
    """Multiply. ``output`` is the dimension of w that is kept, ``depth`` the one that is summed over."""
    tokens, experts, outputs = x.shape[0], w.shape[0], w.shape[output]
    if out.numel() == 0:
        return
    config = choose(tokens, experts, x.dtype)
    # One more tile for each expert, whose last tile may be partial, and one for the unassigned rows.
    grid = (triton.cdiv(tokens, config.rows) + experts + 1, triton.cdiv(outputs, config.columns))
    grouped_rows_kernel[grid](
        x, w, offsets, out, tokens, outputs, w.shape[depth], experts,
        *x.stride(), w.stride(0), w.stride(output), w.stride(depth),
        R=config.rows, C=config.columns, D=config.depth, num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip


@launches("grouped_linear")
def grouped_linear_out(x: Tensor, w: Tensor, offsets: Tensor, out: Tensor) -> None:
    """Write y. Arguments as the op's."""
    _rows(x, w, offsets, out, 1, 2)


@launches("grouped_linear_transposed")
def grouped_linear_transposed_out(g: Tensor, w: Tensor, offsets: Tensor, out: Tensor) -> None:
    """Write x. Arguments as the op's."""
    _rows(g, w, offsets, out, 2, 1)


@launches("grouped_outer")
def grouped_outer_out(g: Tensor, x: Tensor, offsets: Tensor, out: Tensor) -> None:
    """Write w. Arguments as the op's."""
    experts, rows, columns = out.shape
    if out.numel() == 0:
        return
    config = WIDE.get(g.dtype, CONFIGS[-1][1])
    grid = (experts, triton.cdiv(rows, config.rows), triton.cdiv(columns, config.columns))
    grouped_outer_kernel[grid](
        g, x, offsets, out, g.shape[0], rows, columns, *g.stride(), *x.stride(),
        R=config.rows, C=config.columns, D=config.depth, num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip
