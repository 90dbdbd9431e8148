"""Softmax cross-entropy whose second derivative is one pass over the logits.

Per row, with p = softmax(z), e the one-hot target and lse = log(sum(exp(z))),

    loss      l  = lse - z[target]
    jvp       dl = (p - e) . dz                                          linear in dz
    backward  b  = g * (p - e)                                           its transpose
    hvp       db = g * p * (dz - p . dz) + dg * (p - e)                  the backward's tangent

The hvp is symmetric in dz, so it is also the backward's own backward, where `p . dz - dz[target]` is the gradient of g.
`dual` gives b and db in one pass, possibly over the logits and the tangent themselves: the fused linear layer of
`linear_cross_entropy.py` needs both. Only lse is kept for the backward. Third derivatives go through plain PyTorch.

Arithmetic is float32 (float64 for float64 logits); losses, lse and g have that dtype. A row whose target is
``ignore_index`` has loss and gradients 0, whatever its logits. A target outside the vocabulary makes its row NaN: an
error would have to wait for a GPU.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..arguments import check_integers, check_strings, check_tensors
from ._autograd import Composite, OpFunction
from ._op import define


def number_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which rows of logits are computed with."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class _Rows:
    """Logits in the computing dtype, and what the targets say of each row."""

    def __init__(self, logits: Tensor, targets: Tensor, ignore_index: int) -> None:
        self.logits = logits
        self.z = logits.to(number_dtype(logits.dtype))
        self.ignored = targets == ignore_index
        self.outside = ~self.ignored & ((targets < 0) | (targets >= logits.shape[1]))
        self.index = targets.where(~(self.ignored | self.outside), 0).unsqueeze(1)

    def numbers(self, x: Tensor) -> Tensor:
        """One number per row, after what the target says."""
        return x.masked_fill(self.outside, torch.nan).masked_fill(self.ignored, 0.0)

    def at_target(self, t: Tensor) -> Tensor:
        """The element of each row that its target names."""
        return t.gather(1, self.index).squeeze(1)

    def minus_target(self, p: Tensor) -> Tensor:
        """P minus e."""
        return p.scatter_add(1, self.index, p.new_full(self.index.shape, -1.0))

    def full(self, t: Tensor) -> Tensor:
        """A tensor like the logits, after what the targets say."""
        t = t.masked_fill(self.outside.unsqueeze(1), torch.nan).masked_fill(self.ignored.unsqueeze(1), 0.0)
        return t.to(self.logits.dtype)


def _forward(logits: Tensor, targets: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    rows = _Rows(logits, targets, ignore_index)
    lse = torch.logsumexp(rows.z, 1)
    return rows.numbers(lse - rows.at_target(rows.z)), lse.masked_fill(rows.ignored, 0.0)


def jvp_of(tangent: Tensor, logits: Tensor, lse: Tensor, targets: Tensor, ignore_index: int) -> Tensor:
    """The tangent of the loss, in plain PyTorch."""
    rows = _Rows(logits, targets, ignore_index)
    tangent = tangent.to(rows.z.dtype)
    p = torch.exp(rows.z - lse.unsqueeze(1))
    return rows.numbers((p * tangent).sum(1) - rows.at_target(tangent))


def _backward(g: Tensor, logits: Tensor, lse: Tensor, targets: Tensor, ignore_index: int) -> Tensor:
    rows = _Rows(logits, targets, ignore_index)
    return rows.full(g.unsqueeze(1) * rows.minus_target(torch.exp(rows.z - lse.unsqueeze(1))))


def dual_of(
    tangent: Tensor,
    tangent_g: Tensor | None,
    g: Tensor,
    logits: Tensor,
    lse: Tensor,
    targets: Tensor,
    ignore_index: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient, its tangent and the tangent of the loss, in plain PyTorch."""
    rows = _Rows(logits, targets, ignore_index)
    tangent = tangent.to(rows.z.dtype)
    p = torch.exp(rows.z - lse.unsqueeze(1))
    mean, off = (p * tangent).sum(1), rows.minus_target(p)
    second = g.unsqueeze(1) * p * (tangent - mean.unsqueeze(1))
    if tangent_g is not None:
        second = second + tangent_g.unsqueeze(1) * off
    return rows.full(g.unsqueeze(1) * off), rows.full(second), rows.numbers(mean - rows.at_target(tangent))


