"""Sharpness: how much a loss rises near the weights (SAM; Foret et al., 2021), and the norm of its gradient there."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..dtensor import is_dtensor, local_part, mean_over, reduce_in_every_backward, total
from ..nn import quantized_modules, quantized_weights
from ..nn._gather_model import is_sharded, reshard
from ..nn.quantized import check_weights
from ..nn.quantizer import ETA, RHO, ascent, modified
from ..nn.replay import RandomState, check_calibrated
from ..ops import perturbation_norms
from ._hvp import Scope, check_require_grad, checked_loss, gradient_of, scope_of
from .sharded import resharded

LossFn = Callable[[], Tensor]

NORMS, TARGETS = ("l2", "asam"), ("latent", "quantized")


class Sharpness(NamedTuple):
    """The result of one ascent step.

    Attributes:
        value: loss at the perturbed weights minus the loss at the weights.
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
    """Return how much the loss rises in one ascent step of SAM: to first order the largest rise within the ball.

    ``"l2"``: e = rho * g / norm(g). ``"asam"`` (Kwon et al., 2021): e = rho * T^2 g / norm(T g) with
    T = abs(w) + eta, so that the ball is relative to the weights. The norm is over all perturbed parameters together.

    A perturbation of latent weights changes nothing in a quantized model unless it crosses to another level. So SQuAT
    perturbs after rounding (``target="quantized"``; inferred, since we have no access to the paper's algorithm). Here
    the gradient with respect to the quantized weights is used directly. SQuAT's goes through the quantizer, which
    blocks it outside the pass-through range: so this function also perturbs weights there, SQuAT does not.

    Both evaluations start from the same buffers and random numbers (dropout, noise). Buffers, modes and gradients of
    the model, and torch's generators, are restored.

    A model that ``fully_shard`` (FSDP2) has sharded stays so, and the shards are perturbed. The loss is then the mean
    of those of all processes, which must all call this, each with its own batch. It is evaluated as the model computes
    it, in the dtypes of its mixed precision.

    Args:
        model: the model; its weights are perturbed in place and restored bit for bit.
        loss: closure without arguments that returns the loss: the same value at every call.
        rho: radius of the ball, >= 0; around 0.05 for l2, 0.5 for asam.
        norm: ``"l2"`` or ``"asam"``.
        eta: the eta of asam.
        target: what is perturbed: ``"latent"``, the parameters; or ``"quantized"``, Q(W) of every quantized layer.
        params: the parameters to perturb with ``target="latent"``. If None, the quantized weights, or all parameters of
            a model that has none.

    Raises:
        ValueError: if a value is out of range, the loss is not a scalar or does not depend on the perturbed tensors,
            its gradient is not finite, an activation scale is not initialized, or the model is sharded otherwise than
            ``fully_shard`` over all processes does.
    """
    for name, value, allowed in (("norm", norm, NORMS), ("target", target, TARGETS)):
        if value not in allowed:
            raise ValueError(f"{name} is {value!r}, must be one of {allowed}")
    for name, number in (("rho", rho), ("eta", eta)):
        if not 0 <= number < math.inf:
            raise ValueError(f"{name} is {number}, must be finite and >= 0")
    if is_sharded(model):
        shards = resharded(model, params or ())
        params = None if params is None else shards
        reduce_in_every_backward(model)
    check_calibrated(model)
    if params is None:
        check_weights(quantized_modules(model), "a perturbation of it would be lost (params may name its parameters)")
    scope = _replayed(model)
    if target == "quantized":
        if params is not None:
            raise ValueError("params is given with target='quantized', which perturbs every quantized layer")
        return _sharpness_of_quantized(model, loss, rho, norm, eta, scope)
    params = list(params if params is not None else quantized_weights(model) or model.parameters())
    loss_before, grads = _value_and_gradient(loss, params, scope)
    perturbations, gradient_norm, perturbation_norm = _perturbation(grads, params, rho, norm, eta)
    parts = [local_part(p.detach()) for p in params]
    saved = [part.clone() for part in parts]
    try:
        with torch.no_grad():
            for p, part, e in zip(params, parts, perturbations, strict=True):
                part.add_(e)
                torch.autograd.graph.increment_version(p)
            loss_after = _evaluate(loss, params, scope)
    finally:
        with torch.no_grad():
            for p, part, s in zip(params, parts, saved, strict=True):
                part.copy_(s)
                torch.autograd.graph.increment_version(p)
    return Sharpness(loss_after - loss_before, loss_before, gradient_norm, perturbation_norm)


def _replayed(model: nn.Module) -> Scope:
    """Return a function that makes contexts with the same random numbers. Each restores the model at its end."""
    start, scope = RandomState(model.parameters()), scope_of(model)

    @contextlib.contextmanager
    def replayed() -> Iterator[None]:
        try:
            with start.replayed(), scope():
                yield
        finally:
            reshard(model)  # a root keeps what it has gathered, which would be old once its shards change

    return replayed


