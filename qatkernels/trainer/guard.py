"""Losses and gradients that are no longer numbers: which step was the first, and where in the model it began."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..dtensor import local_part


class DivergedError(RuntimeError):
    """The loss or its gradient is no longer a number."""


class Guard:
    """Notices the first bad step without waiting for the device, and keeps the weights of before it.

    The optimizer is told as a GradScaler tells it: its fused kernels leave everything as it is while ``found_inf`` is
    one, and it stays one.

    Args:
        optimizer: a fused one of torch's.
        device: where losses are.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, device: str) -> None:
        self._bad = torch.zeros((), device=device)
        self._first = torch.zeros(3, dtype=torch.float64, device=device)
        optimizer.found_inf = self._bad  # type: ignore[attr-defined]

    @torch.no_grad()
    def see(self, step: int, loss: Tensor, norm: Tensor) -> None:
        """Look at a step before the optimizer takes it.

        Args:
            step: its number, from 1.
            loss: a scalar.
            norm: of the gradient.
        """
        now = torch.stack([torch.full_like(loss, step), loss, norm]).double()
        self._first.copy_(torch.where(self._bad > 0, self._first, now))
        self._bad.copy_(torch.maximum(self._bad, 1 - now.isfinite().all().to(self._bad.dtype)))

    def found(self) -> tuple[int, float, float] | None:
        """Return step, loss and norm of the first bad step, None if there was none; waits for the device."""
        if not self._bad.item():
            return None
        step, loss, norm = self._first.tolist()
        return int(step), loss, norm


def origin(model: nn.Module, again: Callable[[], Any]) -> str | None:
    """Run a step again and say where it first stops being finite.

    Args:
        model: not wrapped, with the weights from before the step.
        again: computes the loss and its gradient.

    Returns:
        The first module whose output, or the gradient of whose output, is not finite, in words; the first parameter
        whose gradient is not, if all of these are; None if everything is finite.
    """
    found: list[str] = []
    with _watched(model, found):
        again()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None and not _finite(parameter.grad):
            found.append(f"the gradient of {name}")
    return found[0] if found else None


@contextlib.contextmanager
def _watched(model: nn.Module, found: list[str]) -> Iterator[None]:
    """Note what is not finite, in the order in which it is computed: an inner module before the one around it."""

    def watch(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            for tensor in _tensors(output):
                if not _finite(tensor):
                    found.append(f"the output of {name or 'the model'}")
                elif tensor.requires_grad:
                    tensor.register_hook(lambda g: None if _finite(g) else found.append(f"the gradient at {name}"))

        return hook

    hooks = [module.register_forward_hook(watch(name)) for name, module in model.named_modules()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, dict):
        for value in output.values():
            yield from _tensors(value)
    elif isinstance(output, (tuple, list)):
        for value in output:
            yield from _tensors(value)


def _finite(tensor: Tensor) -> bool:
    return bool(torch.isfinite(local_part(tensor)).all()) if tensor.is_floating_point() else True
