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
from ._op import Function, define, nothing_to_differentiate
from .lowbit_linear import segments


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


class _Bilinear(Function):
    """An op that is linear in each of two tensors; ``across`` gives what each of them meets in a backward."""

    op: Any

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)
        ctx.set_materialize_grads(False)

    @classmethod
    def product_rule(cls, ctx: Any, along_a: Tensor | None, along_b: Tensor | None) -> Tensor | None:
        """Return the tangent."""
        a, b, offsets = ctx.saved_tensors
        terms = [cls.apply(along_a, b, offsets)] if along_a is not None else []
        terms += [cls.apply(a, along_b, offsets)] if along_b is not None else []
        return sum(terms[1:], terms[0]) if terms else None


class GroupedLinear(_Bilinear):
    """y = x W^T."""

    @staticmethod
    def forward(*args: Any) -> Tensor:
        return Function.run(torch.ops.qatkernels.grouped_linear.default, *args)

    @staticmethod
    def backward(ctx: Any, g: Tensor | None) -> Any:
        x, w, offsets = ctx.saved_tensors
        dx = GroupedLinearTransposed.apply(g, w, offsets) if g is not None and ctx.needs_input_grad[0] else None
        dw = GroupedOuter.apply(g, x, offsets) if g is not None and ctx.needs_input_grad[1] else None
        return dx, dw, None

    @staticmethod
    def jvp(ctx: Any, along_x: Any, along_w: Any, _: Any) -> Any:
        return GroupedLinear.product_rule(ctx, along_x, along_w)


class GroupedLinearTransposed(_Bilinear):
    """x = g W."""

    @staticmethod
    def forward(*args: Any) -> Tensor:
        return Function.run(torch.ops.qatkernels.grouped_linear_transposed.default, *args)

    @staticmethod
    def backward(ctx: Any, u: Tensor | None) -> Any:
        g, w, offsets = ctx.saved_tensors
        dg = GroupedLinear.apply(u, w, offsets) if u is not None and ctx.needs_input_grad[0] else None
        dw = GroupedOuter.apply(g, u, offsets) if u is not None and ctx.needs_input_grad[1] else None
        return dg, dw, None

    @staticmethod
    def jvp(ctx: Any, along_g: Any, along_w: Any, _: Any) -> Any:
        return GroupedLinearTransposed.product_rule(ctx, along_g, along_w)


class GroupedOuter(_Bilinear):
    """W = g^T x."""

    @staticmethod
    def forward(*args: Any) -> Tensor:
        return Function.run(torch.ops.qatkernels.grouped_outer.default, *args)

    @staticmethod
    def backward(ctx: Any, u: Tensor | None) -> Any:
        g, x, offsets = ctx.saved_tensors
        dg = GroupedLinear.apply(x, u, offsets) if u is not None and ctx.needs_input_grad[0] else None
        dx = GroupedLinearTransposed.apply(g, u, offsets) if u is not None and ctx.needs_input_grad[1] else None
        return dg, dx, None

    @staticmethod
    def jvp(ctx: Any, along_g: Any, along_x: Any, _: Any) -> Any:
        return GroupedOuter.product_rule(ctx, along_g, along_x)


for _op, _function in ((FORWARD, GroupedLinear), (TRANSPOSED, GroupedLinearTransposed), (OUTER, GroupedOuter)):
    torch.library.register_autograd(
        f"qatkernels::{_op.name}",
        _function.backward,
        setup_context=lambda ctx, inputs, output, f=_function: f.setup_context(ctx, inputs, output),
    )


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
    op = torch.ops.qatkernels.grouped_linear.default
    if torch.compiler.is_compiling():
        return op(x, w, offsets)
    return Function.run(op, x, w, offsets) if nothing_to_differentiate(x, w) else GroupedLinear.apply(x, w, offsets)