def _sharpness_of_quantized(
    model: nn.Module, loss: LossFn, rho: float, norm: str, eta: float, scope: Scope
) -> Sharpness:
    """Return the sharpness with ``target="quantized"``."""
    layers = list(quantized_modules(model).values())
    if not layers:
        raise ValueError("the model has no quantized layer, which target='quantized' perturbs: give target='latent'")
    # Layers that share a weight share its perturbation.
    by_weight = {id(layer.weight): layer for layer in reversed(layers)}
    offsets = {key: torch.zeros_like(layer.weight).requires_grad_() for key, layer in by_weight.items()}
    with modified((layer, offsets[id(layer.weight)]) for layer in layers):
        loss_before, grads = _value_and_gradient(loss, list(offsets.values()), scope)
        with torch.no_grad():
            weights = [layer.quantized_weight() for layer in by_weight.values()]
            perturbations, gradient_norm, perturbation_norm = _perturbation(grads, weights, rho, norm, eta)
            for offset, e in zip(offsets.values(), perturbations, strict=True):
                local_part(offset).copy_(e)
            loss_after = _evaluate(loss, list(offsets.values()), scope)
    return Sharpness(loss_after - loss_before, loss_before, gradient_norm, perturbation_norm)


def checked_value(loss: Tensor) -> Tensor:
    """Return a scalar loss, detached. It need not depend on anything.

    Raises:
        ValueError: if the loss is not a scalar.
    """
    if loss.numel() != 1:
        raise ValueError(f"the loss has shape {tuple(loss.shape)}, must be a scalar: reduce it")
    return loss.detach().reshape(())


def _evaluate(loss: LossFn, params: Sequence[Tensor], scope: Scope) -> float:
    """Return the loss, of sharded parameters the mean over the processes, without a gradient."""
    with scope():
        return _mean(checked_value(loss()), params)


def _mean(value: Tensor, params: Sequence[Tensor]) -> float:
    """Return a value as a number; the mean over the processes if a parameter is sharded."""
    sharded = next((p for p in params if is_dtensor(p)), None)
    return float(value.detach() if sharded is None else mean_over(sharded, value))


def _value_and_gradient(loss: LossFn, params: Sequence[Tensor], scope: Scope) -> tuple[float, list[Tensor]]:
    """Return the loss and its gradient, as :func:`_mean` says."""
    with torch.enable_grad():
        with scope():
            value = checked_loss(loss(), params)
        with scope():
            sharded = next((p for p in params if is_dtensor(p)), None)
            if sharded is None:
                return float(value.detach()), gradient_of(value, params, create_graph=False)
            # FSDP2 reduces gradients into .grad, and only in a backward through the whole model.
            check_require_grad(params)
            value.backward()
            if all(p.grad is None for p in params):
                raise ValueError("the loss does not depend on the parameters")
            grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in params]
            # It leaves those of parameters that it ignores as they are in each process.
            return _mean(value, params), [g if is_dtensor(g) else mean_over(sharded, g) for g in grads]


def _norm(tensors: Sequence[Tensor]) -> float:
    squares = [(t, torch.linalg.vector_norm(local_part(t), dtype=torch.float64).square()) for t in tensors]
    return float(total(squares).sqrt())


@torch.no_grad()
def _perturbation(
    grads: Sequence[Tensor], weights: Sequence[Tensor], rho: float, norm: str, eta: float
) -> tuple[list[Tensor], float, float]:
    """Return the local part of each weight's perturbation, and the norms of the gradient and of the perturbation."""
    gradient_norm = _norm(grads)
    if not math.isfinite(gradient_norm):
        raise ValueError(f"the norm of the gradient is {gradient_norm}, must be finite")
    asam, pairs = norm == "asam", [(local_part(g), local_part(w)) for g, w in zip(grads, weights, strict=True)]
    sums = [perturbation_norms(g.contiguous(), w.contiguous() if asam else None, eta) for g, w in pairs]
    factor, perturbation_norm = ascent(total(list(zip(weights, sums, strict=True))), rho)
    perturbations = [g * ((w.abs() + eta).square() * factor if asam else factor) for g, w in pairs]
    return perturbations, gradient_norm, float(perturbation_norm)


def gradient_norm_ratio(loss: LossFn, params: Sequence[Tensor], *, model: nn.Module | None = None) -> float:
    """Return the norm of the gradient over the norm of the parameters. Each norm is over all parameters together.

    The states of torch's generators are restored. Of sharded parameters (``fully_shard``) the gradient is that of the
    mean loss of all processes, which must all call this.

    Args:
        loss: closure without arguments that returns the loss.
        params: the parameters that it reads.
        model: the model whose forward ``loss`` runs. If given, its buffers, modes and gradients are restored. If None,
            they are as a call of ``loss`` leaves them. Must be given if the parameters are sharded.

    Raises:
        ValueError: if the loss is not a scalar or does not depend on the parameters, the parameters are all zero, or
            they are sharded and ``model`` is None.
    """
    params = list(params)
    if model is not None and is_sharded(model):
        params = resharded(model, params)
        reduce_in_every_backward(model)
    elif any(map(is_dtensor, params)):
        raise ValueError("model is None or whole, must be the model of params that are sharded (fully_shard)")
    size = _norm([p.detach() for p in params])
    if not size > 0:
        raise ValueError("params are all zero, at least one element must not be")
    with RandomState(params).replayed():
        scope = scope_of(model) if model is None else _replayed(model)
        return _norm(_value_and_gradient(loss, params, scope)[1]) / size
