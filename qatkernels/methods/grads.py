"""Gradients of several passes: taken away and added up."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .._torch_compat import is_view
from ..dtensor import is_dtensor, is_fsdp

Grads = list[Tensor | None]


def own(g: Tensor) -> Tensor:
    """Return a gradient in memory of its own: in a bucket of DDP's, the next pass would write over it."""
    if is_dtensor(g) or g.layout != torch.strided:
        return g
    shared = is_view(g) or g.untyped_storage().nbytes() > g.numel() * g.element_size()
    return g.clone() if shared else g


def take(parameters: Sequence[Tensor]) -> Grads:
    """Return the gradients and leave None in their place."""
    grads: Grads = [None if p.grad is None else own(p.grad) for p in parameters]
    for parameter in parameters:
        parameter.grad = None
    return grads


def put(parameters: Sequence[Tensor], grads: Grads) -> None:
    """Set the gradients."""
    for parameter, grad in zip(parameters, grads, strict=True):
        parameter.grad = grad


@torch.no_grad()
def add_(total: Grads, grads: Grads, factor: float = 1.0) -> Grads:
    """Return ``total + factor * grads``, computed in memory of one of them; None counts as zero."""
    result: Grads = []
    for t, g in zip(total, grads, strict=True):
        if g is None:
            result.append(t)
        elif t is None:
            result.append(g if factor == 1.0 else g.mul_(factor))
        else:
            result.append(t.add_(g, alpha=factor))
    return result


def run(closure: Callable[[], Any], layers: Mapping[str, nn.Module]) -> Any:
    """Return what a closure returns.

    Raises:
        RuntimeError: if it changed the weight of a layer: passes of a step are at the same weights.
    """
    before = {name: (weight, weight._version) for name, layer in layers.items() if (weight := layer.weight) is not None}
    loss = closure()
    for name, (weight, version) in before.items():
        if layers[name].weight is weight and weight._version != version:
            raise RuntimeError(f"the closure changed the weight of {name}: optimizer.step() does not belong in it")
    return loss


@contextmanager
def apart(model: nn.Module, parameters: Sequence[Tensor], accumulate: bool) -> Iterator[None]:
    """Let passes find no gradients; afterwards add theirs to those that were there, or drop these.

    An error of the passes leaves the gradients that were to be added to as they were.

    Args:
        model: as the passes call it, DDP or FSDP2 included: where gradients are added they are reduced in each pass,
            also within ``no_sync``. What is taken away here the last pass of a step would not reduce.
        parameters: those that are trained.
        accumulate: whether to add.
    """
    if not accumulate:
        for parameter in parameters:
            parameter.grad = None
        yield
        return
    before = take(parameters)
    try:
        with _reduced(model):
            yield
    except BaseException:
        put(parameters, before)
        raise
    put(parameters, add_(before, take(parameters)))


@contextmanager
def _reduced(model: nn.Module) -> Iterator[None]:
    replicas = [m for m in model.modules() if isinstance(m, DistributedDataParallel)]
    asked = [replica.require_backward_grad_sync for replica in replicas]
    for replica in replicas:
        replica.require_backward_grad_sync = True
    for module in model.modules():
        if is_fsdp(module):
            # This flag has no getter to restore from; loops set it for each micro-batch.
            module.set_requires_gradient_sync(True, recurse=False)  # type: ignore[operator]
    try:
        yield
    finally:
        for replica, before in zip(replicas, asked, strict=True):
            replica.require_backward_grad_sync = before
