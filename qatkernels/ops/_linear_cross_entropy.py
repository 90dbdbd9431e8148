"""A linear layer and softmax cross-entropy in one op: logits exist for one chunk of tokens at a time.

With z = hidden weight^T, per chunk of tokens,

    loss      l                                                     as in _cross_entropy.py
    backward  d = g * (p - e);  dh = d W,  dW = d^T h               z is computed again
    hvp       dz = th W^T + h tW^T, then d and td overwrite z and dz;
              tdh = td W + d tW,  tdW = td^T h + d^T th

The hvp serves both modes. It is the tangent of the backward along (tg, th, tW). For cotangents (uh, uW) of (dh, dW) it
is also the backward of the backward, at (th, tW) = (uh, uW), and the tangent of l is the gradient of g. The ops hold at
most two chunks of logits. In return, the backward and the hvp each compute z again.

These ops are compositions of torch's matrix products and the passes over logits in `_cross_entropy.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..arguments import check_integers, check_optional_integers, check_strings, check_tensors
from ._autograd import Composite, OpFunction
from ._cross_entropy import TARGETS, dual_of, jvp_of, number_dtype, reduced
from ._op import define

#: Default number of logits in a chunk: large enough for the products to run at full speed.
CHUNK_ELEMENTS = 2**24
#: Smallest default number of tokens in a chunk, for large vocabularies.
CHUNK_TOKENS = 128


def default_chunk(vocabulary: int) -> int:
    """Return the default number of tokens in a chunk."""
    return max(CHUNK_TOKENS, CHUNK_ELEMENTS // max(vocabulary, 1))


class _Chunks:
    """The chunks of tokens, and scratch memory for the logits of one chunk (and their tangents if ``copies`` is 2)."""

    def __init__(self, hidden: Tensor, weight: Tensor, chunk: int, copies: int) -> None:
        self.tokens = hidden.shape[0]
        self.chunk = min(chunk, max(self.tokens, 1))
        self.scratch = hidden.new_empty(copies * self.chunk, weight.shape[0])

    def __iter__(self) -> Iterator[slice]:
        return (slice(i, min(i + self.chunk, self.tokens)) for i in range(0, self.tokens, self.chunk))


class _Sum:
    """A sum of products a^T b over chunks. For 16-bit operands it is summed in float32."""

    def __init__(self, like: Tensor) -> None:
        self.dtype = like.dtype
        self.total = torch.zeros_like(like, dtype=number_dtype(like.dtype))

    def add(self, a: Tensor, b: Tensor) -> None:
        if self.dtype == self.total.dtype:
            self.total.addmm_(a.t(), b)
        else:
            self.total += torch.mm(a.t(), b)

    def result(self) -> Tensor:
        return self.total.to(self.dtype)


def _forward(hidden: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, chunk: int) -> tuple[Tensor, Tensor]:
    loss, lse = _empty_per_token(hidden), _empty_per_token(hidden)
    chunks = _Chunks(hidden, weight, chunk, 1)
    for part in chunks:
        z = chunks.scratch[: part.stop - part.start]
        torch.mm(hidden[part], weight.t(), out=z)
        torch.ops.qatkernels.cross_entropy_out(z, targets[part], ignore_index, loss[part], lse[part])
    return loss, lse


def _backward(
    g: Tensor,
    hidden: Tensor,
    weight: Tensor,
    lse: Tensor,
    targets: Tensor,
    ignore_index: int,
    chunk: int,
    want_hidden: bool,
    want_weight: bool,
) -> tuple[Tensor, Tensor]:
    dh = torch.empty_like(hidden, memory_format=torch.contiguous_format) if want_hidden else hidden.new_empty(0)
    dw = _Sum(weight) if want_weight else None
    chunks = _Chunks(hidden, weight, chunk, 1)
    for part in chunks:
        z = chunks.scratch[: part.stop - part.start]
        torch.mm(hidden[part], weight.t(), out=z)
        torch.ops.qatkernels.cross_entropy_backward_out(g[part], z, lse[part], targets[part], ignore_index, z)
        if want_hidden:
            torch.mm(z, weight, out=dh[part])
        if dw is not None:
            dw.add(z, hidden[part])
    return dh, weight.new_empty(0) if dw is None else dw.result()


def _hvp(
    tangent_hidden: Tensor | None,
    tangent_weight: Tensor | None,
    tangent_g: Tensor | None,
    g: Tensor,
    hidden: Tensor,
    weight: Tensor,
    lse: Tensor,
    targets: Tensor,
    ignore_index: int,
    chunk: int,
    want_hidden: bool,
    want_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dh = torch.empty_like(hidden, memory_format=torch.contiguous_format) if want_hidden else hidden.new_empty(0)
    dw = _Sum(weight) if want_weight else None
    tangent_loss = _empty_per_token(hidden)
    chunks = _Chunks(hidden, weight, chunk, 2)
    for part in chunks:
        z, dz, both = _logits_and_tangents(chunks, part, hidden, weight, tangent_hidden, tangent_weight)
        torch.ops.qatkernels.cross_entropy_dual_out(
            dz, None if tangent_g is None else tangent_g[part], g[part], z, lse[part], targets[part], ignore_index,
            z, dz, tangent_loss[part],
        )  # fmt: skip
        if want_hidden:
            torch.mm(dz, weight, out=dh[part])
            if tangent_weight is not None:
                dh[part].addmm_(z, tangent_weight)
        if dw is not None:
            if tangent_hidden is None:
                dw.add(dz, hidden[part])
            else:
                dw.add(both, torch.cat((tangent_hidden[part], hidden[part])))
    return dh, weight.new_empty(0) if dw is None else dw.result(), tangent_loss


def _logits_and_tangents(
    chunks: _Chunks,
    part: slice,
    hidden: Tensor,
    weight: Tensor,
    tangent_hidden: Tensor | None,
    tangent_weight: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return z, its tangent, and the memory that holds both, one after the other."""
    count = part.stop - part.start
    both = chunks.scratch[: 2 * count]
    z, dz = both[:count], both[count:]
    if tangent_hidden is None:
        torch.mm(hidden[part], weight.t(), out=z)
        if tangent_weight is None:
            dz.zero_()
        else:
            torch.mm(hidden[part], tangent_weight.t(), out=dz)
        return z, dz, both
    # One product computes both, so the weight is read once.
    torch.mm(torch.cat((hidden[part], tangent_hidden[part])), weight.t(), out=both)
    if tangent_weight is not None:
        dz.addmm_(hidden[part], tangent_weight.t())
    return z, dz, both


