"""What a step of quantization-aware training is: plain, WinQ's or SQuAT's, behind one interface."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import nn

from ..methods.squat import SQuAT
from ..methods.stats import GridStats
from ..methods.winq import Closure, WinQ

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
    """A method and its settings; those of other methods are ignored. See :class:`WinQ` and :class:`SQuAT`.

    Attributes:
        name: one of ``METHODS``.
        reset_every: steps between WinQ's resets; a quarter of the phase if None (inferred: the paper resets 2 to 5
            times in a run). 0 for no resets.
        reset_until: share of the phase after which there are no more resets (ours).
    """

    name: str = "qat"
    reset_every: int | None = None
    reset_weight: float = 0.4
    reset_until: float = 1.0
    noise_std: float = 1e-3
    scale_noise_std: float | None = None
    two_sided: bool = False
    samples: int = 1
    rho: float = 0.05
    target: Literal["quantized", "latent"] = "quantized"
    norm: Literal["l2", "asam"] = "l2"
    eta: float = 0.01
    scale_every: int = 1
    minibatch: Literal["same", "next"] = "same"

    def start(self, model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> Method:
        """Return the method for a quantized model that is about to be trained for ``steps`` steps.

        Raises:
            ValueError: if a setting is out of range.
        """
        if self.name == "winq":
            every = max(steps // 4, 1) if self.reset_every is None else self.reset_every
            return WinQ(
                model, reset_every=every or None, reset_weight=self.reset_weight, noise_std=self.noise_std,
                scale_noise_std=self.scale_noise_std, two_sided=self.two_sided, samples=self.samples,
                last_reset=int(self.reset_until * steps),
            )  # fmt: skip
        if self.name == "squat":
            return SQuAT(
                model, optimizer, rho=self.rho, target=self.target, norm=self.norm, eta=self.eta,
                scale_every=self.scale_every, minibatch=self.minibatch,
            )  # fmt: skip
        return QAT(model)
