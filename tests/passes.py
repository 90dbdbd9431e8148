"""Events in the middle of a training run: a signal, a lost machine or a broken layer, at a forward pass of the model.

They use torch's global module hooks, so that nothing of the library is replaced.
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook

from qatkernels.trainer.demo_model import Transformer


@dataclass
class Passes:
    """The number of passes so far."""

    count: int = 0


class MachineGone(RuntimeError):
    """An exception that nothing catches: the run ends at once, without a checkpoint."""


@contextlib.contextmanager
def each_pass(act: Callable[[int, nn.Module], Any] = lambda number, model: None) -> Iterator[Passes]:
    """Call ``act(number, model)`` before each forward pass of training, counted from 1.

    A step of plain training without gradient accumulation is one pass. Evaluations do not count.
    """
    passes = Passes()

    def before(module: nn.Module, inputs: Any) -> None:
        if isinstance(module, Transformer) and torch.is_grad_enabled():
            passes.count += 1
            act(passes.count, module)

    hook = register_module_forward_pre_hook(before)
    try:
        yield passes
    finally:
        hook.remove()


def signals_at(*numbers: int, signal_number: int = signal.SIGTERM) -> contextlib.AbstractContextManager[Passes]:
    """Send this process SIGTERM at the given passes."""
    return each_pass(lambda number, _: signal.raise_signal(signal_number) if number in numbers else None)


def gone_at(*numbers: int) -> contextlib.AbstractContextManager[Passes]:
    """Raise MachineGone at the given passes."""

    def act(number: int, model: nn.Module) -> None:
        if number in numbers:
            raise MachineGone("the machine is gone")

    return each_pass(act)