def _jvp(
    tangent_hidden: Tensor | None,
    tangent_weight: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    lse: Tensor,
    targets: Tensor,
    ignore_index: int,
    chunk: int,
) -> Tensor:
    tangent_loss = _empty_per_token(hidden)
    chunks = _Chunks(hidden, weight, chunk, 2)
    for part in chunks:
        z, dz, _ = _logits_and_tangents(chunks, part, hidden, weight, tangent_hidden, tangent_weight)
        torch.ops.qatkernels.cross_entropy_jvp_out(dz, z, lse[part], targets[part], ignore_index, tangent_loss[part])
    return tangent_loss


def _empty_per_token(hidden: Tensor) -> Tensor:
    """Return an uninitialized tensor with one number per token, in the dtype of losses."""
    return hidden.new_empty(hidden.shape[0], dtype=number_dtype(hidden.dtype))


_POINT = "Tensor hidden, Tensor weight, Tensor lse, Tensor targets, int ignore_index, int chunk"
_TANGENTS, _WANT = "Tensor? tangent_hidden, Tensor? tangent_weight", "bool want_hidden, bool want_weight"
_PRODUCT = f"""
    hidden: float [T, F]
    weight: like(hidden) [V, F]
    require V > 0; weight has shape ({{V}}, {{F}}), must be [vocabulary, features], the vocabulary not empty
    require chunk > 0; chunk is {{chunk}}, must be positive
    {TARGETS}
"""
_SECOND = """
    tangent_hidden: like(hidden) [T, F]
    tangent_weight: like(hidden) [V, F]
"""
_G = """
    g: wide(hidden) [T]
    lse: wide(hidden) [T]
"""
FORWARD = define(
    "linear_cross_entropy", "Tensor hidden, Tensor weight, Tensor targets, int ignore_index, int chunk",
    f"""
    {_PRODUCT}
    -> loss: wide(hidden) [T]
    -> lse: wide(hidden) [T]
    """,
    reference=_forward,
)  # fmt: skip
BACKWARD = define(
    "linear_cross_entropy_backward", f"Tensor g, {_POINT}, {_WANT}",
    f"""
    {_PRODUCT}
    {_G}
    -> grad_hidden: like(hidden) [T, F] if want_hidden else [0]
    -> grad_weight: like(hidden) [V, F] if want_weight else [0]
    """,
    reference=_backward,
)  # fmt: skip
JVP = define(
    "linear_cross_entropy_jvp", f"{_TANGENTS}, {_POINT}",
    f"""
    {_PRODUCT}
    {_SECOND}
    lse: wide(hidden) [T]
    -> tangent_loss: wide(hidden) [T]
    """,
    reference=_jvp,
)  # fmt: skip
HVP = define(
    "linear_cross_entropy_hvp", f"{_TANGENTS}, Tensor? tangent_g, Tensor g, {_POINT}, {_WANT}",
    f"""
    {_PRODUCT}
    {_SECOND}
    tangent_g: wide(hidden) [T]
    {_G}
    -> tangent_grad_hidden: like(hidden) [T, F] if want_hidden else [0]
    -> tangent_grad_weight: like(hidden) [V, F] if want_weight else [0]
    -> tangent_loss: wide(hidden) [T]
    """,
    reference=_hvp,
)  # fmt: skip


