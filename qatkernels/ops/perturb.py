"""The perturbation of sharpness-aware minimization, from a stored gradient and without a copy of the weights.

    e = factor * T^2 * g,   T = 1 (SAM) or abs(w) + eta (ASAM, where w is the tensor that is perturbed)

`perturb_` adds e to a tensor that every forward computes again, such as a quantized weight. `perturb_swap_` adds e to a
master weight and stores the old weight in the memory of the gradient. Copying it back restores every bit; subtracting e
would not, because sums are rounded. `perturbation_norms` computes the norms that ``factor`` is computed from.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..arguments import check_optional_reals, check_optional_tensors, check_reals, check_tensors
from ._op import define


def _wide(t: Tensor) -> torch.dtype:
    return torch.float64 if t.dtype == torch.float64 else torch.float32


def _perturbed(w: Tensor, g: Tensor, factor: Tensor, eta: float | None) -> Tensor:
    wide = _wide(g)
    value = w.to(wide)
    step = g.to(wide) * factor.to(wide)
    if eta is not None:
        size = value.abs() + torch.tensor(eta, dtype=wide, device=w.device)
        step = step * (size * size)
    return (value + step).to(w.dtype)


def _add(w: Tensor, g: Tensor, factor: Tensor, eta: float | None) -> None:
    w.copy_(_perturbed(w, g, factor, eta))


def _swap(w: Tensor, g: Tensor, factor: Tensor, eta: float | None) -> None:
    perturbed = _perturbed(w, g, factor, eta)
    g.copy_(w)
    w.copy_(perturbed)


def _norms(g: Tensor, w: Tensor | None, eta: float) -> Tensor:
    once = g.double()
    if w is None:
        return torch.stack([once.square().sum()] * 2)
    size = w.double().abs() + eta
    return torch.stack([(once * size).square().sum(), (once * size * size).square().sum()])


_CALL = "Tensor factor, float? eta"
_POINT = """
    require eta is None or 0 <= eta < inf; eta is {eta}, must be finite and >= 0
    factor: float32 one
"""
PERTURB = define(
    "perturb_", f"Tensor(a!) w, Tensor g, {_CALL}",
    f"""
    g: float [*S]
    w: narrow(g) [*S]
    {_POINT}
    """,
    reference=_add,
)  # fmt: skip
SWAP = define(
    "perturb_swap_", f"Tensor(a!) w, Tensor(b!) g, {_CALL}",
    f"""
    g: float [*S]
    w: like(g) [*S]
    {_POINT}
    """,
    reference=_swap,
)  # fmt: skip
NORMS = define(
    "perturbation_norms", "Tensor g, Tensor? w, float eta",
    """
    g: float [*S]
    w: narrow(g) [*S]
    require 0 <= eta < inf; eta is {eta}, must be finite and >= 0
    -> out: float64 [2]
    """,
    reference=_norms,
)  # fmt: skip


@torch.no_grad()
def perturb_(w: Tensor, g: Tensor, factor: Tensor, eta: float | None = None) -> Tensor:
    """Add ``factor * T**2 * g`` to ``w`` in place, ``T = abs(w) + eta``, or 1 if ``eta`` is None.

    Args:
        w: contiguous tensor of the dtype of ``g``, or a 16-bit dtype for a float32 ``g``.
        g: the gradient, with the shape of ``w``.
        factor: float32 tensor with one element on the same device.
        eta: the eta of ASAM; None for SAM.

    Returns:
        ``w``. Autograd does not record the change.

    Raises:
        TypeError: if an argument has another type, naming it.
        RuntimeError: if a shape, dtype, layout or device does not fit.
    """
    check_tensors(w=w, g=g, factor=factor)
    check_optional_reals(eta=eta)
    torch.ops.qatkernels.perturb_(w, g, factor, eta)
    if not torch.compiler.is_compiling():
        torch.autograd.graph.increment_version(w)
    return w


@torch.no_grad()
def perturb_swap_(w: Tensor, g: Tensor, factor: Tensor, eta: float | None = None) -> Tensor:
    """Do as :func:`perturb_`, and store the old ``w`` in ``g``: ``w.copy_(g)`` then restores it bit for bit.

    Args:
        w: contiguous tensor.
        g: the gradient: contiguous, with the shape and dtype of ``w``. It is overwritten.
        factor: float32 tensor with one element on the same device.
        eta: the eta of ASAM; None for SAM.

    Returns:
        ``w``.

    Raises:
        TypeError: if an argument has another type, naming it.
        RuntimeError: if a shape, dtype, layout or device does not fit.
    """
    check_tensors(w=w, g=g, factor=factor)
    check_optional_reals(eta=eta)
    torch.ops.qatkernels.perturb_swap_(w, g, factor, eta)
    torch.autograd.graph.increment_version((w, g))
    return w


def perturbation_norms(g: Tensor, w: Tensor | None = None, eta: float = 0.0) -> Tensor:
    """Return the sums of ``(T * g)**2`` and of ``(T**2 * g)**2``, with ``T = abs(w) + eta``, or 1 if ``w`` is None.

    Add the results of all tensors that are perturbed together. The square root of the first sum is ASAM's norm of the
    gradient. The square root of the second one, times ``factor``, is the norm of the perturbation.

    Args:
        g: the gradient.
        w: the tensor that is perturbed, with the shape and dtype of ``g`` (or 16 bits for a float32 ``g``); None for
            SAM.
        eta: the eta of ASAM.

    Returns:
        float64 tensor with two elements. The order of additions depends on the shape only.

    Raises:
        TypeError: if an argument has another type, naming it.
        RuntimeError: if a shape, dtype, layout or device does not fit.
    """
    check_tensors(g=g)
    check_optional_tensors(w=w)
    check_reals(eta=eta)
    out: Tensor = torch.ops.qatkernels.perturbation_norms(g, w, eta)
    return out
