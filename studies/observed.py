"""A training method that also measures how far steps move the weights, for studies."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qatkernels.grids import MIN_SCALE
from qatkernels.methods.shards import layers_by_weight
from qatkernels.nn.quantized import Quantized
from qatkernels.trainer.methods import Method, MethodConfig


@dataclass(frozen=True)
class ObservedConfig(MethodConfig):
    """A method and its settings, observed.

    Attributes:
        every: steps between two observations, which :meth:`Observed.log` returns.
    """

    every: int = 1

    def start(self, model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> Method:
        """Return the method for a quantized model, observed."""
        return Observed(super().start(model, optimizer, steps), model, self.every)


class Observed:
    """Does what a method does, and measures every so many steps.

    ``log`` returns what the method logs, and: ``moved``, the share of quantized weights that the last step changed;
    ``travelled``, the root mean square of how far weights are from where they were at the observation before, in
    spacings of their grid, without the resets between; ``saturated``, the share of weights whose gradient is masked.
    """

    def __init__(self, method: Method, model: nn.Module, every: int) -> None:
        self.method, self.every = method, every
        self._layers = list(layers_by_weight(model).values())
        self._seen: dict[str, float] = {}
        # Weights before the step that is observed, and after the observation before.
        self._before: list[Tensor] | None = None
        self._last: list[Tensor] | None = None

    @property
    def steps(self) -> int:
        """Optimizer steps so far."""
        return self.method.steps

    @steps.setter
    def steps(self, value: int) -> None:
        self.method.steps = value

    @property
    def stats(self) -> Any:
        """Statistics of the codes."""
        return self.method.stats

    @property
    def due(self) -> bool:
        """Whether the next :meth:`after_step` changes weights."""
        return self.method.due

    def gradient(self, closure: Callable[[], Any]) -> Any:
        """Compute the method's gradient, and remember the weights if the step is observed."""
        if self._last is None:
            self._last = self._weights()
        if (self.steps + 1) % self.every == 0:
            self._before = self._weights()
        return self.method.gradient(closure)

    @torch.no_grad()
    def after_step(self) -> None:
        """Measure if the step is observed, then do what the method does after a step."""
        if self._before is None:
            if self.due:
                raise ValueError("every step that resets must be observed: a reset would count as travel")
            self.method.after_step()
            return
        assert self._last is not None
        count = sum(layer.weight.numel() for layer in self._layers)
        moved = squared = saturated = 0.0
        for layer, before, last in zip(self._layers, self._before, self._last, strict=True):
            moved += float((layer.weight != before).sum())
            spacing = _by_row(layer) / layer.grid.steps
            away = (layer.weight.float() - last.float()).view(spacing.numel(), -1)
            squared += float((away / spacing).square().sum(dtype=torch.float64))
            saturated += float(_saturated(layer))
        self._seen = {
            "moved": moved / count, "travelled": (squared / count) ** 0.5, "saturated": saturated / count,
        }  # fmt: skip
        self.method.after_step()
        self._before, self._last = None, self._weights()

    def _weights(self) -> list[Tensor]:
        return [layer.weight.detach().clone() for layer in self._layers]

    def log(self) -> dict[str, float]:
        """Return what the method logs, and the last observation."""
        return {**self.method.log(), **self._seen}

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the method."""
        return self.method.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state of the method."""
        self.method.load_state_dict(state)


def _by_row(layer: Quantized) -> Tensor:
    """Return the scales of a layer as a column, one for each row or group."""
    return layer.scale.detach().clamp_min(MIN_SCALE).view(-1, 1)


def _saturated(layer: Quantized) -> Tensor:
    """Return how many weights of a layer are outside the range in which the gradient passes."""
    if layer.grid.has_zero_point:
        raise ValueError(f"scheme is {layer.grid.scheme!r}, must be one without zero points")
    scale = _by_row(layer)
    ratio = layer.weight.detach().float().view(scale.numel(), -1) / scale
    low, high = layer.grid.passes
    return ((ratio < low) | (ratio > high)).sum()