class LinearCrossEntropy(OpFunction):
    """(loss, lse). lse is needed by the derivatives; autograd treats it as a constant."""

    op = FORWARD
    saves = ("hidden", "weight", "lse", "targets")

    @classmethod
    def save_more(cls, ctx: Any, call: Any, output: tuple[Tensor, Tensor]) -> None:
        """Mark lse as not differentiable."""
        ctx.mark_non_differentiable(output[1])

    @classmethod
    def gradients(cls, ctx: Any, saved: Any, *gs: Any) -> dict[str, Tensor | None]:
        """Return the backward."""
        want = {f"want_{name}": cls.needs(ctx, name) for name in ("hidden", "weight")}
        if gs[0] is None or not any(want.values()):
            return {}
        return _by_name(LinearCrossEntropyBackward.of(saved, g=gs[0], **want), **want)

    @classmethod
    def tangent(cls, ctx: Any, saved: Any, tangents: Any) -> Any:
        """Return the jvp."""
        if tangents.hidden is None and tangents.weight is None:
            return None, None
        along = {"tangent_hidden": tangents.hidden, "tangent_weight": tangents.weight}
        return LinearCrossEntropyJvp.of(saved, **along), None


class LinearCrossEntropyBackward(OpFunction):
    """Gradients of hidden and weight from g. In both modes, the derivative along (g, hidden, weight) is the hvp."""

    op = BACKWARD

    @classmethod
    def gradients(cls, ctx: Any, saved: Any, *gs: Any) -> dict[str, Tensor | None]:
        """Return the hvp along the cotangents of the gradients that were computed."""
        along = _by_name(gs, saved.want_hidden, saved.want_weight)
        if all(v is None for v in along.values()):
            return {}
        want = {f"want_{name}": cls.needs(ctx, name) for name in ("hidden", "weight")}
        tangents = {f"tangent_{name}": v for name, v in along.items()}
        *grads, along_g = LinearCrossEntropyHvp.of(saved, **tangents, tangent_g=None, **want)
        return {"g": along_g, **_by_name(grads, **want)}

    @classmethod
    def tangent(cls, ctx: Any, saved: Any, tangents: Any) -> Any:
        """Return the hvp; if hidden and weight have no tangent, the backward of the tangent of g."""
        if tangents.hidden is None and tangents.weight is None:
            return (None, None) if tangents.g is None else LinearCrossEntropyBackward.of(saved, g=tangents.g)
        along = {"tangent_hidden": tangents.hidden, "tangent_weight": tangents.weight, "tangent_g": tangents.g}
        return LinearCrossEntropyHvp.of(saved, **along)[:2]


def _by_name(pair: Any, want_hidden: bool, want_weight: bool) -> dict[str, Tensor | None]:
    """Return the tensors for hidden and for weight by name, None for one that is not wanted."""
    hidden, weight = pair
    return {"hidden": hidden if want_hidden else None, "weight": weight if want_weight else None}


