"""What a step of quantization-aware training is: plain, WinQ's or SQuAT's, behind one interface."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import nn

from ..methods.squat import SQuATConfig
from ..methods.stats import GridStats
from ..methods.winq import Closure, WinQConfig

#: Methods by the name on the command line.
METHODS = ("qat", "winq", "squat")


class Method(Protocol):
    """What the loop asks of a method; WinQ and SQuAT are, as they stand.

    Attributes:
        steps: optimizer steps so far.
        stats: what counts flips; None if nothing is quantized.
        due: whether the next :meth:`after_step` moves weights.
    """

    steps: int

    @property
    def stats(self) -> GridStats | None:
        """See above."""

    @property
    def due(self) -> bool:
        """See above."""

    def gradient(self, closure: Closure) -> Any:
        """Leave the gradient to step with in ``.grad``, and return the loss at the quantized weights."""

    def after_step(self) -> Any:
        """Count the optimizer's step, and do what comes after it."""

    def log(self) -> dict[str, float]:
        """Return what to log, and begin to count anew."""

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint needs, as JSON-able values."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where ``state_dict`` was called."""


class QAT:
    """The plain gradient; without a quantized layer in the model nothing is logged."""

    due = False

    def __init__(self, model: nn.Module, quantized: bool = True) -> None:
        self.steps = 0
        self.stats = GridStats(model) if quantized else None

    def gradient(self, closure: Closure) -> Any:
        """Call the closure once."""
        return closure()

    def after_step(self) -> None:
        """Count."""
        self.steps += 1

    def log(self) -> dict[str, float]:
        """Return flips since the last call, and the distance to the grid in spacings."""
        return {} if self.stats is None else {"flips": self.stats.flips(), "distance": self.stats.distance()}

    def state_dict(self) -> dict[str, Any]:
        """Return nothing: the method has no state."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Do nothing."""


@dataclass(frozen=True)
class MethodConfig:
    """A method, and the settings of each.

    Attributes:
        name: one of ``METHODS``.
        winq: used by ``winq`` alone.
        squat: used by ``squat`` alone.
    """

    name: str = "qat"
    winq: WinQConfig = field(default_factory=WinQConfig)
    squat: SQuATConfig = field(default_factory=SQuATConfig)

    def start(self, model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> Method:
        """Return the method for a quantized model that is about to be trained for ``steps`` steps."""
        if self.name == "winq":
            return self.winq.start(model, steps)
        if self.name == "squat":
            return self.squat.start(model, optimizer)
        return QAT(model)
