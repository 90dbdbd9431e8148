"""The error of quantizing a weight, for each of its scales: what a search for scales minimizes.

    error = sum of m * (w - Q(w; scale, zero_point))**2  over the weights that share a scale

``m`` is 1, or one number for each input feature. With the second moments of a layer's inputs, ``m[k]`` the mean of
``x[k]**2``, the error is the expected squared error of the layer's output, but for the products of different inputs.

A call reads the weight once and stores nothing of its size. The difference ``w - Q(w)`` is rounded to float32 (float64
for float64 weights); its square and the sum are float64, and the order of additions depends on the shape alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..arguments import check_optional_tensors
from ..grids import Grid
from ._fake_quantize import Rows, check_layout
from ._op import define


def _reference(
    w: Tensor, scale: Tensor, zero_point: Tensor | None, moments: Tensor | None, grid: list[float]
) -> Tensor:
    rows = Rows(w, scale, zero_point, None, tuple(grid))
    squares = (rows.w - rows.values()).double().square()
    if moments is not None:
        stacked = moments.reshape(-1, 1, w.shape[-1])
        of_weights = stacked.expand(-1, w[..., 0].numel() // max(len(stacked), 1), -1)
        squares = squares * of_weights.reshape(squares.shape)
    return squares.sum(-1).view(scale.shape)


ERROR = define(
    "quantization_error", "Tensor w, Tensor scale, Tensor? zero_point, Tensor? moments, float[] grid",
    """
    w: float [*T, K]
    scale: scale(w) [*R]
    require numel(T) * K == 0 or numel(R) > 0 and numel(T) * K % numel(R) == 0; scale has {numel(R)} elements, must \
divide the {numel(T) * K} elements of the weight
    zero_point: like(scale) [*R]
    require len(grid) == 10; grid has {len(grid)} constants, must be Grid.constants
    moments: float64 [*E, K]
    require moments is None or numel(T) == 0 or numel(E) > 0 and numel(T) % numel(E) == 0; moments has {numel(E)} \
rows, must divide the {numel(T)} rows of the weight
    -> out: float64 [*R]
    """,
    reference=_reference,
)  # fmt: skip


@torch.no_grad()
def quantization_error(
    w: Tensor,
    scale: Tensor,
    grid: Grid,
    *,
    group_size: int | None = None,
    zero_point: Tensor | None = None,
    moments: Tensor | None = None,
) -> Tensor:
    """Return, for each scale, the sum of squared errors of the weights that share it: ``moments * (w - Q(w))**2``.

    Args:
        w: weight ``[..., K]``, float32, bfloat16, float16 or float64.
        scale: as for :func:`fake_quantize`.
        grid: the quantization grid.
        group_size: as for :func:`fake_quantize`.
        zero_point: as for :func:`fake_quantize`.
        moments: float64 ``[K]``, what each input feature's errors are multiplied by; ``[E, K]`` for a stack of experts
            ``[E, N, K]``, a row for each. All 1 if None.

    Returns:
        float64 tensor of the shape of ``scale``. NaN where a weight or scale is NaN. Not differentiable. On a CPU it
        has the same bits for any number of threads and on every instruction set.

    Raises:
        TypeError: if an argument has another type, naming it.
        ValueError: if shapes, ``group_size`` or ``zero_point`` do not fit, naming the argument.
        RuntimeError: if a dtype or device does not fit, or ``moments`` does not fit ``w``.
    """
    check_layout(w, scale, grid, group_size, zero_point)
    check_optional_tensors(moments=moments)
    error: Tensor = torch.ops.qatkernels.quantization_error(w, scale, zero_point, moments, list(grid.constants))
    return error
