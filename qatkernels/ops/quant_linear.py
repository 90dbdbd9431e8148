"""A quantized linear layer and its tangent from one read of the weight and of its tangent.

With Q the quantized weight and V = M * dw + gamma * (D * ds + Z * dz) its tangent, as in `fake_quantize.py`,

    y  = x Q^T,    dy = dx Q^T + x V^T          transposed: y = x Q,  dy = dx Q + x V

This is forward mode. It is also what double backward asks for: for cotangents (u, U) of the gradients of x and of w,
the gradient of g is dy at (dx, dw) = (u, U), and the transposed form serves the gradient of x.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._torch_compat import in_forward_mode, in_transform, innermost_transform_is_jvp
from ..arguments import check_bools, check_optional_reals, check_optional_tensors, check_reals, check_tensors
from ..grids import Grid
from . import noise
from ._autograd import Composite
from ._fake_quantize import DUAL, TANGENTS, WEIGHT, FakeQuantizeDual, check_layout
from ._op import define


def _formula(quantize_dual: Any, x: Tensor, tangent_x: Tensor | None, *args: Any) -> tuple[Tensor, Tensor]:
    *call, transposed = args
    q, v = quantize_dual(*call, x.dtype)
    if not transposed:
        q, v = q.t(), v.t()
    tangent = x @ v
    return x @ q, tangent if tangent_x is None else tangent + tangent_x @ q


def _reference(*args: Any) -> tuple[Tensor, Tensor]:
    return _formula(DUAL.reference, *args)


QUANT_LINEAR_DUAL = define(
    "quant_linear_dual",
    "Tensor x, Tensor? tangent_x, Tensor? tangent_w, Tensor? tangent_scale, Tensor? tangent_zero_point, "
    "Tensor w, Tensor scale, Tensor? zero_point, Tensor? seed, float[] grid, float noise_std, float scale_noise_std, "
    "float grad_scale, bool transposed",
    f"""
    {WEIGHT}
    {TANGENTS}
    w: float [N, K]
    x: narrow(w) [T, N if transposed else K]
    tangent_x: like(x) [T, N if transposed else K]
    -> out: like(x) [T, K if transposed else N]
    -> tangent: like(x) [T, K if transposed else N]
    """,
    reference=_reference,
)  # fmt: skip


class QuantLinearDual(Composite):
    """(y, dy); its own derivatives are those of the formula over the dual of the weight."""

    op = QUANT_LINEAR_DUAL
    differentiable = (
        "x", "tangent_x", "tangent_w", "tangent_scale", "tangent_zero_point", "w", "scale", "zero_point",
    )  # fmt: skip

    @staticmethod
    def formula(*args: Any) -> tuple[Tensor, Tensor]:
        """The op by differentiable parts."""
        return _formula(FakeQuantizeDual.call, *args)


def quant_linear_dual(
    x: Tensor,
    w: Tensor,
    scale: Tensor,
    grid: Grid,
    *,
    group_size: int | None = None,
    zero_point: Tensor | None = None,
    tangent_x: Tensor | None = None,
    tangent_w: Tensor | None = None,
    tangent_scale: Tensor | None = None,
    tangent_zero_point: Tensor | None = None,
    noise_std: float = 0.0,
    scale_noise_std: float = 0.0,
    seed: int | Tensor | None = None,
    grad_scale: float | None = None,
    transposed: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return a quantized linear layer's output and its tangent, from one read of the weight and of its tangent.

    Args:
        x: activations ``[T, K]``, or ``[T, N]`` if ``transposed``; of the dtype of ``w``, or 16 bits for a float32 one.
        w: weight ``[N, K]``.
        scale: as for :func:`fake_quantize`, as are the other arguments of that name.
        grid: the quantization grid.
        group_size: number of consecutive inputs that share a scale.
        zero_point: for affine grids, like ``scale``.
        tangent_x: like ``x``, None for zero.
        tangent_w: like ``w``, None for zero.
        tangent_scale: like ``scale``, None for zero.
        tangent_zero_point: like ``zero_point``, None for zero.
        noise_std: standard deviation of the noise on ``w``.
        scale_noise_std: the same for ``scale``.
        seed: of the noise.
        grad_scale: factor on the tangents of ``scale`` and ``zero_point``.
        transposed: multiply by the weight itself and not by its transpose.

    Returns:
        y and dy, ``[T, N]`` (``[T, K]`` if transposed), in the dtype of x; differentiable, any order, both modes.

    Raises:
        TypeError: if an argument is of another type, naming it.
        ValueError: if ``scale``, ``group_size`` or ``zero_point`` do not fit ``w``, naming the argument.
        RuntimeError: if another shape, a dtype or a device does not fit, naming the argument.
    """
    check_tensors(x=x)
    check_layout(w, scale, grid, group_size, zero_point)
    check_optional_tensors(
        tangent_x=tangent_x, tangent_w=tangent_w, tangent_scale=tangent_scale, tangent_zero_point=tangent_zero_point
    )
    check_reals(noise_std=noise_std, scale_noise_std=scale_noise_std)
    check_optional_reals(grad_scale=grad_scale)
    check_bools(transposed=transposed)
    noise.check_seed(seed)
    seed = noise.make_seed(seed, w.device) if noise_std or scale_noise_std else None
    grad_scale = grid.grad_scale(w.numel()) if grad_scale is None else float(grad_scale)
    y, tangent = QUANT_LINEAR_DUAL.call(
        x, tangent_x, tangent_w, tangent_scale, tangent_zero_point, w, scale, zero_point, seed, list(grid.constants),
        noise_std, scale_noise_std, grad_scale, transposed,
    )  # fmt: skip
    return y, tangent


def forward_mode_alone(*tensors: Tensor | None) -> bool:
    """Whether tangents are being pushed through these tensors at this level, and nothing waits for a backward.

    An autograd Function learns of tangents only after its forward. Where no graph is recorded they can be taken off the
    tensors instead, and value and tangent computed together.
    """
    if not in_forward_mode():
        return False  # no tangents anywhere
    if in_transform():
        return innermost_transform_is_jvp()
    return not (torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors))
