"""The training methods behind one interface: plain QAT, WinQ, SQuAT and StableQAT."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import nn

from ..methods.squat import SQuATConfig
from ..methods.stable_qat import StableQATConfig
from ..methods.stats import GridStats
from ..methods.winq import Closure, WinQConfig

#: Methods by the name on the command line.
METHODS = ("qat", "winq", "squat", "stableqat")


class Method(Protocol):
    """What the loop needs of a training method.

    :class:`WinQ`, :class:`SQuAT` and :class:`StableQAT` fit without an adapter.

    Attributes:
        steps: optimizer steps so far.
    """

    steps: int

    @property
    def stats(self) -> GridStats | None:
        """Statistics of the codes; None if the model has no quantized layer."""

    @property
    def due(self) -> bool:
        """Whether the next :meth:`after_step` changes weights."""

    def gradient(self, closure: Closure) -> Any:
        """Compute the gradient for the optimizer into ``.grad``, and return the loss at the quantized weights."""

    def after_step(self) -> Any:
        """Count a step of the optimizer, and do what the method does after a step."""

    def log(self) -> dict[str, float]:
        """Return the values to log, and restart the counts."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state for a checkpoint, as JSON-able values."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state that ``state_dict`` returned."""


class QAT:
    """Plain quantization-aware training: one pass a step. It logs nothing if the model has no quantized layer."""

    due = False

    def __init__(self, model: nn.Module, quantized: bool = True) -> None:
        self.steps = 0
        self.stats = GridStats(model) if quantized else None

    def gradient(self, closure: Closure) -> Any:
        """Call the closure once."""
        return closure()

    def after_step(self) -> None:
        """Count the step."""
        self.steps += 1

    def log(self) -> dict[str, float]:
        """Return the fraction of codes that flipped since the last call, and the distance to the grid in spacings."""
        return {} if self.stats is None else {"flips": self.stats.flips(), "distance": self.stats.distance()}

    def state_dict(self) -> dict[str, Any]:
        """Return nothing: the method has no state."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Do nothing."""


@dataclass(frozen=True)
class MethodConfig:
    """The chosen method, and the settings of all methods.

    Attributes:
        name: one of ``METHODS``.
        winq: settings of ``winq``, ignored by other methods.
        squat: settings of ``squat``, ignored by other methods.
        stableqat: settings of ``stableqat``, ignored by other methods.
    """

    name: str = "qat"
    winq: WinQConfig = field(default_factory=WinQConfig)
    squat: SQuATConfig = field(default_factory=SQuATConfig)
    stableqat: StableQATConfig = field(default_factory=StableQATConfig)

    def start(self, model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> Method:
        """Return the method for a quantized model that is about to be trained for ``steps`` steps."""
        if self.name == "winq":
            return self.winq.start(model, steps)
        if self.name == "squat":
            return self.squat.start(model, optimizer)
        if self.name == "stableqat":
            return self.stableqat.start(model)
        return QAT(model)
