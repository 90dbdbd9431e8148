"""Products of tokens with the weights of their experts, for tokens that are sorted by expert.

Three ops, each bilinear, whose derivatives are one another, to any order and in both modes. With x_e, g_e the rows of
expert e, which are ``offsets[e - 1] ... offsets[e] - 1``,

    grouped_linear             y_e = x_e W_e^T     x [T, K], w [E, N, K] -> y [T, N]
    grouped_linear_transposed  x_e = g_e W_e       g [T, N], w [E, N, K] -> x [T, K]
    grouped_outer              W_e = g_e^T x_e     g [T, N], x [T, K]    -> w [E, N, K]

An expert may have no rows; rows at or past the last offset belong to nobody and give 0. Any strides will do. On a CPU
each expert's product is the library's, for one expert that has tokens after another; on a GPU all are one launch, which
reads the offsets there.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..arguments import check_tensors
from ._autograd import OpFunction
from ._lowbit_linear import segments
from ._op import define


def _rows(x: Tensor, w: Tensor, offsets: Tensor) -> Tensor:
    """Multiply each expert's rows by its matrix ``[..., K, N]``."""
    y = x.new_empty(x.shape[0], w.shape[-1])
    parts = segments(offsets, x.shape[0])
    for e, (start, end) in enumerate(parts):
        if start < end:
            torch.mm(x[start:end], w[e], out=y[start:end])
    y[parts[-1][1] if parts else 0 :].zero_()
    return y


def _forward(x: Tensor, w: Tensor, offsets: Tensor) -> Tensor:
    return _rows(x, w.mT, offsets)


def _transposed(g: Tensor, w: Tensor, offsets: Tensor) -> Tensor:
    return _rows(g, w, offsets)


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
    def tangent(cls, ctx: Any, kept: Any, tangents: Any) -> Any:
        """The product rule."""
        along = {name: getattr(tangents, name) for name in cls._names[:2]}
        terms = [cls.of(kept, **{name: t}) for name, t in along.items() if t is not None]
        return sum(terms[1:], terms[0]) if terms else None


class GroupedLinear(_Bilinear):
    """y = x W^T."""

    op = FORWARD

    @classmethod
    def gradients(cls, ctx: Any, kept: Any, *gs: Any) -> dict[str, Tensor | None]:
        """Dx = g W, dW = g^T x."""
        return {
            "x": GroupedLinearTransposed.of(kept, g=gs[0]) if cls.needs(ctx, "x") else None,
            "w": GroupedOuter.of(kept, g=gs[0]) if cls.needs(ctx, "w") else None,
        }


class GroupedLinearTransposed(_Bilinear):
    """x = g W."""

    op = TRANSPOSED

    @classmethod
    def gradients(cls, ctx: Any, kept: Any, *gs: Any) -> dict[str, Tensor | None]:
        """Dg = u W^T, dW = g^T u."""
        return {
            "g": GroupedLinear.of(kept, x=gs[0]) if cls.needs(ctx, "g") else None,
            "w": GroupedOuter.of(kept, x=gs[0]) if cls.needs(ctx, "w") else None,
        }


class GroupedOuter(_Bilinear):
    """W = g^T x."""

    op = OUTER

    @classmethod
    def gradients(cls, ctx: Any, kept: Any, *gs: Any) -> dict[str, Tensor | None]:
        """Dg = x U^T, dx = g U."""
        return {
            "g": GroupedLinear.of(kept, w=gs[0]) if cls.needs(ctx, "g") else None,
            "x": GroupedLinearTransposed.of(kept, w=gs[0]) if cls.needs(ctx, "x") else None,
        }


def grouped_linear(x: Tensor, w: Tensor, offsets: Tensor) -> Tensor:
    """Return each token times the weight of its expert, for tokens that are sorted by expert.

    Args:
        x: tokens ``[T, K]``, those of expert 0 first; any strides.
        w: weights ``[E, N, K]`` of the dtype of x: float32, bfloat16, float16 or float64.
        offsets: int32 ``[E]`` on the device of x: where each expert's tokens end, ascending, as ``torch._grouped_mm``
            takes them. On a CPU offsets that descend or exceed T are an error; on a GPU, where looking would wait for
            it, the result is then undefined.

    Returns:
        ``[T, N]``, summed in float32 (float64 for float64); tokens past the last offset give 0. Differentiable in x and
        w, any order, both modes.

    Raises:
        TypeError: if an argument is no tensor, naming it.
        ValueError: if offsets descend or exceed T.
        RuntimeError: if a shape, dtype or device does not fit, naming the argument.
    """
    check_tensors(x=x, w=w, offsets=offsets)
    y: Tensor = FORWARD.call(x, w, offsets)
    return y
