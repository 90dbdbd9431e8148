"""Right answers in float64, computed a few rows at a time, and the error against them.

A code flips where a weight lies so close to a tie that float32 and float64 round it differently, and one flipped code
is a whole level off. `settle` moves the few weights that are that close, so that afterwards every implementation must
agree with the float64 reference everywhere, to rounding, and one wrong element is enough to be found out.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from qatkernels.grids import MIN_SCALE, Grid
from qatkernels.ops import noise
from qatkernels.ops._op import OPS, as_tuple
from qatkernels.testing.samples import Sample

from .case import Expected

#: Distance of w / scale * steps from a decision below which float32 may decide otherwise, relative to its size.
MARGIN = 2.0**-16
_ROWS_AT_ONCE = 256
_ELEMENTS = 2**22


def errors(outputs: Any, expected: Expected) -> list[float]:
    """Return for each output the largest error of any element, relative to its size plus the output's root mean square.

    NaN and infinities, also unwritten elements of a poisoned output, wrong shapes and missing outputs give infinity.
    """
    given = as_tuple(outputs)
    if len(given) != len(expected):
        return [float("inf")] * len(expected)
    return [_error(actual, wanted) for actual, wanted in zip(given, expected, strict=True)]


def _error(actual: Tensor | None, wanted: Tensor | None) -> float:
    if wanted is None:
        return 0.0
    if actual is None or actual.shape != wanted.shape:
        return float("inf")
    size, worst = wanted.square().mean().sqrt().clamp_min(torch.finfo(torch.float64).tiny), 0.0
    for a, w in zip(actual.detach().reshape(-1).split(_ELEMENTS), wanted.reshape(-1).split(_ELEMENTS), strict=True):
        if a.numel():
            error = (a.double() - w).abs() / (w.abs() + size)
            worst = max(worst, error.nan_to_num(nan=float("inf")).max().item())
    return worst


def settle(w: Tensor, scale: Tensor, grid: Grid, added: Tensor | None = None) -> Tensor:
    """Return ``w`` with the weights moved that lie on, or within rounding of, a decision of the grid.

    Args:
        w: weight whose elements divide evenly among the scales.
        scale: the scales.
        grid: a grid without zero point.
        added: noise like ``w`` that the op will add.
    """
    rows = w.reshape(scale.numel(), -1).clone()
    extra = None if added is None else added.reshape(rows.shape)
    step = max(1, _ELEMENTS // rows.shape[1])
    for start in range(0, rows.shape[0], step):
        part = slice(start, start + step)
        s = scale.reshape(-1, 1)[part].double().clamp_min(MIN_SCALE)
        for _ in range(8):
            r = (rows[part].double() + (0 if extra is None else extra[part].double())) / s
            near = _undecided(r, grid)
            if not near.any():
                break
            moved = rows[part].double() + torch.maximum(s, rows[part].abs().double()) / 32
            rows[part] = torch.where(near, moved.to(w.dtype), rows[part])
    return rows.view(w.shape)


def _undecided(r: Tensor, grid: Grid) -> Tensor:
    t = r * grid.steps - grid.offset
    near = (t - t.floor() - 0.5).abs() < MARGIN * t.abs().clamp_min(1)
    for edge in grid.passes:
        near |= (r - edge).abs() < MARGIN * max(1.0, abs(edge))
    return near


def drawn(sample: Sample) -> tuple[Tensor | None, Tensor | None]:
    """Return the noise that a sample's op adds to the weight and to the scales."""
    if sample.seed is None:
        return None, None

    def stream(like: Tensor, std: float, number: int) -> Tensor:
        normal: Tensor = noise.normal(sample.seed, like.numel(), number)  # type: ignore[arg-type]
        return (normal * std).view(like.shape)

    return (
        stream(sample.w, sample.noise_std, noise.WEIGHT_STREAM),
        stream(sample.scale, sample.scale_noise_std, noise.SCALE_STREAM),
    )


def settled(sample: Sample) -> Sample:
    """Return a sample whose every decision is the same in float32 and in float64."""
    on_weight, on_scale = drawn(sample)
    scale = sample.scale if on_scale is None else sample.scale + on_scale
    return dataclasses.replace(sample, w=settle(sample.w, scale, sample.grid, on_weight))


def expected(op: str, sample: Sample, args: tuple[Any, ...]) -> Expected:
    """Return what an op of the fake-quantize family must give, in float64.

    Args:
        op: name of the op.
        sample: the sample, its weight a matrix.
        args: ``sample.args(op)``.
    """
    rows = sample.w.shape[0]
    on_weight, on_scale = drawn(sample)

    def cut(a: Any, part: slice) -> Any:
        if a is sample.seed or isinstance(a, torch.dtype):
            return None  # The noise is added here, and float64 is what comes out.
        if not isinstance(a, Tensor):
            return a
        if on_weight is not None and on_scale is not None:
            # The op defines this sum as a float32 one; where it cancels, float64 would be another number.
            a = a.float() + on_weight if a is sample.w else a + on_scale if a is sample.scale else a
        return (a[part] if a.ndim > 0 and a.shape[0] == rows else a).double()

    parts = []
    for start in range(0, rows, _ROWS_AT_ONCE):
        part = slice(start, start + _ROWS_AT_ONCE)
        parts.append(as_tuple(OPS[op].reference(*(cut(a, part) for a in args))))
    return tuple(
        torch.stack(column).double().sum(0) if column[0].ndim == 0 else torch.cat(column).double()
        for column in zip(*parts, strict=True)
    )
