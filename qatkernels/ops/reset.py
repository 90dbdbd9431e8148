"""The reset of WinQ: weights move towards the grid in place, and no code changes.

    w <- (1 - a) * w + a * Q(w),   a is the weight on the quantized value

A weight and its quantized value lie in the same cell of the grid, and so do all values between them. So in exact
arithmetic Q(w) does not change. With rounding it can change in two ways. If w is next to an edge of its cell, the sum
can be rounded across the edge. And Q(w) itself can be rounded to a value that quantizes to another code, for example in
bfloat16 with eight bits and a zero point. So the new weight is quantized again. If its code would change, or if it is
not finite, the old weight is kept.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..arguments import check_reals
from ..grids import Grid
from ._fake_quantize import SCALES, Rows, check_layout
from ._op import define


def _reference(w: Tensor, scale: Tensor, zero_point: Tensor | None, grid: list[float], quantized_weight: float) -> None:
    rows = Rows(w, scale, zero_point, None, tuple(grid))
    # Tensors in the computing dtype, as kernels use: with a Python float some backends would multiply in float64.
    keep, move = (rows.w.new_full((), x) for x in (1 - quantized_weight, quantized_weight))
    moved = (rows.w * keep + rows.values() * move).to(w.dtype)
    same = Rows(moved.view(w.shape), scale, zero_point, None, tuple(grid)).codes() == rows.codes()
    w.copy_(torch.where(same, moved, rows.w.to(w.dtype)).view(w.shape))


RESET = define(
    "reset_", "Tensor(a!) w, Tensor scale, Tensor? zero_point, float[] grid, float quantized_weight",
    f"""
    w: float [*S]
    scale: scale(w) [*R]
    {SCALES}
    require 0 <= quantized_weight <= 1; quantized_weight is {{quantized_weight}}, must be in [0, 1]
    """,
    reference=_reference,
)  # fmt: skip


@torch.no_grad()
def reset_(
    w: Tensor,
    scale: Tensor,
    grid: Grid,
    quantized_weight: float,
    *,
    group_size: int | None = None,
    zero_point: Tensor | None = None,
) -> Tensor:
    """Move ``w`` towards its quantized value in place: ``w <- (1 - a) * w + a * Q(w)``, with one read and one write.

    The codes of ``w`` do not change, and neither does any quantized value. A weight is not changed if its code would
    change by rounding, or if it is not finite.

    Args:
        w: weight ``[..., K]``, float32, bfloat16, float16 or float64; need not be contiguous, may require grad.
        scale: as for :func:`fake_quantize`.
        grid: the quantization grid.
        quantized_weight: ``a``, the weight on the **quantized** value, in [0, 1]; 0 changes nothing, 1 puts every
            weight on the grid. WinQ's paper calls it lambda. The callback that its authors released takes ``1 - a``.
        group_size: as for :func:`fake_quantize`.
        zero_point: as for :func:`fake_quantize`.

    Returns:
        ``w``.

    Raises:
        TypeError: if an argument has another type, naming it.
        ValueError: if shapes, ``group_size``, ``zero_point`` or ``quantized_weight`` do not fit, naming the argument.
        RuntimeError: if a dtype or device does not fit.
    """
    check_layout(w, scale, grid, group_size, zero_point)
    check_reals(quantized_weight=quantized_weight)
    if not 0 <= quantized_weight <= 1:
        raise ValueError(f"quantized_weight is {quantized_weight}, must be in [0, 1]")
    target = w.contiguous()
    torch.ops.qatkernels.reset_(target, scale, zero_point, list(grid.constants), float(quantized_weight))
    if target is not w:
        w.copy_(target)
    torch.autograd.graph.increment_version(w)
    return w
