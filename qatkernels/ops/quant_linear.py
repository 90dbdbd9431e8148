"""A quantized linear layer: its tangent, computed with its output, and the gradients of its weight.

Q is the quantized weight and V = M * dw + gamma * (D * ds + Z * dz) its tangent, as in `_fake_quantize.py`.

    y  = x Q^T,    dy = dx Q^T + x V^T          transposed: y = x Q,  dy = dx Q + x V

This is forward mode. Double backward needs the same products: if (u, U) are the cotangents of the gradients of x and w,
then the gradient of g is dy at (dx, dw) = (u, U), and the transposed form gives the gradient of x.

The backward of a weight is that of its quantization at g^T x. They are one op, so that a kernel may apply the
straight-through rule to a block of g^T x while it is in the caches, and need not round it (CPUs with AMX, bfloat16).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._torch_compat import (
    any_autocast,
    in_dispatch_mode,
    in_forward_mode,
    in_transform,
    innermost_transform_is_jvp,
)  # fmt: skip
from ..arguments import check_bools, check_optional_reals, check_optional_tensors, check_reals, check_tensors
from ..grids import Grid
from . import noise
from ._autograd import Composite
from ._fake_quantize import BACKWARD, DUAL, FORWARD, TANGENTS, WEIGHT, FakeQuantize, FakeQuantizeDual, check_layout
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


def _backward(g: Tensor, x: Tensor, *args: Any) -> Any:
    return BACKWARD.reference(g.t() @ x, *args)


QUANT_LINEAR_BACKWARD = define(
    "quant_linear_backward",
    "Tensor g, Tensor x, Tensor w, Tensor scale, Tensor? zero_point, Tensor? seed, float[] grid, float noise_std, "
    "float scale_noise_std, float grad_scale",
    f"""
    {WEIGHT}
    w: float [N, K]
    g: narrow(w) [T, N]
    x: like(g) [T, K]
    -> dw: like(w) [N, K]
    -> ds: like(scale) [*R]
    -> dz: like(scale) [*R] if zero_point else [0]
    """,
    reference=_backward,
)  # fmt: skip


class JoinedLinear(torch.autograd.Function):
    """y = x Q^T + bias, for training on a CPU.

    Its backward computes the gradients of all inputs that require one, also if ``torch.autograd.grad`` asks for some.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, bias: Tensor | None, w: Tensor, scale: Tensor, zero_point: Tensor | None, *args: Any
    ) -> Tensor:
        """Quantize and multiply; ``args`` are the others of ``fake_quantize``."""
        q: Tensor = FORWARD.overload(w, scale, zero_point, *args)
        ctx.save_for_backward(x, q if ctx.needs_input_grad[0] else None, w, scale, zero_point, args[0])
        ctx.args = args
        return F.linear(x, q, bias)

    @staticmethod
    def backward(ctx: Any, *gs: Tensor) -> Any:
        """Return the gradients."""
        (g,), (x, q, w, scale, zero_point, seed) = gs, ctx.saved_tensors
        needs_x, needs_bias, *needs = ctx.needs_input_grad
        _, *constants, dtype = ctx.args
        again = torch.is_grad_enabled() or in_forward_mode() or in_transform()
        if again and needs_x:  # the saved q has no graph
            q = FakeQuantize.call(w, scale, zero_point, seed, *constants, dtype)
        dx = g @ q if needs_x else None
        db = g.sum(0) if needs_bias else None
        dw = ds = dz = None
        if any(needs):
            weight = (w, scale, zero_point, seed, *constants)
            if again:
                dw, ds, dz = torch.ops.qatkernels.fake_quantize_backward_differentiable(g.t() @ x, *weight)
            else:
                dw, ds, dz = QUANT_LINEAR_BACKWARD.overload(g.contiguous(), x, *weight)
        return dx, db, dw, ds, None if zero_point is None else dz, *(None,) * len(ctx.args)


#: The fewest elements of a weight for which :func:`quant_linear` joins the backward of product and quantization. In a
#: trial on two cores of a Xeon a joined step took, over the other, 0.9 to 1.1 with a weight of 1024 x 1024 and 0.9 to
#: 1.04 with 2048 x 2048, with AMX or without, and without it 0.7 to 1.0 with 4096 x 4096.
LEAST = 1 << 22


