"""StableQAT: a gradient of rounding that is smallest at the levels (Zhao et al., 2026, arXiv 2601.19320)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..nn import quantized_modules
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

    The factor is no constant of a grid, so kernels do not compute it: each training forward quantizes the weight once
    more, and keeps a factor for each weight until the backward. Forwards in eval mode are straight-through, so tools of
    :mod:`qatkernels.hessian` see StableQAT's gradient in training mode only.

    Args:
        model: a quantized model; may be wrapped (DDP, FSDP2, torch.compile) before or after.
        amplitude: of the first harmonic; 0 is straight-through.

    Attributes:
        steps: calls of :meth:`after_step`.
        stats: statistics of the codes.

    Raises:
        ValueError: if the amplitude is out of range, the model has no quantized layer, or a grid takes the sign of a
            weight (binary, which rounds nothing). In a forward: if a weight is a DTensor (tensor parallel), or only its
            codes are gathered (:func:`qatkernels.nn.gather_codes`).
    """

    due = False

    def __init__(self, model: nn.Module, *, amplitude: float = StableQATConfig.amplitude) -> None:
        if not is_number(amplitude) or not 0 <= amplitude < LARGEST:
            raise ValueError(f"amplitude is {amplitude!r}, must be in [0, {LARGEST:.4f})")
        for name, layer in layers_by_weight(model).items():
            if layer.grid.by_sign:
                raise ValueError(f"{name} has scheme {layer.grid.scheme!r}, must have one that rounds: bits of 1.58 on")
        self.model, self.amplitude, self.steps, self.stats = model, amplitude, 0, GridStats(model)
        self._set(math.sqrt(2) * math.pi * amplitude)

    def _set(self, a: float) -> None:
        for layer in quantized_modules(self.model).values():
            layer.quantizer.surrogate = a

    def remove(self) -> None:
        """Make gradients straight-through again."""
        self._set(0.0)

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
