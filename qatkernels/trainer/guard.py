"""Detects non-finite losses and gradients: at which step they first occur, and in which module."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..dtensor import local_part


class DivergedError(RuntimeError):
    """The loss, its gradient or a weight is not finite."""


class Guard:
    """Detects the first non-finite step without a device sync. Weights stay as they were before that step.

    It uses the interface of GradScaler: the fused kernels of torch's optimizers skip a step while ``found_inf`` is 1.
    The guard sets ``found_inf`` to 1 at the first non-finite step, and never back.

    Args:
        optimizer: one of torch's fused optimizers.
        device: device of the losses.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, device: str) -> None:
        self._bad = torch.zeros((), device=device)
        self._first = torch.zeros(3, dtype=torch.float64, device=device)
        optimizer.found_inf = self._bad  # type: ignore[attr-defined]

    @torch.no_grad()
    def observe(self, step: int, loss: Tensor, norm: Tensor) -> None:
        """Check loss and gradient of a step. Call this before the optimizer's step.

        Args:
            step: number of the step, from 1.
            loss: a scalar.
            norm: norm of the gradient.
        """
        current = torch.stack([torch.full_like(loss, step), loss, norm]).double()
        self._first.copy_(torch.where(self._bad > 0, self._first, current))
        self._bad.copy_(torch.maximum(self._bad, 1 - current.isfinite().all().to(self._bad.dtype)))

    def first_bad_step(self) -> tuple[int, float, float] | None:
        """Return step, loss and norm of the first non-finite step, or None if there was none. Syncs the device."""
        if not self._bad.item():
            return None
        step, loss, norm = self._first.tolist()
        return int(step), loss, norm


def find_non_finite(model: nn.Module, rerun: Callable[[], Any]) -> str | None:
    """Run a step again and return where the first non-finite value appears.

    Args:
        model: the model, not wrapped, with the weights from before the step.
        rerun: computes the loss and its gradient.

    Returns:
        A phrase that names the first module with a non-finite output, or a non-finite gradient of its output. If there
        is none, the first parameter with a non-finite gradient. None if everything is finite.
    """
    places: list[str] = []
    with _recorded_non_finite(model, places):
        rerun()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None and not _finite(parameter.grad):
            places.append(f"the gradient of {name}")
    return places[0] if places else None


@contextlib.contextmanager
def _recorded_non_finite(model: nn.Module, places: list[str]) -> Iterator[None]:
    """Append to ``places`` where values are not finite, in the order of computation: inner modules come first."""

    def make_hook(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            for tensor in _tensors(output):
                if not _finite(tensor):
                    places.append(f"the output of {name or 'the model'}")
                elif tensor.requires_grad:
                    tensor.register_hook(lambda g: None if _finite(g) else places.append(f"the gradient at {name}"))

        return hook

    hooks = [module.register_forward_hook(make_hook(name)) for name, module in model.named_modules()]
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
