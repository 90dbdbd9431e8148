"""Expected outputs in float64, computed a few rows at a time, and the error of outputs against them.

Where a weight is very close to a rounding tie, float32 and float64 may round it to different codes, and the outputs
then differ by a whole level. `avoid_ties` moves these few weights. Afterwards every implementation must agree with the
float64 reference at every element, up to rounding, so a single wrong element is an error.
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

#: If w / scale * steps is closer to a rounding tie or clamp limit than this (relative), float32 may round differently.
MARGIN = 2.0**-16
_ROWS_AT_ONCE = 256
_ELEMENTS = 2**22


def errors(outputs: Any, expected: Expected) -> list[float]:
    """Return the largest error of each output, relative to the element's magnitude plus the output's root mean square.

    NaN, infinity, a wrong shape or a missing output give infinity. Outputs are filled with NaN before the call, so an
    element that was not written counts too.
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


def avoid_ties(w: Tensor, scale: Tensor, grid: Grid, added: Tensor | None = None) -> Tensor:
    """Return ``w`` with those weights moved that are on or near a rounding tie or clamp limit of the grid.

    Args:
        w: weight; each scale has the same number of elements.
        scale: the scales.
        grid: a grid without zero point.
        added: noise of the shape of ``w`` that the op will add.
    """
    rows = w.reshape(scale.numel(), -1).clone()
    extra = None if added is None else added.reshape(rows.shape)
    step = max(1, _ELEMENTS // rows.shape[1])
    for start in range(0, rows.shape[0], step):
        part = slice(start, start + step)
        s = scale.reshape(-1, 1)[part].double().clamp_min(MIN_SCALE)
        for _ in range(8):
            r = (rows[part].double() + (0 if extra is None else extra[part].double())) / s
            near = _near_tie(r, grid)
            if not near.any():
                break
            moved = rows[part].double() + torch.maximum(s, rows[part].abs().double()) / 32
            rows[part] = torch.where(near, moved.to(w.dtype), rows[part])
    return rows.view(w.shape)


def _near_tie(r: Tensor, grid: Grid) -> Tensor:
    t = r * grid.steps - grid.offset
    near = (t - t.floor() - 0.5).abs() < MARGIN * t.abs().clamp_min(1)
    for edge in grid.passes:
        near |= (r - edge).abs() < MARGIN * max(1.0, abs(edge))
    return near


def noise_of(sample: Sample) -> tuple[Tensor | None, Tensor | None]:
    """Return the noise that the op of a sample adds to the weight and to the scales."""
    if sample.seed is None:
        return None, None

    def stream(like: Tensor, std: float, number: int) -> Tensor:
        normal: Tensor = noise.normal(sample.seed, like.numel(), number)  # type: ignore[arg-type]
        return (normal * std).view(like.shape)

    return (
        stream(sample.w, sample.noise_std, noise.WEIGHT_STREAM),
        stream(sample.scale, sample.scale_noise_std, noise.SCALE_STREAM),
    )


def without_ties(sample: Sample) -> Sample:
    """Return a sample that float32 and float64 round to the same codes."""
    on_weight, on_scale = noise_of(sample)
    scale = sample.scale if on_scale is None else sample.scale + on_scale
    return dataclasses.replace(sample, w=avoid_ties(sample.w, scale, sample.grid, on_weight))


def expected(op: str, sample: Sample, args: tuple[Any, ...]) -> Expected:
    """Return the expected outputs of an op of the fake-quantize family, in float64.

    Args:
        op: name of the op.
        sample: the sample, its weight a matrix.
        args: ``sample.args(op)``.
    """
    rows = sample.w.shape[0]
    on_weight, on_scale = noise_of(sample)

    def cut(a: Any, part: slice) -> Any:
        if a is sample.seed or isinstance(a, torch.dtype):
            return None  # no seed: the noise is added below. No output dtype: the result is float64.
        if not isinstance(a, Tensor):
            return a
        if on_weight is not None and on_scale is not None:
            # The op defines this sum in float32. Where it cancels, float64 would give another value.
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