def _hvp(*args: Any) -> tuple[Tensor, Tensor]:
    return dual_of(*args)[1:]


_POINT = "Tensor logits, Tensor lse, Tensor targets, int ignore_index"
#: The contract of targets, of which there is one for each of T tokens.
TARGETS = "targets: int64 [T]"
_LOGITS = f"""
    logits: float [T, V]
    require V > 0; logits has shape ({{T}}, {{V}}), must be [tokens, vocabulary], the vocabulary not empty
    {TARGETS}
"""
_SECOND = f"""
    {_LOGITS}
    tangent: like(logits) [T, V]
    tangent_g: wide(logits) [T]
    g: wide(logits) [T]
    lse: wide(logits) [T]
"""
FORWARD = define(
    "cross_entropy", "Tensor logits, Tensor targets, int ignore_index",
    f"""
    {_LOGITS}
    -> loss: wide(logits) [T]
    -> lse: wide(logits) [T]
    """,
    reference=_forward,
)  # fmt: skip
JVP = define(
    "cross_entropy_jvp", f"Tensor tangent, {_POINT}",
    f"""
    {_LOGITS}
    tangent: like(logits) [T, V]
    lse: wide(logits) [T]
    -> tangent_loss: wide(logits) [T]
    """,
    reference=jvp_of,
)  # fmt: skip
BACKWARD = define(
    "cross_entropy_backward", f"Tensor g, {_POINT}",
    f"""
    {_LOGITS}
    g: wide(logits) [T]
    lse: wide(logits) [T]
    -> grad: like(logits) [T, V]
    """,
    reference=_backward,
)  # fmt: skip
HVP = define(
    "cross_entropy_hvp", f"Tensor tangent, Tensor? tangent_g, Tensor g, {_POINT}",
    f"""
    {_SECOND}
    -> tangent_grad: like(logits) [T, V]
    -> tangent_loss: wide(logits) [T]
    """,
    reference=_hvp,
)  # fmt: skip
DUAL = define(
    "cross_entropy_dual", f"Tensor tangent, Tensor? tangent_g, Tensor g, {_POINT}",
    f"""
    {_SECOND}
    -> grad: like(logits) [T, V]
    -> tangent_grad: like(logits) [T, V]
    -> tangent_loss: wide(logits) [T]
    """,
    reference=dual_of,
)  # fmt: skip


class CrossEntropy(OpFunction):
    """(loss, lse) of logits; lse is for the derivatives, and constant to autograd."""

    op = FORWARD
    saves = ("logits", "lse", "targets")

    @classmethod
    def keep(cls, ctx: Any, call: Any, output: tuple[Tensor, Tensor]) -> None:
        """Let lse have no derivative."""
        ctx.mark_non_differentiable(output[1])

    @classmethod
    def gradients(cls, ctx: Any, kept: Any, *gs: Any) -> dict[str, Tensor | None]:
        """The backward."""
        return {} if gs[0] is None else {"logits": CrossEntropyBackward.of(kept, g=gs[0])}

    @classmethod
    def tangent(cls, ctx: Any, kept: Any, tangents: Any) -> Any:
        """The jvp."""
        if tangents.logits is None:
            return None, None
        return CrossEntropyJvp.of(kept, tangent=tangents.logits), None


class CrossEntropyBackward(OpFunction):
    """The gradient of logits from g: linear in g, and its derivative along logits is the hvp."""

    op = BACKWARD

    @classmethod
    def gradients(cls, ctx: Any, kept: Any, *gs: Any) -> dict[str, Tensor | None]:
        """The hvp along the cotangent: it is symmetric in logits."""
        along_logits, along_g = CrossEntropyHvp.of(kept, tangent=gs[0], tangent_g=None)
        return {"g": along_g, "logits": along_logits}

    @classmethod
    def tangent(cls, ctx: Any, kept: Any, tangents: Any) -> Any:
        """The hvp, or where logits do not move the backward of the tangent."""
        if tangents.logits is None:
            return None if tangents.g is None else CrossEntropyBackward.of(kept, g=tangents.g)
        return CrossEntropyHvp.of(kept, tangent=tangents.logits, tangent_g=tangents.g)[0]


