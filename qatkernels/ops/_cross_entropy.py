"""Softmax cross-entropy whose second derivative takes one pass over the logits.

Per row, with p = softmax(z), e the one-hot target and lse = log(sum(exp(z))),

    loss      l  = lse - z[target]
    jvp       dl = (p - e) . dz                                          linear in dz
    backward  b  = g * (p - e)                                           its transpose
    hvp       db = g * p * (dz - p . dz) + dg * (p - e)                  the tangent of the backward

The hvp is symmetric in dz, so it is also the backward of the backward; there `p . dz - dz[target]` is the gradient of
g. `dual` computes b and db in one pass, and may write them over the logits and the tangent. The fused linear layer in
`_linear_cross_entropy.py` needs both. Beside the inputs only lse is saved for the backward. Third derivatives are those
of a formula in plain PyTorch.

Arithmetic is in float32 (float64 for float64 logits); losses, lse and g have that dtype. A row whose target is
``ignore_index`` has loss 0 and gradient 0, whatever its logits are. A target outside the vocabulary makes its row NaN,
because raising an error would need a sync with the GPU.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..arguments import check_integers, check_strings, check_tensors
from ._autograd import Composite, OpFunction
from ._op import define


def number_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype that computations with logits of a dtype use."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class _Rows:
    """Logits in the computing dtype, and which rows are ignored or have a target outside the vocabulary."""

    def __init__(self, logits: Tensor, targets: Tensor, ignore_index: int) -> None:
        self.logits = logits
        self.z = logits.to(number_dtype(logits.dtype))
        self.ignored = targets == ignore_index
        self.outside = ~self.ignored & ((targets < 0) | (targets >= logits.shape[1]))
        self.index = targets.where(~(self.ignored | self.outside), 0).unsqueeze(1)

    def mask_per_row(self, x: Tensor) -> Tensor:
        """Return ``x [tokens]`` with 0 in ignored rows and NaN in rows whose target is outside the vocabulary."""
        return x.masked_fill(self.outside, torch.nan).masked_fill(self.ignored, 0.0)

    def at_target(self, t: Tensor) -> Tensor:
        """Return the element of each row at its target."""
        return t.gather(1, self.index).squeeze(1)

    def minus_target(self, p: Tensor) -> Tensor:
        """Return p - e."""
        return p.scatter_add(1, self.index, p.new_full(self.index.shape, -1.0))

    def mask_logits(self, t: Tensor) -> Tensor:
        """Return a tensor like the logits, in their dtype, masked as by :meth:`mask_per_row`."""
        t = t.masked_fill(self.outside.unsqueeze(1), torch.nan).masked_fill(self.ignored.unsqueeze(1), 0.0)
        return t.to(self.logits.dtype)


def _forward(logits: Tensor, targets: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    rows = _Rows(logits, targets, ignore_index)
    lse = torch.logsumexp(rows.z, 1)
    return rows.mask_per_row(lse - rows.at_target(rows.z)), lse.masked_fill(rows.ignored, 0.0)


def jvp_of(tangent: Tensor, logits: Tensor, lse: Tensor, targets: Tensor, ignore_index: int) -> Tensor:
    """Return the tangent of the loss, in plain PyTorch."""
    rows = _Rows(logits, targets, ignore_index)
    tangent = tangent.to(rows.z.dtype)
    p = torch.exp(rows.z - lse.unsqueeze(1))
    return rows.mask_per_row((p * tangent).sum(1) - rows.at_target(tangent))


def _backward(g: Tensor, logits: Tensor, lse: Tensor, targets: Tensor, ignore_index: int) -> Tensor:
    rows = _Rows(logits, targets, ignore_index)
    return rows.mask_logits(g.unsqueeze(1) * rows.minus_target(torch.exp(rows.z - lse.unsqueeze(1))))


def dual_of(
    tangent: Tensor,
    tangent_g: Tensor | None,
    g: Tensor,
    logits: Tensor,
    lse: Tensor,
    targets: Tensor,
    ignore_index: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradient, the tangent of the gradient and the tangent of the loss, in plain PyTorch."""
    rows = _Rows(logits, targets, ignore_index)
    tangent = tangent.to(rows.z.dtype)
    p = torch.exp(rows.z - lse.unsqueeze(1))
    mean, difference = (p * tangent).sum(1), rows.minus_target(p)
    tangent_grad = g.unsqueeze(1) * p * (tangent - mean.unsqueeze(1))
    if tangent_g is not None:
        tangent_grad = tangent_grad + tangent_g.unsqueeze(1) * difference
    return (
        rows.mask_logits(g.unsqueeze(1) * difference),
        rows.mask_logits(tangent_grad),
        rows.mask_per_row(mean - rows.at_target(tangent)),
    )


def _hvp(*args: Any) -> tuple[Tensor, Tensor]:
    return dual_of(*args)[1:]


