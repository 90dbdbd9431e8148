"""The objects that training steps use, and the progress of a phase."""

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
    """The objects that all phases of a run share."""

    config: TrainConfig
    corpus: data.Corpus
    log: report.Log
    display: TrainingDisplay
    stop: Stop
    group: Processes

    def folder(self, name: str) -> Path:
        """Return the folder of the phase of this name."""
        return Path(self.config.out) / name

    def stop_if_asked(self) -> None:
        """Raise Interrupted if any process received a signal; all processes must call this."""
        if number := self.group.any(self.stop.number or 0):
            raise Interrupted(number)


@dataclass(frozen=True)
class Training:
    """The objects that the steps of one phase use.

    Attributes:
        run: the objects that all phases share.
        phase: this phase.
        model: the model, not wrapped: for its parameters and its state dict.
        wrapped: the module to call: the model, or its DDP or FSDP2 wrapper.
        optimizer: AdamW of the model.
        method: computes gradients from one or more passes.
        guard: detects the first non-finite step.
        teacher: the model whose outputs the model also learns; None without distillation.
    """

    run: Run
    phase: Phase
    model: nn.Module
    wrapped: nn.Module
    optimizer: torch.optim.Optimizer
    method: Method
    guard: Guard
    teacher: nn.Module | None = None


@dataclass
class Progress:
    """The progress of a phase; part of its checkpoint.

    Attributes:
        first: steps that the initial weights of the phase were trained for in earlier phases.
        step: steps taken in this phase.
        seconds: time that its steps took.
        start: held-out bits per byte before its first step.
        held_out: held-out bits per byte at the last evaluation.
        warned: whether the warning about scales at the floor was given.
        method: state of the training method.
    """

    first: int = 0
    step: int = 0
    seconds: float = 0.0
    start: float = math.nan
    held_out: float = math.nan
    warned: bool = False
    method: dict[str, Any] = field(default_factory=dict)

    def check(self, steps: int) -> None:
        """Raise ValueError if this cannot be the progress of a phase of ``steps`` steps."""
        check_count("first", self.first, 0)
        check_count("step", self.step, 0)
        if self.step > steps:
            raise ValueError(f"step is {self.step}, must be at most {steps}")
        for name in ("seconds", "start", "held_out"):
            if not is_number(getattr(self, name)):
                raise ValueError(f"{name} is {getattr(self, name)!r:.80}, must be a number")
