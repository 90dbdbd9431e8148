"""Triton kernels: one file for each op or family, named as its meaning in `qatkernels/ops`."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable


def load() -> dict[str, Callable[..., None]]:
    """Import every file of kernels and return the launchers by op.

    Raises:
        ImportError: if Triton is not installed.
    """
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
    return importlib.import_module(f"{__name__}._launchers").LAUNCHERS
