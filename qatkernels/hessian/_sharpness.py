"""How much a loss rises in the neighbourhood of the weights (SAM; Foret et al., 2021), and how steep it is there."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..nn import quantized_modules, quantized_weights
from ..nn.quantized import check_weights
from ..nn.quantizer import ETA, RHO, ascent, modified
from ..nn.replay import RandomState, check_calibrated
from ..ops import perturbation_norms
from ._hvp import Scope, check_whole, checked_loss, gradient_of, scope_of

LossFn = Callable[[], Tensor]

NORMS, TARGETS = ("l2", "asam"), ("latent", "quantized")


class Sharpness(NamedTuple):
    """What an ascent found.

    Attributes:
        value: loss at the perturbed weights less the loss at the weights.
        loss: loss at the weights.
        gradient_norm: l2 norm of the gradient there.
        perturbation_norm: l2 norm of the perturbation.
    """

    value: float
    loss: float
    gradient_norm: float
    perturbation_norm: float


def sharpness(
    model: nn.Module,
    loss: LossFn,
    rho: float = RHO,
    *,
    norm: str = "l2",
    eta: float = ETA,
    target: str = "latent",
    params: Sequence[Tensor] | None = None,
) -> Sharpness:
    """Return by how much the loss rises one step of SAM up its gradient, to first order the most within the ball.

    ``"l2"``: e = rho * g / norm(g). ``"asam"`` (Kwon et al., 2021), whose ball is relative to the weights:
    e = rho * T^2 g / norm(T g) with T = abs(w) + eta. One norm for all parameters together.

    A quantized model does not see a latent perturbation that crosses no level, which is why SQuAT perturbs after
    rounding (``target="quantized"``; inferred, the paper's box is not public to us). The gradient is here that of the
    quantized weights themselves, where SQuAT's passes the quantizer: this one moves weights beyond the clamp, too.

    Both evaluations start from the same buffers and random numbers (dropout, noise). The model's buffers, modes and
    gradients, and torch's generators, are afterwards as before.

    Args:
        model: the model; its weights are perturbed in place and restored bit for bit.
        loss: closure without arguments that gives its loss, the same at every call.
        rho: radius of the ball, >= 0; around 0.05 for l2, 0.5 for asam.
        norm: ``"l2"`` or ``"asam"``.
        eta: asam's.
        target: what is perturbed: ``"latent"``, the parameters; or ``"quantized"``, Q(W) of every quantized layer.
        params: what to perturb if it is latent; the quantized weights, or all parameters of a model without, if None.

    Raises:
        ValueError: if a value is out of range, the loss is no scalar or does not depend on what is perturbed, or its
            gradient is not finite; or an activation scale is not initialized.
    """
    for name, given, allowed in (("norm", norm, NORMS), ("target", target, TARGETS)):
        if given not in allowed:
            raise ValueError(f"{name} is {given!r}, must be one of {allowed}")
    for name, number in (("rho", rho), ("eta", eta)):
        if not 0 <= number < math.inf:
            raise ValueError(f"{name} is {number}, must be finite and >= 0")
    check_whole(model.parameters())
    check_calibrated(model)
    if params is None:
        check_weights(quantized_modules(model), "what is added to it would be lost (params may name its parameters)")
    scope = _replayed(model)
    if target == "quantized":
        if params is not None:
            raise ValueError("params is given with target='quantized', which perturbs every quantized layer")
        return _quantized(model, loss, rho, norm, eta, scope)
    params = list(params if params is not None else quantized_weights(model) or model.parameters())
    before, grads = _value_and_gradient(loss, params, scope)
    along, gradient_norm, size = _perturbation(grads, params, rho, norm, eta)
    saved = [p.detach().clone() for p in params]
    try:
        with torch.no_grad():
            for p, e in zip(params, along, strict=True):
                p.add_(e)
            with scope():
                after = float(checked_value(loss()))
    finally:
        with torch.no_grad():
            for p, s in zip(params, saved, strict=True):
                p.copy_(s)
    return Sharpness(after - before, before, gradient_norm, size)


def _replayed(model: nn.Module) -> Scope:
    """Return what makes contexts that leave a model as it is, all with the same random numbers."""
    start, scope = RandomState(model.parameters()), scope_of(model)

    @contextlib.contextmanager
    def replayed() -> Iterator[None]:
        with start.replayed(), scope():
            yield

    return replayed


def _quantized(model: nn.Module, loss: LossFn, rho: float, norm: str, eta: float, scope: Scope) -> Sharpness:
    layers = list(quantized_modules(model).values())
    if not layers:
        raise ValueError("the model has no quantized layer, which target='quantized' perturbs: give target='latent'")
    # Layers that share a weight share what is added to it.
    first = {id(layer.weight): layer for layer in reversed(layers)}
    offsets = {key: torch.zeros_like(layer.weight).requires_grad_() for key, layer in first.items()}
    with modified((layer, offsets[id(layer.weight)]) for layer in layers):
        before, grads = _value_and_gradient(loss, list(offsets.values()), scope)
        with torch.no_grad():
            at = [layer.quantized_weight() for layer in first.values()]
            along, gradient_norm, size = _perturbation(grads, at, rho, norm, eta)
            for offset, e in zip(offsets.values(), along, strict=True):
                offset.copy_(e)
            with scope():
                after = float(checked_value(loss()))
    return Sharpness(after - before, before, gradient_norm, size)


def checked_value(loss: Tensor) -> Tensor:
    """Return a scalar loss, detached, which need not depend on anything.

    Raises:
        ValueError: if it is no scalar.
    """
    if loss.numel() != 1:
        raise ValueError(f"the loss has shape {tuple(loss.shape)}, must be a scalar: reduce it")
    return loss.detach().reshape(())


def _value_and_gradient(loss: LossFn, params: Sequence[Tensor], scope: Scope) -> tuple[float, list[Tensor]]:
    with torch.enable_grad():
        with scope():
            value = checked_loss(loss(), params)
        with scope():
            return float(value.detach()), gradient_of(value, params, create_graph=False)


def _norm(tensors: Sequence[Tensor]) -> float:
    return float(torch.stack([torch.linalg.vector_norm(t, dtype=torch.float64) for t in tensors]).norm())


@torch.no_grad()
def _perturbation(
    grads: Sequence[Tensor], at: Sequence[Tensor], rho: float, norm: str, eta: float
) -> tuple[list[Tensor], float, float]:
    """Return the perturbation, the norm of the gradient and that of the perturbation."""
    gradient_norm = _norm(grads)
    if not math.isfinite(gradient_norm):
        raise ValueError(f"the norm of the gradient is {gradient_norm}, must be finite")
    asam, pairs = norm == "asam", list(zip(grads, at, strict=True))
    sums = [perturbation_norms(g.contiguous(), w.contiguous() if asam else None, eta) for g, w in pairs]
    factor, size = ascent(torch.stack(sums).sum(0), rho)
    along = [g * ((w.abs() + eta).square() * factor if asam else factor) for g, w in pairs]
    return along, gradient_norm, float(size)


def gradient_norm_ratio(loss: LossFn, params: Sequence[Tensor], *, model: nn.Module | None = None) -> float:
    """Return the norm of the gradient over the norm of the parameters, both over all of them together.

    torch's generators are afterwards as they were before.

    Args:
        loss: closure without arguments that gives the loss.
        params: parameters that it reads.
        model: the model whose forward ``loss`` runs. Its buffers, modes and gradients are then afterwards as before;
            without it they are what a call of ``loss`` makes of them.

    Raises:
        ValueError: if the loss is no scalar or does not depend on the parameters, or they are all zero.
    """
    params = list(params)
    check_whole(params)
    size = _norm([p.detach() for p in params])
    if not size > 0:
        raise ValueError("params are all zero, must have a norm")
    with RandomState(params).replayed():
        return _norm(_value_and_gradient(loss, params, scope_of(model))[1]) / size
