"""A quantized weight as integers times steps: the form from which every foreign format is written."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..arithmetic import quotient
from ..grids import MIN_SCALE, Grid
from ..nn.activation import ACTS, LearnedActivation, learned_acts
from ..nn.packed_linear import Packed
from ..nn.quantized import Quantized


class UnfitError(ValueError):
    """A format cannot hold a weight exactly; the message says why."""


def words(unsigned: Tensor, bits: int) -> Tensor:
    """Return integers ``[N, K]`` from 0 to ``2 ** bits - 1`` as int32 ``[N, ceil(K * bits / 32)]``.

    A row is one string of bits, little end first, as in docs/packing.md, and ends with zeros.
    """
    packed: Tensor = torch.ops.qatkernels.pack(unsigned.to(torch.uint8).contiguous(), 0, bits)
    packed = torch.nn.functional.pad(packed, (0, -packed.shape[-1] % 4)).contiguous()
    if sys.byteorder == "big":
        packed = packed.unflatten(-1, (-1, 4)).flip(-1).flatten(-2)
    return packed.view(torch.int32)


@dataclass(frozen=True)
class IntegerWeight:
    """A weight ``[N, K]`` whose elements are ``integers * steps``, equal to the quantized weight bit for bit.

    Half-integer grids (binary, seq) are doubled: ``(code + 1/2) * step = (2 * code + 1) * (step / 2)``. Both factors
    stay exact.

    Attributes:
        integers: int32 ``[N, K]``.
        steps: float32 ``[N, G]``; each serves ``K / G`` neighbours in a row.
        low: int32 ``[N, G]``, the integer of the smallest code.
        spacing: difference of neighbouring integers: 2 for doubled grids, otherwise 1.
        levels: number of codes.
    """

    integers: Tensor
    steps: Tensor
    low: Tensor
    spacing: int
    levels: int

    @classmethod
    @torch.no_grad()
    def of(cls, layer: Quantized | Packed) -> IntegerWeight:
        """Return the weight of a QuantLinear, as an eval forward uses it, or of a PackedLinear.

        Raises:
            UnfitError: if zero points are no integers: then no integer format holds the weight exactly.
        """
        if isinstance(layer, Packed):
            weight = layer.weight
            return cls.from_codes(weight.codes(), weight.scale, weight.zero_point, weight.grid)
        scale, zero_point = layer.quantizer.stored(layer.scale, layer.zero_point)
        if layer.group_size is None:
            rows = (len(layer.weight), 1)
            scale = scale.reshape(-1, 1).expand(rows)
            zero_point = None if zero_point is None else zero_point.reshape(-1, 1).expand(rows)
        return cls.from_codes(layer.codes(), scale, zero_point, layer.grid)

    @classmethod
    @torch.no_grad()
    def from_codes(cls, codes: Tensor, scale: Tensor, zero_point: Tensor | None, grid: Grid) -> IntegerWeight:
        """Return the weight ``(codes + grid.offset - zero_point) * (scale / grid.steps)``.

        Args:
            codes: integer codes ``[N, K]``.
            scale: ``[N, G]``.
            zero_point: ``[N, G]``, or None.
            grid: the grid of the codes.

        Raises:
            UnfitError: if zero points are no integers.
        """
        spacing = 1 if float(grid.offset).is_integer() else 2
        if not (spacing * grid.offset).is_integer():
            raise UnfitError(f"the grid's offset is {grid.offset}, which is neither an integer nor half of one")
        steps = quotient(scale.float().clamp_min(MIN_SCALE), grid.steps) / spacing
        shift = torch.full_like(steps, spacing * grid.offset)
        if zero_point is not None:
            if (odd := zero_point != zero_point.round()).any():
                raise UnfitError(
                    f"{int(odd.sum())} of {odd.numel()} zero points are no integers (the first is "
                    f"{float(zero_point[odd][0]):g}): train with QuantConfig(zero_point_domain='int'), or use a scheme "
                    "without them"
                )
            shift = shift - spacing * zero_point
        shift = shift.to(torch.int32)
        grouped = codes.to(torch.int32).reshape(*steps.shape, -1)
        integers = (spacing * grouped + shift[..., None]).reshape(codes.shape)
        low = spacing * grid.code_min + shift
        return cls(integers, steps, low, spacing, grid.code_max - grid.code_min + 1)

    @property
    def ends(self) -> tuple[int, int]:
        """The smallest and the largest integer that the codes can stand for."""
        if not self.low.numel():
            return 0, 0
        return int(self.low.min()), int(self.low.max()) + self.spacing * (self.levels - 1)

    def signed_bits(self, widths: Iterable[int]) -> int | None:
        """Return the first of some widths whose signed integers hold all of the weight's; None if there is none."""
        low, high = self.ends
        return next((bits for bits in widths if low >= -(1 << bits - 1) and high < 1 << bits - 1), None)

    @property
    def group_size(self) -> int:
        """Elements of a row that share a step; K where a row does."""
        return self.integers.shape[-1] // self.steps.shape[-1]

    def dequantize(self) -> Tensor:
        """Return the weight in float32, equal to ``layer.quantized_weight()`` bit for bit."""
        grouped = self.integers.reshape(*self.steps.shape, -1).float()
        return (grouped * self.steps[..., None]).reshape(self.integers.shape)

    def by_block(self, size: int) -> IntegerWeight:
        """Return the same weight with a step for every block of ``size`` elements of a row.

        Raises:
            UnfitError: if blocks do not divide a row, or a block would hold more than one group.
        """
        cols = self.integers.shape[-1]
        if cols % size:
            raise UnfitError(f"rows of {cols} are not whole blocks of {size}")
        if self.group_size % size:
            raise UnfitError(f"groups of {self.group_size} are not whole blocks of {size}")
        repeats = self.group_size // size
        return replace(
            self, steps=self.steps.repeat_interleave(repeats, -1), low=self.low.repeat_interleave(repeats, -1)
        )

    def rounded_steps(self, dtype: torch.dtype) -> IntegerWeight:
        """Return the weight with steps that ``dtype`` holds."""
        return replace(self, steps=self.steps.to(dtype).float())

    def permuted(self, rows: Tensor) -> IntegerWeight:
        """Return the weight with its rows in another order."""
        return replace(self, integers=self.integers[rows], steps=self.steps[rows], low=self.low[rows])


def static_bits(act: object) -> int | None:
    """Return the width of a quantizer of activations with one scale and signed integers; None if it is another one."""
    if not isinstance(act, LearnedActivation) or act.zero_point is not None or act.grid.steps != 1:
        return None
    bits = int(act.grid.code_max).bit_length() + 1
    return bits if (act.grid.code_min, act.grid.code_max) == (-(1 << bits - 1), (1 << bits - 1) - 1) else None


def check_calibrated(name: str, layer: Quantized | Packed) -> None:
    """Raise ValueError if nothing has set a learned scale of a layer's activations: a file would have a made-up one."""
    for act, learned in learned_acts(layer).items():
        if not learned.ready:
            raise ValueError(
                f"the scale of {name or 'the model'}'s {ACTS[act]} has not been initialized: call "
                "calibrate(model, batch), or train, before export"
            )


def static_scale(act: LearnedActivation) -> Tensor:
    """Return the scale of such a quantizer, float32 ``[]``."""
    act.check_scale()
    return act.scale.detach().reshape(()).float().clamp_min(MIN_SCALE)
