"""Expected results of products with a packed weight, in float64, with the error bound of float32 sums.

A kernel may add in any order. It may multiply unsigned codes, and correct for their offset with the sum of x. It may
apply scales and zero points to each weight or to sums. It must not round the weight to 16 bits.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import cycle
from typing import Any

import torch
from torch import Tensor

from .. import grids
from ..arithmetic import quotient
from ..grids import MIN_SCALE, Grid
from ..ops.contract import FLOATS
from ..ops.packed_weight import PackedWeight
from ..ops.packing import SCALES

#: Grids with every bit width of a stored code and every kind of offset.
GRIDS = [
    grids.binary(), grids.ternary(), *map(grids.seq, (2, 3, 4, 8)), *map(grids.lsq, (2, 3, 4, 5, 6, 7, 8)),
    *map(grids.affine, (2, 3, 4, 8)),
]  # fmt: skip
GRID_IDS = [f"{g.scheme}{g.bits}" for g in GRIDS]

#: Roundings of a weight: scale / steps, offset - zero point, their sum with the code, the product.
WEIGHT_ROUNDINGS = 4
SINGLE = torch.finfo(torch.float32).eps / 2


@lru_cache(maxsize=128)
def scaled_weight(
    grid: Grid,
    shape: tuple[int, ...],
    group_size: int | None = None,
    scale_dtype: torch.dtype = torch.float32,
    zero: str | None = None,
    seed: int = 0,
) -> PackedWeight:
    """Return a packed weight whose codes reach the smallest and the largest code of the grid.

    Args:
        grid: the grid.
        shape: shape of the weight.
        group_size: number of weights that share a scale; None for one scale per row.
        scale_dtype: dtype of the stored scales.
        zero: zero points: None for none, ``"integral"`` or ``"any"``.
        seed: seed of the weights.
    """
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(shape, generator=generator) * 0.02
    if w.numel() == 0:
        scale = torch.full(shape[:-1], 0.01)
    else:
        scale = grid.init_scale(w, group_size) * (0.3 + torch.rand(shape[:-1], generator=generator)).view(
            shape[:-1] + (() if group_size is None else (1,))
        )
    point = None
    if zero is not None:
        point = torch.full_like(scale, 0.4 * grid.code_max).round()
        if zero == "any":
            point = point + torch.rand(point.shape, generator=generator) - 0.5
    return PackedWeight.from_float(w, scale, grid, group_size, zero_point=point, scale_dtype=scale_dtype)


def replaced(weight: PackedWeight, **parts: Tensor | None) -> PackedWeight:
    """Return a packed weight with some of its tensors replaced."""
    tensors: dict[str, Any] = {name: getattr(weight, name) for name in ("packed", "scale", "zero_point")} | parts
    return PackedWeight(**tensors, grid=weight.grid, cols=weight.cols)


def activations(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 1) -> Tensor:
    """Return normal numbers with one large feature, as real activations often have."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    if x.numel():
        x[..., x.shape[-1] // 2] *= 8
    return x.to(dtype)


@lru_cache(maxsize=128)
def wide_weight(weight: PackedWeight) -> tuple[Tensor, Tensor]:
    """Return the weight in float64, and its magnitude if unsigned code and offset are multiplied separately."""
    grid, codes = weight.grid, weight.codes().double()
    scale = quotient(weight.scale.float().clamp_min(MIN_SCALE).double(), grid.steps)
    shift = grid.offset + grid.code_min + torch.zeros_like(scale)
    if weight.zero_point is not None:
        shift = shift - weight.zero_point.double()

    def spread(t: Tensor) -> Tensor:
        return t.repeat_interleave(weight.group_size, -1) if weight.cols else t[..., :0]

    unsigned = codes - grid.code_min
    return (unsigned + spread(shift)) * spread(scale), (unsigned + spread(shift).abs()) * spread(scale)


def quantized_activation(x: Tensor, bits: int | None) -> Tensor:
    """Return x quantized to symmetric integers times a scale per token, exactly, in float64."""
    if bits is None or x.numel() == 0:
        return x.double()
    values = x if x.dtype == torch.float64 else x.float()
    largest = values.abs().amax(-1, keepdim=True)
    scale = quotient(largest, 2 ** (bits - 1) - 1).clamp_min(torch.finfo(torch.float32).tiny)
    return torch.round(values / scale).double() * scale.double()


def by_expert(x: Tensor, w: Tensor, offsets: Tensor | None) -> Tensor:
    """Return x w^T in float64, expert by expert; unassigned rows are 0."""
    if offsets is None:
        return x @ w.mT
    y = x.new_zeros(x.shape[0], w.shape[-2])
    start = 0
    for e, end in enumerate(offsets.tolist()):
        y[start:end] = x[start:end] @ w[e].mT
        start = end
    return y


def rounded_bound(y: Tensor, error: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the error bound of y after rounding to a dtype; ``error`` is the bound before."""
    info = torch.finfo(dtype)
    return error + (y.abs() + error) * (info.eps / 2) + info.smallest_normal * info.eps / 2


def sum_error(terms: int, dtype: torch.dtype) -> float:
    """Return the error bound of a sum of products with weights, relative to the sum of magnitudes."""
    unit = torch.finfo(torch.float64).eps / 2 if dtype == torch.float64 else SINGLE
    return (terms + 3) * unit + WEIGHT_ROUNDINGS * SINGLE


def expected_linear(
    x: Tensor,
    weight: PackedWeight,
    bias: Tensor | None = None,
    offsets: Tensor | None = None,
    act_bits: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the result of ``lowbit_linear`` in float64, and the error bound of a kernel."""
    w, magnitude = wide_weight(weight)
    values = quantized_activation(x, act_bits)
    y, size = by_expert(values, w, offsets), by_expert(values.abs(), magnitude, offsets)
    if bias is not None:
        y, size = y + bias.double(), size + bias.double().abs()
    return y, rounded_bound(y, sum_error(weight.cols, x.dtype) * size, x.dtype)


def expected_transposed(g: Tensor, weight: PackedWeight, offsets: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return the result of ``lowbit_linear_transposed`` in float64, and the error bound of a kernel."""
    w, magnitude = wide_weight(weight)
    x, size = by_expert(g.double(), w.mT, offsets), by_expert(g.double().abs(), magnitude.mT, offsets)
    return x, rounded_bound(x, sum_error(weight.shape[-2], g.dtype) * size, g.dtype)


@dataclass(frozen=True)
class Case:
    """The operands of a product, for both ops."""

    name: str
    weight: PackedWeight
    x: Tensor
    bias: Tensor | None = None
    offsets: Tensor | None = None
    act_bits: int | None = None

    @property
    def grid(self) -> list[Any]:
        """The arguments of the ops that stand for the grid."""
        return [list(self.weight.grid.constants), self.weight.grid.code_min, self.weight.bits]

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """The arguments of the ops that stand for the weight."""
        return self.weight.packed, self.weight.scale, self.weight.zero_point

    def upstream(self) -> Tensor:
        """Return a gradient of y."""
        return activations((*self.x.shape[:-1], self.weight.shape[-2]), self.x.dtype, seed=2)

    def call(self, op: str) -> tuple[tuple[Any, ...], Tensor, Tensor]:
        """Return the arguments of an op, its exact result in float64, and the error bound."""
        if op == "lowbit_linear":
            args = (self.x, *self.tensors, self.bias, self.offsets, *self.grid, self.act_bits)
            return args, *expected_linear(self.x, self.weight, self.bias, self.offsets, self.act_bits)
        g = self.upstream()
        args = (g, *self.tensors, self.offsets, *self.grid, self.weight.cols)
        return args, *expected_transposed(g, self.weight, self.offsets)


#: Tokens, outputs, inputs: 1, odd sizes, and sizes at and next to those of registers and tiles.
SIZES = [(1, 1, 1), (1, 5, 37), (3, 7, 33), (2, 16, 64), (4, 31, 96), (7, 3, 129), (1, 64, 256), (5, 17, 300)]
LARGE = [(33, 70, 520), (130, 96, 256), (1, 33, 4096), (17, 65, 1023)]


def granularities(cols: int) -> list[int | None]:
    """Return group sizes to test, None for one scale per row: the usual ones, and one that fits no tile."""
    return [None, *(g for g in (32, 64, 128) if cols % g == 0), *([cols // 3] if cols % 3 == 0 else [])]


def cases(grid: Grid, dtype: torch.dtype, sizes: Iterable[tuple[int, int, int]] | None = None) -> Iterator[Case]:
    """Yield every size and granularity, with and without quantized activations. Other options alternate."""
    zeros = cycle(("integral", "any", None) if grid.has_zero_point else (None,))
    scales, odd, few = cycle(SCALES), cycle((False, True)), cycle((2, 3, 5, 6, 7))
    for tokens, rows, cols in sizes or SIZES:
        for group in granularities(cols):
            for act_bits in (None, 8) if sizes else (None, 8, next(few)):
                zero, scale_dtype = next(zeros), next(scales)
                weight = scaled_weight(grid, (rows, cols), group, scale_dtype, zero)
                bias = activations((rows,), next(cycle(FLOATS)), seed=3) if next(odd) else None
                name = f"{tokens}x{rows}x{cols} group {group} {scale_dtype} zero {zero} act {act_bits}"
                yield Case(name, weight, activations((tokens, cols), dtype), bias, None, act_bits)


def floored_cases(grid: Grid, dtype: torch.dtype) -> Iterator[Case]:
    """Yield products in which every other scale is tiny, zero or negative, and so acts as the smallest scale."""
    dtypes = cycle(SCALES)
    for rows, cols, group in ((33, 64, None), (17, 96, 32), (5, 60, 20)):
        for tokens, act_bits in ((1, None), (3, 8), (40, None), (2, None)):
            scale_dtype = next(dtypes)
            weight = scaled_weight(grid, (rows, cols), group, scale_dtype, "any" if grid.has_zero_point else None)
            scale, some = weight.scale.clone(), torch.tensor([0.0, -3.0, 1e-6, -1e-6, 9e-6, 0.01])
            every_other = scale.view(-1)[::2]
            every_other.copy_(some.repeat(len(every_other))[: len(every_other)])
            name = f"{tokens}x{rows}x{cols} group {group} {scale_dtype} act {act_bits} scales below the floor"
            x = activations((tokens, cols), dtype) * 1e3
            yield Case(name, replaced(weight, scale=scale), x, None, None, act_bits)


#: End of each expert's tokens, for 11 tokens: uneven, empty experts at either end and between, unassigned tokens.
OFFSETS = [(3, 4, 11), (0, 11, 11), (5, 5, 9), (0, 0, 0), (11,), (0, 0, 4, 4, 4, 11, 11)]


def grouped_cases(grid: Grid, dtype: torch.dtype) -> Iterator[Case]:
    """Yield products by expert, with all ``OFFSETS``."""
    zeros = cycle(("any", None) if grid.has_zero_point else (None,))
    turns = cycle(((7, 33, None), (16, 64, 32), (5, 96, 32), (33, 37, None)))
    for offsets in OFFSETS:
        for act_bits in (None, 8):
            rows, cols, group = next(turns)
            weight = scaled_weight(grid, (len(offsets), rows, cols), group, torch.float32, next(zeros))
            ends = torch.tensor(offsets, dtype=torch.int32)
            name = f"{offsets} {rows}x{cols} group {group} act {act_bits}"
            yield Case(name, weight, activations((11, cols), dtype), None, ends, act_bits)
