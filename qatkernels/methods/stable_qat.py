"""StableQAT: a gradient of rounding that is smallest at the levels (Zhao et al., 2026, arXiv 2601.19320)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..arithmetic import quotient
from ..dtensor import is_dtensor
from ..grids import MIN_SCALE
from ..nn.quantized import Quantized
from ..ops import fake_quantize
from ..options import Range, check, option
from .shards import layers_by_weight
from .stats import GridStats
from .values import is_number

#: Beyond this amplitude the factor is not positive: sqrt(2) * pi * amplitude must be below 1.
LARGEST = 1 / (math.sqrt(2) * math.pi)


@dataclass(frozen=True)
class StableQATConfig:
    """Settings of :class:`StableQAT`.

    Raises:
        ConfigError: if a value is out of range.
    """

    amplitude: float = option(
        0.2, "of the surrogate's first harmonic; 0 is straight-through", Range(0, LARGEST, open_high=True)
    )

    def __post_init__(self) -> None:
        check(self)

    def start(self, model: nn.Module) -> StableQAT:
        """Return StableQAT for a quantized model."""
        return StableQAT(model, amplitude=self.amplitude)


class StableQAT:
    """Multiplies the gradient of every quantized weight by a factor that depends on where it is between two levels.

        stable = StableQAT(model)
        ...                                    # the loop stays as it is
        stable.remove()

    With d the distance of a weight to its level in spacings (-1/2 to 1/2) and ``a = sqrt(2) * pi * amplitude`` the
    factor is ``(1 - a * cos(pi * d)) / (1 + a * cos(pi * d))``: 1 half way between two levels, and 0.06 at a level for
    the amplitude of 0.2 that the authors' code has. It comes from the first harmonic of rounding, drawn in coordinates
    that are turned by 45 degrees. The authors use it for lsq grids of 3 and 4 bits, and a straight-through gradient
    below. The gradient of scales is not changed.

    The factor is no constant of a grid, so kernels do not compute it. It is a hook on each weight, which reads the
    weight and its gradient once more.

    Args:
        model: a quantized model.
        amplitude: of the first harmonic; 0 is straight-through.

    Attributes:
        steps: calls of :meth:`after_step`.
        stats: statistics of the codes.

    Raises:
        ValueError: if the amplitude is out of range, the model has no quantized layer, a grid takes the sign of a
            weight (binary, which rounds nothing), or a weight is sharded: its gradient does not pass the hook.
    """

    due = False

    def __init__(self, model: nn.Module, *, amplitude: float = StableQATConfig.amplitude) -> None:
        if not is_number(amplitude) or not 0 <= amplitude < LARGEST:
            raise ValueError(f"amplitude is {amplitude!r}, must be in [0, {LARGEST:.4f})")
        layers = layers_by_weight(model)
        for name, layer in layers.items():
            if layer.grid.by_sign:
                raise ValueError(f"{name} has scheme {layer.grid.scheme!r}, must have one that rounds: bits of 1.58 on")
            if is_dtensor(layer.weight):
                raise ValueError(f"{name} has a sharded weight, must have a whole one: its gradient passes no hook")
        self.amplitude, self.steps, self.stats = amplitude, 0, GridStats(model)
        self._hooks = [
            layer.weight.register_hook(partial(_times_factor, layer, math.sqrt(2) * math.pi * amplitude))
            for layer in layers.values() if layer.weight.requires_grad
        ]  # fmt: skip

    def remove(self) -> None:
        """Make gradients straight-through again."""
        for hook in self._hooks:
            hook.remove()

    def gradient(self, closure: Callable[[], Any]) -> Any:
        """Call the closure once."""
        return closure()

    def after_step(self) -> None:
        """Count the step."""
        self.steps += 1

    def log(self) -> dict[str, float]:
        """Return the fraction of codes that flipped since the last call, and the distance to the grid in spacings."""
        return {"flips": self.stats.flips(), "distance": self.stats.distance()}

    def state_dict(self) -> dict[str, Any]:
        """Return nothing: the method has no state."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Do nothing."""


@torch.no_grad()
def _times_factor(layer: Quantized, a: float, gradient: Tensor) -> Tensor:
    cosine = torch.cos(math.pi * _from_level(layer))
    return gradient * ((1 - a * cosine) / (1 + a * cosine)).to(gradient.dtype)


def _from_level(layer: Quantized) -> Tensor:
    """Return the distance of each weight to its level in spacings; in float32, like the weight."""
    weight, (scale, zero_point) = layer.weight, layer.quantizer.stored(layer.scale, layer.zero_point)
    values = fake_quantize(weight, scale, layer.grid, group_size=layer.group_size, zero_point=zero_point)
    spacing = quotient(scale.clamp_min(MIN_SCALE).view(-1, 1), layer.grid.steps)
    distance = (weight.float() - values.float()).view(spacing.numel(), -1)
    return (distance / spacing).view(weight.shape)
