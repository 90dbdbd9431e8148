"""A quantized linear layer and its tangent from one read of the weight and of its tangent.

With Q the quantized weight and V = M * dw + gamma * (D * ds + Z * dz) its tangent, as in `fake_quantize.py`,

    y  = x Q^T,    dy = dx Q^T + x V^T          transposed: y = x Q,  dy = dx Q + x V

This is forward mode. It is also what double backward asks for: for cotangents (u, U) of the gradients of x and of w,
the gradient of g is dy at (dx, dw) = (u, U), and the transposed form serves the gradient of x.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

from ._op import Composite, Function, define
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

    @staticmethod
    def formula(*args: Any) -> tuple[Tensor, Tensor]:
        """The op by differentiable parts."""
        return _formula(FakeQuantizeDual.apply, *args)

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, Tensor]:
        return Function.run(torch.ops.qatkernels.quant_linear_dual.default, *args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        Composite.keep(ctx, inputs, 8)

    @staticmethod
    def backward(ctx: Any, *gs: Any) -> Any:
        return Composite.pulled(ctx, QuantLinearDual.formula, gs)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        return Composite.pushed(ctx, QuantLinearDual.formula, tangents)


torch.library.register_autograd(
    "qatkernels::quant_linear_dual",
    QuantLinearDual.backward,
    setup_context=lambda ctx, inputs, output: QuantLinearDual.setup_context(ctx, inputs, output),
)


def quant_linear_dual(*args: Any) -> tuple[Tensor, Tensor]:
    """Return a quantized linear layer's output and its tangent; arguments as the op's, see the top of this file.

    Args:
        *args: ``x [T, K]``, its tangent or None, tangents of w, scale and zero point or None, then the arguments of
            ``torch.ops.qatkernels.fake_quantize`` from ``w [N, K]`` to ``grad_scale``, and whether to multiply by the
            weight itself (``x [T, N]``) and not by its transpose.

    Returns:
        y and dy, ``[T, N]`` (``[T, K]`` if transposed), in the dtype of x.
    """
    return QuantLinearDual.apply(*args)


def forward_mode_alone(*tensors: Tensor | None) -> bool:
    """Whether tangents are being pushed through these tensors at this level, and nothing waits for a backward.

    An autograd Function learns of tangents only after its forward. Where no graph is recorded they can be taken off the
    tensors instead, and value and tangent computed together.
    """
    if forward_ad._current_level < 0:
        return False  # no tangents anywhere
    if torch._C._are_functorch_transforms_active():
        return torch._C._functorch.peek_interpreter_stack().key() == torch._C._functorch.TransformType.Jvp
    return not (torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors))
