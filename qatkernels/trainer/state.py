"""What the steps of a phase work on, and how far they are."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..methods.values import check_count, is_number
from . import data, report
from .config import TrainConfig
from .display import TrainingDisplay
from .guard import Guard
from .methods import Method
from .parallel import Processes
from .phases import Phase
from .signals import Interrupted, Stop


@dataclass(frozen=True)
class Run:
    """What every phase shares."""

    config: TrainConfig
    corpus: data.Corpus
    log: report.Log
    display: TrainingDisplay
    stop: Stop
    group: Processes

    def folder(self, name: str) -> Path:
        """Return the folder of a phase."""
        return Path(self.config.out) / name

    def stop_if_asked(self) -> None:
        """Raise Interrupted if a process was sent a signal; all must call."""
        if number := self.group.any(self.stop.number or 0):
            raise Interrupted(number)


@dataclass(frozen=True)
class Training:
    """What the steps of a phase work on.

    Attributes:
        run: what the phases share.
        phase: the one.
        model: bare, for whoever looks at its parameters.
        wrapped: what is called in place of the model.
        optimizer: its AdamW.
        method: what makes gradients of passes.
        guard: what notices the first bad step.
    """

    run: Run
    phase: Phase
    model: nn.Module
    wrapped: nn.Module
    optimizer: torch.optim.Optimizer
    method: Method
    guard: Guard


@dataclass
class Progress:
    """How far a phase is, and how many steps its weights had seen before; part of its checkpoint."""

    first: int = 0
    step: int = 0
    seconds: float = 0.0
    start: float = math.nan
    held_out: float = math.nan
    warned: bool = False  # that scales are at the floor
    method: dict[str, Any] = field(default_factory=dict)

    def check(self, steps: int) -> None:
        """Raise ValueError unless this is how far a phase of so many steps can be."""
        check_count("first", self.first, 0)
        check_count("step", self.step, 0)
        if self.step > steps:
            raise ValueError(f"step is {self.step}, must be at most {steps}")
        for name in ("seconds", "start", "held_out"):
            if not is_number(getattr(self, name)):
                raise ValueError(f"{name} is {getattr(self, name)!r:.80}, must be a number")
