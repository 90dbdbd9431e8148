"""Gradients of several passes: taken away, added up, with the random numbers of one pass replayed in another."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

Grads = list[Tensor | None]


def own(g: Tensor) -> Tensor:
    """Return a gradient in memory of its own: in a bucket of DDP's, the next pass would write over it."""
    if isinstance(g, DTensor) or g.layout != torch.strided:
        return g
    return g.clone() if g.untyped_storage().nbytes() > g.numel() * g.element_size() else g


def take(parameters: Sequence[nn.Parameter]) -> Grads:
    """Return the gradients and leave None in their place."""
    grads: Grads = [None if p.grad is None else own(p.grad) for p in parameters]
    for parameter in parameters:
        parameter.grad = None
    return grads


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


class RandomState:
    """The state of torch's generators, of the CPU and of the CUDA devices that parameters are on."""

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self._cpu = torch.get_rng_state()
        devices = {p.device for p in parameters if p.device.type == "cuda"}
        self._cuda = {device: torch.cuda.get_rng_state(device) for device in devices}

    def restore(self) -> None:
        """Set the generators back."""
        torch.set_rng_state(self._cpu)
        for device, state in self._cuda.items():
            torch.cuda.set_rng_state(state, device)
