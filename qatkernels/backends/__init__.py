"""Implementations of the ops, and the choice of the one that serves a call.

`registry.py` has the rule and the table. `dispatch.py` registers them with torch. Every other file or package in this
folder that has ``BACKENDS`` is found automatically. Another distribution can add backends through an entry point in the
group ``qatkernels.backends`` that names an iterable of :class:`Backend` (example in CONTRIBUTING.md).
"""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import pkgutil
import warnings

from ..ops._op import OPS
from .compiled import extension, fits
from .dispatch import named, register
from .registry import DEVICES, REGISTRY, Backend, Registry, Rule, Stage, declare, implements

__all__ = [
    "CONDITIONS", "DEVICES", "IMPLS", "MISSING", "OPS", "REGISTRY", "RULES", "Backend", "Registry", "Rule", "Stage",
    "chosen", "empty_cache", "extension", "fits", "implements", "install", "load_backend", "named", "order", "register",
    "report",
]  # fmt: skip

#: The tables of the registry that serves ``torch.ops.qatkernels``; see :class:`Registry`.
IMPLS, CONDITIONS, MISSING, RULES = (
    REGISTRY.implementations, REGISTRY.conditions, REGISTRY.missing, REGISTRY.rules,
)  # fmt: skip
order, chosen, report, load_backend = REGISTRY.order, REGISTRY.chosen, REGISTRY.report, REGISTRY.load_backend


def install() -> None:
    """Find the backends and their implementations, and register them with torch."""
    for found in pkgutil.iter_modules(__path__):
        declare(getattr(importlib.import_module(f"{__name__}.{found.name}"), "BACKENDS", ()))
    for entry in importlib.metadata.entry_points(group="qatkernels.backends"):
        try:
            declare(entry.load())
        except Exception as error:
            MISSING[entry.name] = f"its entry point {entry.value!r} raises {type(error).__name__}: {error}"
            warnings.warn(f"backend {entry.name!r} is left out: {MISSING[entry.name]}", stacklevel=3)
    REGISTRY.load()
    register()
    if "cpp" in MISSING and os.environ.get("QATKERNELS_BACKEND") != "reference":
        warnings.warn(
            "qatkernels has no compiled kernels that work here and runs on the (slow) PyTorch reference on CPU; "
            "`qatkernels doctor` says why and how to get them",
            stacklevel=3,
        )


def empty_cache() -> None:
    """Release the CPU kernels' memory pool to the system, as ``torch.cuda.empty_cache`` does for CUDA.

    Outputs of 1 MiB or more are allocated from blocks of the pool. A block is reused when no tensor refers to it any
    more. The pool never keeps more than was in use at once.
    """
    compiled = extension()
    if compiled is not None:
        compiled.empty_cache()
