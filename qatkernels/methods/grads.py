"""Gradients of several passes: take them out of the parameters, add them, put them back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .._torch_compat import is_view
from ..dtensor import is_dtensor, reduce_in_every_backward

Grads = list[Tensor | None]


def copy_if_shared(g: Tensor) -> Tensor:
    """Return a gradient that shares memory with nothing else.

    A gradient may be a view of a bucket of DDP, which the next pass overwrites.
    """
    if is_dtensor(g) or g.layout != torch.strided:
        return g
    shared = is_view(g) or g.untyped_storage().nbytes() > g.numel() * g.element_size()
    return g.clone() if shared else g


def take_grads(parameters: Sequence[Tensor]) -> Grads:
    """Return the gradients of parameters, and set ``.grad`` to None."""
    grads: Grads = [None if p.grad is None else copy_if_shared(p.grad) for p in parameters]
    for parameter in parameters:
        parameter.grad = None
    return grads


def set_grads(parameters: Sequence[Tensor], grads: Grads) -> None:
    """Set the gradients of parameters."""
    for parameter, grad in zip(parameters, grads, strict=True):
        parameter.grad = grad


@torch.no_grad()
def add_(total: Grads, grads: Grads, factor: float = 1.0) -> Grads:
    """Return ``total + factor * grads``. The result reuses the memory of one of the two; None counts as zero."""
    result: Grads = []
    for t, g in zip(total, grads, strict=True):
        if g is None:
            result.append(t)
        elif t is None:
            result.append(g if factor == 1.0 else g.mul_(factor))
        else:
            result.append(t.add_(g, alpha=factor))
    return result


def run_closure(closure: Callable[[], Any], layers: Mapping[str, nn.Module]) -> Any:
    """Call a closure and return its result.

    Raises:
        RuntimeError: if it changed the weight of a layer. All passes of a step must use the same weights.
    """
    before = {name: (weight, weight._version) for name, layer in layers.items() if (weight := layer.weight) is not None}
    loss = closure()
    for name, (weight, version) in before.items():
        if layers[name].weight is weight and weight._version != version:
            raise RuntimeError(f"the closure changed the weight of {name}: optimizer.step() does not belong in it")
    return loss


@contextmanager
def without_old_grads(model: nn.Module, parameters: Sequence[Tensor], accumulate: bool) -> Iterator[None]:
    """Set aside the gradients of earlier calls while passes run; afterwards add the new gradients to them.

    If ``accumulate`` is False, the old gradients are dropped. If a pass raises an error, gradients that were to be
    added to are restored.

    Args:
        model: the module that the passes call, with its DDP or FSDP2 wrapper. With ``accumulate``, every pass reduces
            its gradients over the processes, also within ``no_sync``: the last pass of a step would not reduce the
            gradients that were set aside here.
        parameters: the trained parameters.
        accumulate: whether to add to the old gradients.
    """
    if not accumulate:
        for parameter in parameters:
            parameter.grad = None
        yield
        return
    before = take_grads(parameters)
    try:
        with _synchronized(model):
            yield
    except BaseException:
        set_grads(parameters, before)
        raise
    set_grads(parameters, add_(before, take_grads(parameters)))


@contextmanager
def _synchronized(model: nn.Module) -> Iterator[None]:
    """Reduce gradients over the processes in every backward pass within the context."""
    replicas = [m for m in model.modules() if isinstance(m, DistributedDataParallel)]
    settings = [replica.require_backward_grad_sync for replica in replicas]
    for replica in replicas:
        replica.require_backward_grad_sync = True
    reduce_in_every_backward(model)
    try:
        yield
    finally:
        for replica, before in zip(replicas, settings, strict=True):
            replica.require_backward_grad_sync = before