def joins(x: Tensor, bias: Tensor | None, w: Tensor, dtype: torch.dtype | None) -> bool:
    """Whether :func:`quant_linear` takes a call: an eager one on a CPU, with plain tensors and gradients.

    Dtypes have to be such that ``F.linear`` takes them, and autocast makes them that of the quantized weight.

    Args:
        x: input of the layer.
        bias: bias of the layer, or None.
        w: master weight.
        dtype: dtype of the quantized weight; that of ``w`` if None.
    """
    if w.numel() < LEAST or not (torch.is_grad_enabled() and w.requires_grad) or type(w) is not nn.Parameter:
        return False
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    # A dispatch mode, such as that which counts flops, sees the product of F.linear.
    if in_forward_mode() or in_transform() or in_dispatch_mode():
        return False
    dtype = dtype or w.dtype
    allowed = {dtype}
    if any_autocast() and torch.is_autocast_enabled("cpu"):
        if dtype is not torch.get_autocast_dtype("cpu"):
            return False
        allowed.add(torch.float32)
    tensors = (x, w) if bias is None else (x, w, bias)
    return x.ndim > 0 and all(_is_plain(t) and t.dtype in allowed for t in tensors)


def _is_plain(t: Tensor) -> bool:
    if type(t) not in (Tensor, nn.Parameter) or t.device.type != "cpu":
        return False
    return t.layout is torch.strided and not t.is_nested


def quant_linear(x: Tensor, bias: Tensor | None, dtype: torch.dtype | None, w: Tensor, *args: Any) -> Tensor:
    """Return ``F.linear(x, fake_quantize(w, *args, dtype), bias)``, where :func:`joins` says that it takes the call."""
    to = dtype or w.dtype
    x = x.to(to)
    rows = x if x.ndim == 2 else x.reshape(-1, x.shape[-1])
    y: Tensor = JoinedLinear.apply(rows, None if bias is None else bias.to(to), w, *args, dtype)
    return y if x.ndim == 2 else y.view(*x.shape[:-1], w.shape[0])


class QuantLinearDual(Composite):
    """(y, dy). Its derivatives are those of the formula, with the dual op of the weight."""

    op = QUANT_LINEAR_DUAL
    differentiable = (
        "x", "tangent_x", "tangent_w", "tangent_scale", "tangent_zero_point", "w", "scale", "zero_point",
    )  # fmt: skip

    @staticmethod
    def formula(*args: Any) -> tuple[Tensor, Tensor]:
        """Compute the op from differentiable ops."""
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
    """Return the output of a quantized linear layer and its tangent. Weight and its tangent are read once.

    Args:
        x: activations ``[T, K]``, or ``[T, N]`` if ``transposed``, of the dtype of ``w``; or of 16 bits for a float32
            ``w``.
        w: weight ``[N, K]``.
        scale: as for :func:`fake_quantize`; so are the other arguments that have the same names there.
        grid: the quantization grid.
        group_size: number of consecutive inputs that share a scale.
        zero_point: zero points of affine grids, with the shape of ``scale``.
        tangent_x: tangent of ``x``; None for zero.
        tangent_w: tangent of ``w``; None for zero.
        tangent_scale: tangent of ``scale``; None for zero.
        tangent_zero_point: tangent of ``zero_point``; None for zero.
        noise_std: standard deviation of the noise on ``w``.
        scale_noise_std: standard deviation of the noise on ``scale``.
        seed: seed of the noise.
        grad_scale: factor on the tangents of ``scale`` and ``zero_point``.
        transposed: whether to multiply by the weight itself instead of its transpose.

    Returns:
        y and dy, ``[T, N]`` (``[T, K]`` if transposed), in the dtype of x. Differentiable, to any order, in both modes.

    Raises:
        TypeError: if an argument has another type, naming it.
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
    """Whether forward mode is active for these tensors, and no graph for a backward is recorded.

    An autograd Function gets tangents only after its forward. If no graph is recorded, a layer can read the tangents
    from its tensors itself, and compute value and tangent together.
    """
    if not in_forward_mode():
        return False
    if in_transform():
        return innermost_transform_is_jvp()
    return not (torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors))
