"""A product of two matrices, with which layers multiply their fake-quantized weight.

    out = L R^T (+ bias)        L is left or its transpose, R is right or its transpose

The products are those of ``torch.mm``, except for the gradient of a bfloat16 weight from many tokens: CPUs with AMX have
a kernel for it (csrc/cpu/outer_product.cpp). What the op adds is where results are put, in memory that an earlier step
has used: fresh pages for the gradient of a large weight take longer than the product, if tokens are few.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import register_flop_formula

from .._torch_compat import any_autocast, in_forward_mode, in_transform
from ._autograd import OpFunction
from ._op import define

#: The fewest elements of a weight for which :func:`linear` uses the op: a MiB of bfloat16, the least that the pool of
#: memory keeps.
LEAST = 1 << 19


def _reference(
    left: Tensor, right: Tensor, bias: Tensor | None, left_transposed: bool, right_transposed: bool
) -> Tensor:
    out = (left.t() if left_transposed else left) @ (right if right_transposed else right.t())
    return out if bias is None else out + bias.to(out.dtype)


PRODUCT = define(
    "dense_product", "Tensor left, Tensor right, Tensor? bias, bool left_transposed, bool right_transposed",
    """
    left: float [P, Q]
    right: like(left) [R, S]
    require (P if left_transposed else Q) == (R if right_transposed else S); left has {P if left_transposed else \
Q} columns and right {R if right_transposed else S}, must be as many
    bias: like(left) [S if right_transposed else R]
    -> out: like(left) [Q if left_transposed else P, S if right_transposed else R]
    """,
    reference=_reference,
)  # fmt: skip


class DenseProduct(OpFunction):
    """L R^T + bias. Its derivatives are products of the same kind."""

    op = PRODUCT
    saves = ("left", "right")

    @classmethod
    def gradients(cls, ctx: Any, saved: Any, *gs: Any) -> dict[str, Tensor | None]:
        """Return the gradients: g R for L, and g^T L for R."""
        (g,), found = gs, {}
        if cls.needs(ctx, "left"):
            if saved.left_transposed:
                found["left"] = cls.call(saved.right, g, None, not saved.right_transposed, False)
            else:
                found["left"] = cls.call(g, saved.right, None, False, not saved.right_transposed)
        if cls.needs(ctx, "right"):
            if saved.right_transposed:
                found["right"] = cls.call(saved.left, g, None, not saved.left_transposed, True)
            else:
                found["right"] = cls.call(g, saved.left, None, True, not saved.left_transposed)
        if cls.needs(ctx, "bias"):
            found["bias"] = g.sum(0)
        return found

    @classmethod
    def tangent(cls, ctx: Any, saved: Any, tangents: Any) -> Any:
        """Return the sum of the products with one factor replaced by its tangent."""
        parts = [
            cls.of(saved, **{name: getattr(tangents, name)}, bias=None)
            for name in ("left", "right") if getattr(tangents, name) is not None
        ]  # fmt: skip
        if tangents.bias is not None:
            rows = saved.left.shape[1 if saved.left_transposed else 0]
            parts.append(tangents.bias.expand(rows, -1))
        return sum(parts[1:], parts[0]) if parts else None


@register_flop_formula(PRODUCT.overload.overloadpacket)
def _flops(left: Any, right: Any, bias: Any, left_transposed: bool, *args: Any, out_shape: Any, **kwargs: Any) -> int:
    return 2 * int(left[0]) * int(left[1]) * int(out_shape[1])


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return ``F.linear(x, weight, bias)`` of a computed weight, by :class:`DenseProduct` where that helps training."""
    if weight.numel() < LEAST or not _is_plain(x, weight) or not (torch.is_grad_enabled() and weight.requires_grad):
        return F.linear(x, weight, bias)
    if any_autocast() and torch.is_autocast_enabled("cpu"):
        x = x.to(weight.dtype)
        bias = None if bias is None else bias.to(weight.dtype)
    y: Tensor = DenseProduct.apply(x.reshape(-1, x.shape[-1]), weight, bias, False, False)
    return y.view(*x.shape[:-1], weight.shape[0])


def _is_plain(x: Tensor, weight: Tensor) -> bool:
    """Whether this is an eager call on a CPU, with dtypes that need no more than a cast of x to that of the weight."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or in_forward_mode() or in_transform():
        return False
    if type(x) not in (Tensor, nn.Parameter) or type(weight) is not Tensor or weight.device.type != "cpu":
        return False
    if any_autocast() and torch.is_autocast_enabled("cpu"):
        return weight.dtype is torch.get_autocast_dtype("cpu") and x.dtype in (torch.float32, weight.dtype)
    return x.dtype is weight.dtype and x.device == weight.device
