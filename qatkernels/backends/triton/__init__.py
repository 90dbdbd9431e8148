"""Triton kernels: one file for each op or family of ops, with the same name as in `qatkernels/ops`."""

from __future__ import annotations

import importlib
import os
import pkgutil
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...ops._op import Op
from ...ops.packed_weight import PackedWeight
from ..registry import Backend, Registry


def _unreachable() -> str | None:
    """Say why no tensor can be where these kernels run: importing Triton takes a third of a second."""
    if torch.version.cuda or torch.version.hip or os.environ.get("TRITON_INTERPRET") == "1":
        return None
    return f"this build of torch ({torch.__version__}) has no GPUs"


def _load(registry: Registry) -> None:
    """Import every file of kernels. Each registers its launchers.

    Raises:
        ImportError: if Triton is not installed.
    """
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
    importlib.import_module(f"{__name__}._plans").observe()


def _planned(op: Op, implementation: Callable[..., Any]) -> Callable[..., Any]:
    """Return an implementation that replays launches of earlier calls of the same kind (`_plans.py`)."""
    return importlib.import_module(f"{__name__}._plans").planned(op, implementation)


def _warm_up(weight: PackedWeight, dtype: torch.dtype, bias: Tensor | None, act_bits: int | None) -> None:
    """Compile the kernels of products with a weight."""
    importlib.import_module(f"{__name__}.lowbit_linear").warm_up(weight, dtype, bias=bias, act_bits=act_bits)


BACKENDS = (
    Backend("triton", ("CUDA",), _load, priority=20, wrap=_planned, unreachable=_unreachable, warm_up=_warm_up),
)
