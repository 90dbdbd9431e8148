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
from ._autograd import Composite
from ._op import define
from .fake_quantize import DUAL, TANGENTS, WEIGHT, FakeQuantizeDual


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


def quant_linear_dual(*args: Any) -> tuple[Tensor, Tensor]:
    """Return a quantized linear layer's output and its tangent; arguments as the op's, see the top of this file.

    Args:
        *args: ``x [T, K]``, its tangent or None, tangents of w, scale and zero point or None, then the arguments of
            ``torch.ops.qatkernels.fake_quantize`` from ``w [N, K]`` to ``grad_scale``, and whether to multiply by the
            weight itself (``x [T, N]``) and not by its transpose.

    Returns:
        y and dy, ``[T, N]`` (``[T, K]`` if transposed), in the dtype of x.
    """
    y, tangent = QUANT_LINEAR_DUAL.call(*args)
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
