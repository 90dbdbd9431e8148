"""Calls of lowbit_linear with few tokens, and an error bound for kernels that convert activations to integers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import grids
from ..arithmetic import quotient
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
    """Return arguments of lowbit_linear. Codes are uniformly distributed; columns of x differ in magnitude."""
    code_device = device if rows * cols >= MANY else "cpu"
    generator = torch.Generator().manual_seed(rows * cols + tokens)
    code_generator = torch.Generator(code_device).manual_seed(rows * cols + tokens)
    codes = torch.randint(grid.code_min, grid.code_max + 1, (rows, cols), generator=code_generator, device=code_device)
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
    """Return the exact result in float64, and a bound of the error of a kernel.

    Without act_bits, kernels may convert x to integers with an error of 2^-22.9 times the largest number of the token.
    Integers, scales and their products are rounded to float32 a few times. Both errors are relative to the magnitude of
    the numbers that are added: a code centered in its range, plus the correction for the zero point. A warp adds the
    sums of its groups sequentially, and then warps are added. If groups are not multiples of 32, it may add element by
    element.
    """
    x, packed, scale, zero, bias, _, grid, code_min, bits, act_bits = args
    cols, wide = x.shape[-1], x.double()
    steps, offset = grid[1], grid[2]
    codes = meaning("unpack", packed, code_min, bits, cols)[0].double()
    group = cols // scale.shape[-1]
    step = quotient(scale.float().clamp_min(MIN_SCALE), steps).double().repeat_interleave(group, -1)
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