def _differentiable_logits(
    tangent_hidden: Any, tangent_weight: Any, hidden: Tensor, weight: Tensor, targets: Tensor, ignore_index: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return z, its tangent and lse, all of them differentiable functions of hidden and weight."""
    z = hidden @ weight.t()
    dz = torch.zeros_like(z)
    if tangent_hidden is not None:
        dz = dz + tangent_hidden @ weight.t()
    if tangent_weight is not None:
        dz = dz + hidden @ tangent_weight.t()
    lse = torch.logsumexp(z.to(number_dtype(z.dtype)), 1).masked_fill(targets == ignore_index, 0.0)
    return z, dz, lse


def _differentiable_jvp(
    tangent_hidden: Any, tangent_weight: Any, hidden: Tensor, weight: Tensor, _lse: Tensor, targets: Tensor,
    ignore_index: int, _chunk: int,
) -> Tensor:  # fmt: skip
    """Return the jvp as a differentiable function, without chunks."""
    z, dz, lse = _differentiable_logits(tangent_hidden, tangent_weight, hidden, weight, targets, ignore_index)
    return jvp_of(dz, z, lse, targets, ignore_index)


def _differentiable_hvp(
    tangent_hidden: Any, tangent_weight: Any, tangent_g: Any, g: Tensor, hidden: Tensor, weight: Tensor, _lse: Tensor,
    targets: Tensor, ignore_index: int, _chunk: int, want_hidden: bool, want_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the hvp as a differentiable function, without chunks."""
    z, dz, lse = _differentiable_logits(tangent_hidden, tangent_weight, hidden, weight, targets, ignore_index)
    d, dd, tangent_loss = dual_of(dz, tangent_g, g, z, lse, targets, ignore_index)
    dh, dw = dd @ weight, dd.t() @ hidden
    if tangent_weight is not None:
        dh = dh + d @ tangent_weight
    if tangent_hidden is not None:
        dw = dw + d.t() @ tangent_hidden
    return dh if want_hidden else dh.new_empty(0), dw if want_weight else dw.new_empty(0), tangent_loss


class LinearCrossEntropyJvp(Composite):
    """The tangent of the loss."""

    op = JVP
    differentiable = ("tangent_hidden", "tangent_weight", "hidden", "weight")
    formula = staticmethod(_differentiable_jvp)


class LinearCrossEntropyHvp(Composite):
    """Tangents of both gradients and of the loss."""

    op = HVP
    differentiable = ("tangent_hidden", "tangent_weight", "tangent_g", "g", "hidden", "weight")
    formula = staticmethod(_differentiable_hvp)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    chunk_tokens: int | None = None,
) -> Tensor:
    """Return the cross-entropy of ``hidden @ weight.T``, with the logits of one chunk of tokens at a time in memory.

    Loss, gradients and Hessian-vector products are those of ``cross_entropy(F.linear(hidden, weight), targets)``. They
    take one more product of hidden and weight in the backward, and one more in the second backward.

    Args:
        hidden: ``[..., K]``, float32, bfloat16, float16 or float64; cast under autocast, as in F.linear.
        weight: ``[V, K]`` of the same dtype.
        targets: int64 ``[...]``. A target outside ``[0, V)`` that is not ``ignore_index`` gives NaN.
        ignore_index: target of tokens to ignore.
        reduction: ``"mean"`` over the tokens that are not ignored, ``"sum"``, or ``"none"``.
        chunk_tokens: tokens in a chunk. If None, as many as have 2^24 logits together, but at least 128.

    Returns:
        The loss in float32 (float64 for float64 logits): a scalar, or ``[...]`` with ``"none"``.

    Raises:
        TypeError: if an argument has another type, naming it.
        ValueError: if ``reduction`` is unknown, ``chunk_tokens`` is not positive, or shapes do not fit.
        RuntimeError: if a dtype or device does not fit.
    """
    check_tensors(hidden=hidden, weight=weight, targets=targets)
    check_integers(ignore_index=ignore_index)
    check_optional_integers(chunk_tokens=chunk_tokens)
    check_strings(reduction=reduction)
    if weight.ndim != 2 or hidden.ndim == 0 or hidden.shape[-1] != weight.shape[1] or 0 in weight.shape:
        raise ValueError(
            f"hidden has shape {tuple(hidden.shape)} and weight {tuple(weight.shape)}, must be [..., K] and [V, K]"
        )
    if targets.shape != hidden.shape[:-1]:
        raise ValueError(f"targets has shape {tuple(targets.shape)}, must be {tuple(hidden.shape[:-1])}")
    if chunk_tokens is not None and chunk_tokens <= 0:
        raise ValueError(f"chunk_tokens is {chunk_tokens}, must be positive")
    device = hidden.device.type
    if device != "meta" and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        hidden, weight = (t if t.dtype == torch.float64 else t.to(dtype) for t in (hidden, weight))
    args = (
        hidden.reshape(targets.numel(), hidden.shape[-1]), weight, targets.reshape(-1), ignore_index,
        chunk_tokens or default_chunk(weight.shape[0]),
    )  # fmt: skip
    loss = FORWARD.call(*args)[0].view(targets.shape)
    return reduced(loss, targets, ignore_index, reduction)
