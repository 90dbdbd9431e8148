"""The perturbation of sharpness-aware minimization, along a stored gradient and without a copy of the weights.

    e = factor * T^2 * g,   T = 1 (SAM) or abs(w) + eta (ASAM, at the tensor that is perturbed)

`perturb_` adds it to a tensor that is made anew in every forward, such as a quantized weight. `perturb_swap_` adds it
to a master weight and leaves the old weight where the gradient was, so that copying it back restores every bit: a
difference of rounded sums would not. `perturbation_norms` gives what ``factor`` is computed from.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..arguments import check_optional_reals, check_optional_tensors, check_reals, check_tensors
from ._op import define
from .fake_quantize import FLOATS


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


def _check(w: Tensor, g: Tensor, eta: float | None, mixed: bool) -> None:
    torch._check(g.dtype in FLOATS, lambda: f"g is {g.dtype}, must be one of {FLOATS}")
    narrow = (torch.bfloat16, torch.float16) if mixed and g.dtype == torch.float32 else ()
    torch._check(
        w.shape == g.shape and w.device == g.device and w.dtype in (g.dtype, *narrow),
        lambda: f"w is {w.dtype} of shape {tuple(w.shape)} on {w.device}, must be like g, {g.dtype} of shape "
        f"{tuple(g.shape)} on {g.device}" + (" (or a 16-bit float for a float32 g)" if mixed else ""),
    )
    torch._check(
        w.is_contiguous() and g.is_contiguous(),
        lambda: f"w has strides {w.stride()} and g {g.stride()}, must be contiguous",
    )
    torch._check(eta is None or 0 <= eta < float("inf"), lambda: f"eta is {eta}, must be finite and >= 0")


def _fake_add(w: Tensor, g: Tensor, factor: Tensor, eta: float | None) -> None:
    _check(w, g, eta, mixed=True)
    _check_factor(g, factor)


def _fake_swap(w: Tensor, g: Tensor, factor: Tensor, eta: float | None) -> None:
    _check(w, g, eta, mixed=False)
    _check_factor(g, factor)


def _check_factor(g: Tensor, factor: Tensor) -> None:
    torch._check(
        factor.dtype == torch.float32 and factor.numel() == 1 and factor.device == g.device,
        lambda: f"factor is {factor.dtype} of shape {tuple(factor.shape)} on {factor.device}, "
        f"must be one float32 on {g.device}",
    )


def _fake_norms(g: Tensor, w: Tensor | None, eta: float) -> Tensor:
    _check(g if w is None else w, g, eta, mixed=True)
    return g.new_empty(2, dtype=torch.float64)


_CALL = "Tensor factor, float? eta"
PERTURB = define("perturb_", f"Tensor(a!) w, Tensor g, {_CALL}", (), reference=_add, fake=_fake_add)
SWAP = define("perturb_swap_", f"Tensor(a!) w, Tensor(b!) g, {_CALL}", (), reference=_swap, fake=_fake_swap)
NORMS = define("perturbation_norms", "Tensor g, Tensor? w, float eta", ("out",), reference=_norms, fake=_fake_norms)


@torch.no_grad()
def perturb_(w: Tensor, g: Tensor, factor: Tensor, eta: float | None = None) -> Tensor:
    """Add ``factor * T**2 * g`` to ``w`` in place, ``T = abs(w) + eta``, or 1 if ``eta`` is None.

    Args:
        w: contiguous tensor of ``g``'s dtype, or a 16-bit one for a float32 ``g``.
        g: the gradient, contiguous, of the shape of ``w``.
        factor: one float32 on the same device.
        eta: ASAM's, None for SAM.

    Returns:
        ``w``. Autograd does not see the change, as if ``w`` had been so all along.

    Raises:
        TypeError: if an argument is of another type, naming it.
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
    """As :func:`perturb_`, and put what ``w`` was into ``g``: ``w.copy_(g)`` then restores it, bit for bit.

    Args:
        w: contiguous tensor.
        g: the gradient, contiguous, like ``w``; overwritten.
        factor: one float32 on the same device.
        eta: ASAM's, None for SAM.

    Returns:
        ``w``.

    Raises:
        TypeError: if an argument is of another type, naming it.
        RuntimeError: if a shape, dtype, layout or device does not fit.
    """
    check_tensors(w=w, g=g, factor=factor)
    check_optional_reals(eta=eta)
    torch.ops.qatkernels.perturb_swap_(w, g, factor, eta)
    torch.autograd.graph.increment_version((w, g))
    return w


def perturbation_norms(g: Tensor, w: Tensor | None = None, eta: float = 0.0) -> Tensor:
    """Return the sums of ``(T * g)**2`` and of ``(T**2 * g)**2``, ``T = abs(w) + eta``, or 1 if ``w`` is None.

    Of all tensors together, the square roots of the sums are ASAM's norm of the gradient and, times ``factor``, the
    norm of the perturbation.

    Args:
        g: the gradient, contiguous.
        w: what is perturbed, contiguous and like ``g`` (16-bit for a float32 ``g`` is allowed), or None.
        eta: ASAM's.

    Returns:
        float64 tensor with two elements. The order of additions depends on the shape alone.

    Raises:
        TypeError: if an argument is of another type, naming it.
        RuntimeError: if a shape, dtype, layout or device does not fit.
    """
    check_tensors(g=g)
    check_optional_tensors(w=w)
    check_reals(eta=eta)
    _check(g if w is None else w, g, eta, mixed=True)
    out: Tensor = torch.ops.qatkernels.perturbation_norms(g, w, eta)
    return out
