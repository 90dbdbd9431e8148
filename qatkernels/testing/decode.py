"""Calls of lowbit_linear with few tokens, and how far a result may be from the exact one where x becomes integers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import grids
from ..grids import MIN_SCALE, Grid
from ..ops import PackedWeight
from .compare import meaning
from .samples import MANY

GRIDS = (
    grids.binary(), grids.ternary(), grids.seq(2), grids.seq(7), grids.seq(8),
    *(grids.lsq(bits) for bits in range(2, 9)), *(grids.affine(bits) for bits in (2, 3, 4, 8)),
)  # fmt: skip


def make(
    grid: Grid,
    tokens: int,
    rows: int,
    cols: int,
    group_size: int | None = None,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cpu",
    scale_dtype: torch.dtype = torch.float32,
    bias: torch.dtype | None = None,
    act_bits: int | None = None,
) -> tuple[Any, ...]:
    """Return arguments of lowbit_linear: every code occurs, x has columns of different size."""
    where = device if rows * cols >= MANY else "cpu"
    generator = torch.Generator().manual_seed(rows * cols + tokens)
    there = torch.Generator(where).manual_seed(rows * cols + tokens)
    codes = torch.randint(grid.code_min, grid.code_max + 1, (rows, cols), generator=there, device=where)
    codes = codes.to(grid.code_dtype)
    groups = 1 if group_size is None else cols // group_size
    scale = (0.01 * (0.5 + torch.rand(rows, groups, generator=generator))).to(scale_dtype)
    zero = None
    if grid.has_zero_point:
        zero = torch.randint(0, grid.code_max + 1, (rows, groups), generator=generator) + 0.25
    packed = torch.ops.qatkernels.pack(codes, grid.code_min, grid.storage_bits)
    w = PackedWeight(packed.cpu(), scale, zero, grid, cols).to(device)
    x = torch.randn(tokens, cols, generator=generator) * torch.exp(torch.randn(cols, generator=generator))
    b = None if bias is None else torch.randn(rows, generator=generator).to(device, bias)
    return (
        x.to(device, dtype), w.packed, w.scale, w.zero_point, b, None, list(grid.constants), grid.code_min, w.bits,
        act_bits,
    )  # fmt: skip


def reference(args: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
    """Return the result in float64 and the error that the arithmetic explains.

    Without act_bits x has an error of 2^-22.9 of its token's largest number, and integers, scales and their products
    are rounded a few times to float32. Both count in the magnitude of the numbers that are added: a code centered in
    its range plus what is added for the zero point. Sums over groups are added one after the other by a warp, then over
    warps; in groups that are not multiples of 32 perhaps element by element.
    """
    x, packed, scale, zero, bias, _, grid, code_min, bits, act_bits = args
    cols, wide = x.shape[-1], x.double()
    steps, offset = grid[1], grid[2]
    codes = meaning("unpack", packed, code_min, bits, cols)[0].double()
    group = cols // scale.shape[-1]
    step = (scale.float().clamp_min(MIN_SCALE) / steps).double().repeat_interleave(group, -1)
    shift = torch.full_like(step, offset)
    if zero is not None:
        shift = shift - zero.double().repeat_interleave(group, -1)
    w = (codes + shift) * step
    unit = torch.finfo(torch.float32).eps / 2
    half = 2 ** (bits - 1)
    magnitude = ((codes - code_min - half).abs() + (code_min + half + shift).abs() + 1) * step
    error_of_x = 2**-22.9 * wide.abs().amax(-1, keepdim=True)
    if act_bits is not None:
        wide = meaning("fake_quantize_dynamic", x.float(), act_bits)[0].double()
        error_of_x = 4 * unit * wide.abs()
    sequential = 16 + (scale.shape[-1] if group % 32 == 0 or group == cols else cols // 8)
    bound = sequential * unit * (wide.abs() @ magnitude.T) + error_of_x.expand_as(wide) @ w.abs().T
    y = wide @ w.T
    if bias is not None:
        y = y + bias.double()
    half_place = torch.finfo(x.dtype).eps / 2
    return y, bound + (half_place * (1 + 2**-10) + unit) * y.abs() + torch.finfo(x.dtype).tiny
