"""Products of tokens with the weights of their experts, for tokens that are sorted by expert.

Three bilinear ops. The derivatives of each are the other two, to any order and in both modes. x_e and g_e are the rows
of expert e: rows ``offsets[e - 1]`` to ``offsets[e] - 1``.

    grouped_linear             y_e = x_e W_e^T     x [T, K], w [E, N, K] -> y [T, N]
    grouped_linear_transposed  x_e = g_e W_e       g [T, N], w [E, N, K] -> x [T, K]
    grouped_outer              W_e = g_e^T x_e     g [T, N], x [T, K]    -> w [E, N, K]

An expert may have no rows. Rows at or beyond offsets[-1] are unassigned and give 0. Tensors may have any strides. On a
CPU there is one matrix product of torch for each expert with tokens. On a GPU there is one launch for all experts,
which reads the offsets on the device.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..arguments import check_tensors
from ._autograd import OpFunction
from ._lowbit_linear import segments
from ._op import define


def _multiply_by_expert(x: Tensor, w: Tensor, offsets: Tensor) -> Tensor:
    """Return the rows of each expert times its matrix; ``w`` is ``[E, K, N]``."""
    y = x.new_empty(x.shape[0], w.shape[-1])
    parts = segments(offsets, x.shape[0])
    for e, (start, end) in enumerate(parts):
        if start < end:
            torch.mm(x[start:end], w[e], out=y[start:end])
    y[parts[-1][1] if parts else 0 :].zero_()
    return y


def _forward(x: Tensor, w: Tensor, offsets: Tensor) -> Tensor:
    return _multiply_by_expert(x, w.mT, offsets)


def _transposed(g: Tensor, w: Tensor, offsets: Tensor) -> Tensor:
    return _multiply_by_expert(g, w, offsets)


def _outer(g: Tensor, x: Tensor, offsets: Tensor) -> Tensor:
    w = x.new_empty(offsets.shape[0], g.shape[1], x.shape[1])
    for e, (start, end) in enumerate(segments(offsets, x.shape[0])):
        if start < end:
            torch.mm(g[start:end].mT, x[start:end], out=w[e])
        else:
            w[e].zero_()
    return w


FORWARD = define(
    "grouped_linear", "Tensor x, Tensor w, Tensor offsets",
    """
    x: float [T, K] strided
    w: like(x) [E, N, K] strided
    offsets: int32 [E]
    -> out: like(x) [T, N]
    """,
    reference=_forward,
)  # fmt: skip
TRANSPOSED = define(
    "grouped_linear_transposed", "Tensor g, Tensor w, Tensor offsets",
    """
    g: float [T, N] strided
    w: like(g) [E, N, K] strided
    offsets: int32 [E]
    -> out: like(g) [T, K]
    """,
    reference=_transposed,
)  # fmt: skip
OUTER = define(
    "grouped_outer", "Tensor g, Tensor x, Tensor offsets",
    """
    g: float [T, N] strided
    x: like(g) [T, K] strided
    offsets: int32 [E]
    -> out: like(x) [E, N, K]
    """,
    reference=_outer,
)  # fmt: skip


class _Bilinear(OpFunction):
    """An op that is linear in each of its first two arguments."""

    @classmethod
    def tangent(cls, ctx: Any, saved: Any, tangents: Any) -> Any:
        """Return the sum of the product rule."""
        along = {name: getattr(tangents, name) for name in cls._names[:2]}
        terms = [cls.of(saved, **{name: t}) for name, t in along.items() if t is not None]
        return sum(terms[1:], terms[0]) if terms else None


class GroupedLinear(_Bilinear):
    """y = x W^T."""

    op = FORWARD

    @classmethod
    def gradients(cls, ctx: Any, saved: Any, *gs: Any) -> dict[str, Tensor | None]:
        """Return dx = g W and dW = g^T x."""
        return {
            "x": GroupedLinearTransposed.of(saved, g=gs[0]) if cls.needs(ctx, "x") else None,
            "w": GroupedOuter.of(saved, g=gs[0]) if cls.needs(ctx, "w") else None,
        }


class GroupedLinearTransposed(_Bilinear):
    """x = g W."""

    op = TRANSPOSED

    @classmethod
    def gradients(cls, ctx: Any, saved: Any, *gs: Any) -> dict[str, Tensor | None]:
        """Return dg = u W^T and dW = g^T u, where u is the gradient of the result."""
        return {
            "g": GroupedLinear.of(saved, x=gs[0]) if cls.needs(ctx, "g") else None,
            "w": GroupedOuter.of(saved, x=gs[0]) if cls.needs(ctx, "w") else None,
        }


class GroupedOuter(_Bilinear):
    """W = g^T x."""

    op = OUTER

    @classmethod
    def gradients(cls, ctx: Any, saved: Any, *gs: Any) -> dict[str, Tensor | None]:
        """Return dg = x U^T and dx = g U, where U is the gradient of the result."""
        return {
            "g": GroupedLinear.of(saved, w=gs[0]) if cls.needs(ctx, "g") else None,
            "x": GroupedLinearTransposed.of(saved, w=gs[0]) if cls.needs(ctx, "x") else None,
        }


def grouped_linear(x: Tensor, w: Tensor, offsets: Tensor) -> Tensor:
    """Return each token times the weight of its expert, for tokens that are sorted by expert.

    Args:
        x: tokens ``[T, K]``, sorted by expert; any strides.
        w: weights ``[E, N, K]`` of the dtype of x: float32, bfloat16, float16 or float64.
        offsets: int32 ``[E]`` on the device of x: the end of each expert's tokens, ascending, as for
            ``torch._grouped_mm``. On a CPU, offsets that descend or exceed T are an error. On a GPU the result is then
            undefined, because checking them would need a sync.

    Returns:
        ``[T, N]``, summed in float32 (float64 for float64). Tokens at or beyond ``offsets[-1]`` give 0. Differentiable
        in x and w, to any order, in both modes.

    Raises:
        TypeError: if an argument is not a tensor, naming it.
        ValueError: if offsets descend or exceed T.
        RuntimeError: if a shape, dtype or device does not fit, naming the argument.
    """
    check_tensors(x=x, w=w, offsets=offsets)
    y: Tensor = FORWARD.call(x, w, offsets)
    return y