_POINT = "Tensor logits, Tensor lse, Tensor targets, int ignore_index"
#: The contract of targets: one for each of the T tokens.
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
    """(loss, lse) of logits. lse is needed by the derivatives; autograd treats it as a constant."""

    op = FORWARD
    saves = ("logits", "lse", "targets")

    @classmethod
    def save_more(cls, ctx: Any, call: Any, output: tuple[Tensor, Tensor]) -> None:
        """Mark lse as not differentiable."""
        ctx.mark_non_differentiable(output[1])

    @classmethod
    def gradients(cls, ctx: Any, saved: Any, *gs: Any) -> dict[str, Tensor | None]:
        """Return the backward."""
        return {} if gs[0] is None else {"logits": CrossEntropyBackward.of(saved, g=gs[0])}

    @classmethod
    def tangent(cls, ctx: Any, saved: Any, tangents: Any) -> Any:
        """Return the jvp."""
        if tangents.logits is None:
            return None, None
        return CrossEntropyJvp.of(saved, tangent=tangents.logits), None


class CrossEntropyBackward(OpFunction):
    """The gradient of logits from g. It is linear in g; its derivative with respect to logits is the hvp."""

    op = BACKWARD

    @classmethod
    def gradients(cls, ctx: Any, saved: Any, *gs: Any) -> dict[str, Tensor | None]:
        """Return the hvp along the cotangent: the Hessian is symmetric."""
        along_logits, along_g = CrossEntropyHvp.of(saved, tangent=gs[0], tangent_g=None)
        return {"g": along_g, "logits": along_logits}

    @classmethod
    def tangent(cls, ctx: Any, saved: Any, tangents: Any) -> Any:
        """Return the hvp; if logits have no tangent, the backward of the tangent of g."""
        if tangents.logits is None:
            return None if tangents.g is None else CrossEntropyBackward.of(saved, g=tangents.g)
        return CrossEntropyHvp.of(saved, tangent=tangents.logits, tangent_g=tangents.g)[0]


class CrossEntropyJvp(OpFunction):
    """The tangent of the loss from the tangent of logits. It is linear in that; its transpose is the backward."""

    op = JVP

    @classmethod
    def gradients(cls, ctx: Any, saved: Any, *gs: Any) -> dict[str, Tensor | None]:
        """Return the backward for the tangent, and the hvp for logits."""
        g, grads = gs[0], {}
        if cls.needs(ctx, "tangent"):
            grads["tangent"] = CrossEntropyBackward.of(saved, g=g)
        if cls.needs(ctx, "logits"):
            grads["logits"] = CrossEntropyHvp.of(saved, tangent_g=None, g=g)[0]
        return grads

    @classmethod
    def tangent(cls, ctx: Any, saved: Any, tangents: Any) -> Any:
        """Return the jvp of the tangent's tangent, plus the curvature between both directions."""
        total = None
        if tangents.tangent is not None:
            total = CrossEntropyJvp.of(saved, tangent=tangents.tangent)
        if tangents.logits is not None:
            # The curvature between two directions: (p * (dz - p . dz)) . dz'.
            ones = torch.ones_like(saved.lse)
            product, _ = CrossEntropyHvp.of(saved, tangent_g=None, g=ones)
            curvature = (product.to(ones.dtype) * tangents.logits.to(ones.dtype)).sum(1)
            total = curvature if total is None else total + curvature
        return total


def _differentiable_hvp(
    tangent: Tensor, tangent_g: Any, g: Tensor, logits: Tensor, _lse: Tensor, targets: Tensor, ignore_index: int
) -> tuple[Tensor, Tensor]:
    """Return the hvp as a differentiable function of logits: lse is computed here, not taken as a constant."""
    lse = torch.logsumexp(logits.to(g.dtype), 1).masked_fill(targets == ignore_index, 0.0)
    return _hvp(tangent, tangent_g, g, logits, lse, targets, ignore_index)


class CrossEntropyHvp(Composite):
    """(tangent of the gradient, tangent of the loss)."""

    op = HVP
    differentiable = ("tangent", "tangent_g", "g", "logits")
    formula = staticmethod(_differentiable_hvp)


def reduced(loss: Tensor, targets: Tensor, ignore_index: int, reduction: str) -> Tensor:
    """Return losses per token, their sum, or their mean over the tokens that are not ignored.

    Raises:
        ValueError: if ``reduction`` is not ``"mean"``, ``"sum"`` or ``"none"``.
    """
    if reduction == "none":
        return loss
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction is {reduction!r}, must be 'mean', 'sum' or 'none'")
    total = loss.sum()
    return total if reduction == "sum" else total / (targets != ignore_index).sum()


def cross_entropy(logits: Tensor, targets: Tensor, *, ignore_index: int = -100, reduction: str = "mean") -> Tensor:
    """Return softmax cross-entropy. Gradients and Hessian-vector products allocate only their result at logits' size.

    Args:
        logits: ``[..., V]``, float32, bfloat16, float16 or float64.
        targets: int64 class indices ``[...]``. A target outside ``[0, V)`` that is not ``ignore_index`` gives NaN.
        ignore_index: target of tokens to ignore.
        reduction: ``"mean"`` over the tokens that are not ignored, ``"sum"``, or ``"none"``.

    Returns:
        The loss in float32 (float64 for float64 logits): a scalar, or ``[...]`` with ``"none"``.

    Raises:
        TypeError: if an argument has another type, naming it.
        ValueError: if ``reduction`` is unknown, or the shapes of logits and targets do not fit.
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
