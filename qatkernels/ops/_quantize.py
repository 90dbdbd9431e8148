"""Quantization to integer codes, and back. The codes are those that `fake_quantize` uses."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..arguments import check_dtype, check_tensors
from ..arithmetic import quotient
from ..grids import MIN_SCALE, Grid, GridConstants, code_dtype
from ._autograd import OpFunction
from ._fake_quantize import SCALES, Rows, check_layout
from ._op import define


def _quantize(
    w: Tensor, scale: Tensor, zero_point: Tensor | None, grid: list[float], code_min: int, code_max: int
) -> Tensor:
    codes = Rows(w, scale, zero_point, None, tuple(grid)).codes()
    # NaN gets code 0. The clamp keeps codes from wrapping around in the cast, if a scale or zero point is out of range.
    codes = codes.nan_to_num(nan=0.0).clamp(code_min, code_max)
    return codes.to(code_dtype(code_max)).view(w.shape)


def _dequantize(
    codes: Tensor, scale: Tensor, zero_point: Tensor | None, grid: list[float], dtype: torch.dtype
) -> Tensor:
    constants = GridConstants(*grid)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    rows = codes.reshape(scale.numel(), codes.numel() // max(scale.numel(), 1)).to(wide)
    s = scale.reshape(-1, 1).to(wide).clamp_min(MIN_SCALE)
    offset = constants.offset if zero_point is None else constants.offset - zero_point.reshape(-1, 1).to(wide)
    return ((rows + offset) * quotient(s, constants.steps)).to(dtype).view(codes.shape)


QUANTIZE = define(
    "quantize", "Tensor w, Tensor scale, Tensor? zero_point, float[] grid, int code_min, int code_max",
    f"""
    w: float [*S]
    scale: scale(w) [*R]
    {SCALES}
    require -128 <= code_min <= code_max <= 127 or 0 <= code_min <= code_max <= 255; code_min is {{code_min}} and \
code_max is {{code_max}}, must fit int8 or uint8
    -> out: code(code_max) [*S]
    """,
    reference=_quantize,
)  # fmt: skip
DEQUANTIZE = define(
    "dequantize", "Tensor codes, Tensor scale, Tensor? zero_point, float[] grid, ScalarType dtype",
    f"""
    codes: int8|uint8 [*S]
    dtype: float
    scale: scale(dtype) [*R]
    {SCALES}
    -> out: default(dtype, codes) [*S]
    """,
    reference=_dequantize,
)  # fmt: skip


class Dequantize(OpFunction):
    """The weight from codes. Differentiable in scale and zero point, to first order."""

    op = DEQUANTIZE

    @classmethod
    def gradients(cls, ctx: Any, saved: Any, *gs: Any) -> dict[str, Tensor | None]:
        """Return the gradients of scale and zero point: sums over the elements that share a scale."""
        scale, constants = saved.scale, GridConstants(*saved.grid)
        shape = (scale.numel(), saved.codes.numel() // max(scale.numel(), 1))
        rows = quotient(saved.codes.reshape(shape).to(scale.dtype) + constants.offset, constants.steps)
        g = gs[0].reshape(shape).to(scale.dtype)
        ds = (g * rows).sum(-1).view(scale.shape)
        if saved.zero_point is None:
            return {"scale": ds}
        total = quotient(g.sum(-1).view(scale.shape), constants.steps)
        return {"scale": ds - total * saved.zero_point, "zero_point": -total * scale.clamp_min(MIN_SCALE)}


def quantize(
    w: Tensor, scale: Tensor, grid: Grid, *, group_size: int | None = None, zero_point: Tensor | None = None
) -> Tensor:
    """Return the integer codes of ``w`` on a grid.

    Args:
        w: weight ``[..., K]``, float32, bfloat16, float16 or float64.
        scale: as for :func:`fake_quantize`.
        grid: the quantization grid.
        group_size: as for :func:`fake_quantize`.
        zero_point: as for :func:`fake_quantize`; it is part of the codes, which stay within ``grid.code_min`` and
            ``grid.code_max``.

    Returns:
        Codes of the shape of ``w``: int8, or uint8 if ``grid.code_max`` is above 127. NaN gives code 0. Not
        differentiable.

    Raises:
        TypeError: if an argument has another type, naming it.
        ValueError: if shapes, ``group_size`` or ``zero_point`` do not fit, naming the argument.
        RuntimeError: if a dtype or device does not fit.
    """
    check_layout(w, scale, grid, group_size, zero_point)
    codes: Tensor = torch.ops.qatkernels.quantize(
        w, scale, zero_point, list(grid.constants), grid.code_min, grid.code_max
    )
    return codes


def dequantize(
    codes: Tensor,
    scale: Tensor,
    grid: Grid,
    *,
    group_size: int | None = None,
    zero_point: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Return ``(codes + grid.offset - zero_point) * (scale / grid.steps)``.

    For the codes that :func:`quantize` returns, the result is that of :func:`fake_quantize`, bit for bit.

    Args:
        codes: int8 or uint8 codes ``[..., K]``.
        scale: as for :func:`fake_quantize`. It gets a gradient, and so does ``zero_point``, without a gradient scale.
        grid: the quantization grid.
        group_size: as for :func:`fake_quantize`.
        zero_point: as for :func:`fake_quantize`.
        dtype: dtype of the result.

    Returns:
        Weights of the shape of ``codes``.

    Raises:
        TypeError: if an argument has another type, naming it.
        ValueError: if shapes, ``group_size`` or ``zero_point`` do not fit, naming the argument.
        RuntimeError: if a dtype or device does not fit.
    """
    check_tensors(codes=codes)
    check_dtype(dtype)
    check_layout(codes, scale, grid, group_size, zero_point)
    w: Tensor = DEQUANTIZE.call(codes, scale, zero_point, list(grid.constants), dtype)
    return w