class CrossEntropyJvp(OpFunction):
    """The tangent of the loss from the tangent of logits: linear in it, its transpose is the backward."""

    op = JVP

    @classmethod
    def gradients(cls, ctx: Any, kept: Any, *gs: Any) -> dict[str, Tensor | None]:
        """The backward, and the hvp."""
        g, found = gs[0], {}
        if cls.needs(ctx, "tangent"):
            found["tangent"] = CrossEntropyBackward.of(kept, g=g)
        if cls.needs(ctx, "logits"):
            found["logits"] = CrossEntropyHvp.of(kept, tangent_g=None, g=g)[0]
        return found

    @classmethod
    def tangent(cls, ctx: Any, kept: Any, tangents: Any) -> Any:
        """The jvp of the second direction, and the curvature between the two."""
        total = None
        if tangents.tangent is not None:
            total = CrossEntropyJvp.of(kept, tangent=tangents.tangent)
        if tangents.logits is not None:
            # The curvature between two directions: (p * (dz - p . dz)) . dz'.
            ones = torch.ones_like(kept.lse)
            curved, _ = CrossEntropyHvp.of(kept, tangent_g=None, g=ones)
            curvature = (curved.to(ones.dtype) * tangents.logits.to(ones.dtype)).sum(1)
            total = curvature if total is None else total + curvature
        return total


def _plain_hvp(
    tangent: Tensor, tangent_g: Any, g: Tensor, logits: Tensor, _lse: Tensor, targets: Tensor, ignore_index: int
) -> tuple[Tensor, Tensor]:
    # lse as the function of logits that it is.
    lse = torch.logsumexp(logits.to(g.dtype), 1).masked_fill(targets == ignore_index, 0.0)
    return _hvp(tangent, tangent_g, g, logits, lse, targets, ignore_index)


class CrossEntropyHvp(Composite):
    """(tangent of the gradient, tangent of the loss)."""

    op = HVP
    differentiable = ("tangent", "tangent_g", "g", "logits")
    formula = staticmethod(_plain_hvp)


def reduced(loss: Tensor, targets: Tensor, ignore_index: int, reduction: str) -> Tensor:
    """Return losses per token, their sum, or their mean over the tokens that are not ignored.

    Raises:
        ValueError: if ``reduction`` is another word.
    """
    if reduction == "none":
        return loss
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction is {reduction!r}, must be 'mean', 'sum' or 'none'")
    total = loss.sum()
    return total if reduction == "sum" else total / (targets != ignore_index).sum()


def cross_entropy(logits: Tensor, targets: Tensor, *, ignore_index: int = -100, reduction: str = "mean") -> Tensor:
    """Softmax cross-entropy, for gradients and Hessian-vector products with one tensor of logits' size at a time.

    Args:
        logits: ``[..., V]``, float32, bfloat16, float16 or float64.
        targets: int64 class indices ``[...]``; one outside ``[0, V)`` that is not ``ignore_index`` gives NaN.
        ignore_index: the target of tokens that do not count.
        reduction: ``"mean"`` over the tokens that count, ``"sum"``, or ``"none"``.

    Returns:
        The loss in float32 (float64 for float64 logits): a scalar, or ``[...]`` with ``"none"``.

    Raises:
        TypeError: if an argument is of another type, naming it.
        ValueError: if ``reduction`` is none of the three, or the shapes of logits and targets do not fit.
        RuntimeError: if a dtype or device does not fit.
    """
    check_tensors(logits=logits, targets=targets)
    check_integers(ignore_index=ignore_index)
    check_strings(reduction=reduction)
    if logits.ndim == 0 or logits.shape[-1] == 0:
        raise ValueError(f"logits has shape {tuple(logits.shape)}, must be [..., vocabulary], the vocabulary not empty")
    if targets.shape != logits.shape[:-1]:
        raise ValueError(
            f"targets has shape {tuple(targets.shape)}, must be {tuple(logits.shape[:-1])} for logits of shape "
            f"{tuple(logits.shape)}"
        )
    args = (logits.reshape(targets.numel(), logits.shape[-1]), targets.reshape(-1), ignore_index)
    loss = FORWARD.call(*args)[0].view(targets.shape)
    return reduced(loss, targets, ignore_index, reduction)
