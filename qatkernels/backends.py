"""Which implementation serves which device, decided once at import.

`IMPLS[op][backend]` reaches every implementation present, whatever was chosen; tests and benchmarks use it. The
choice is the first of `PREFERENCE` that is present. ``QATKERNELS_BACKEND=reference|cpp|triton|cuda`` overrides it for
every op that has a kernel there; a backend that is missing altogether is an error, never a silent substitute.
"""

from __future__ import annotations

import importlib
import os
import warnings
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch

from .ops._op import LIBRARY, OPS, allocating, checked, writing

#: Backends by device, fastest first. Per-op exceptions belong in `CHOICES`, each with its measurement in bench/results.
PREFERENCE: dict[str, tuple[str, ...]] = {"CPU": ("cpp", "reference"), "CUDA": ("triton", "cuda", "reference")}
CHOICES: dict[tuple[str, str], str] = {}

#: Every implementation present: ``IMPLS[op][backend]``; ``op`` is a name in ``torch.ops.qatkernels``.
IMPLS: dict[str, dict[str, Callable[..., Any]]] = {}
#: Why a backend is absent, for `qatkernels doctor`.
MISSING: dict[str, str] = {}


def extension() -> ModuleType | None:
    """Return the compiled extension, or None if it was not built."""
    try:
        compiled = importlib.import_module("qatkernels._C")
    except ImportError as error:
        MISSING["cpp"] = str(error)
        return None
    built_for = compiled.build_info()["torch"]
    if built_for != torch.__version__:
        # Nothing promises that another version lays out its tensors alike.
        MISSING["cpp"] = f"the extension was built for torch {built_for}, this is {torch.__version__}"
        return None
    return compiled


def _load() -> ModuleType | None:
    for name, op in OPS.items():
        IMPLS[name] = {"reference": op.reference}
        if op.outputs:
            IMPLS[f"{name}_out"] = {"reference": op.reference_out}
    compiled = extension()
    if compiled is not None:
        if not compiled.build_info()["cuda_archs"]:
            MISSING["cuda"] = "the extension was built without CUDA"
        for op in OPS.values():
            for op_name, schema in op.schemas.items():
                if compiled.serves(op_name, "CPU") or compiled.serves(op_name, "CUDA"):
                    compiled.declare("qatkernels_cpp", op_name, schema)
                for backend, device in (("cpp", "CPU"), ("cuda", "CUDA")):
                    if compiled.serves(op_name, device):
                        IMPLS[op_name][backend] = getattr(torch.ops.qatkernels_cpp, op_name)
    else:
        MISSING["cuda"] = "the extension was not built"
    try:
        launchers = importlib.import_module("qatkernels.triton").load()
    except ImportError as error:
        MISSING["triton"] = str(error)
        return compiled
    for name, launcher in launchers.items():
        if OPS[name].outputs:
            IMPLS[f"{name}_out"]["triton"] = writing(OPS[name], launcher)
        IMPLS[name]["triton"] = (allocating if OPS[name].outputs else checked)(OPS[name], launcher)
    return compiled


def chosen(op: str, device: str) -> str:
    """Return the backend that serves an op on a device type (``"CPU"`` or ``"CUDA"``).

    Raises:
        RuntimeError: if QATKERNELS_BACKEND names a backend that cannot serve it.
    """
    forced = os.environ.get("QATKERNELS_BACKEND")
    if not forced:
        return CHOICES.get((op, device)) or _first(op, device)
    known = sorted({backend for preference in PREFERENCE.values() for backend in preference})
    if forced not in known:
        raise RuntimeError(f"QATKERNELS_BACKEND is {forced!r}, must be one of {known}")
    if forced not in PREFERENCE[device]:
        return _first(op, device)  # it says nothing about this device
    if forced in MISSING:
        raise RuntimeError(f"QATKERNELS_BACKEND is {forced!r}, which is not available: {MISSING[forced]}")
    return forced if forced in IMPLS[op] else _first(op, device)  # not every op has a kernel in every backend


def _first(op: str, device: str) -> str:
    return next(b for b in PREFERENCE[device] if b in IMPLS[op] or b == "reference")


def install() -> None:
    """Find the implementations and register the chosen ones with torch's dispatcher."""
    compiled = _load()
    for name, op in OPS.items():
        for device in PREFERENCE:
            backend = chosen(name, device)
            for op_name in op.schemas:
                if backend in ("cpp", "cuda") and compiled is not None:
                    compiled.implement("qatkernels", op_name, device)
                elif backend == "triton":
                    LIBRARY.impl(op_name, IMPLS[op_name]["triton"], device)
    if compiled is None and os.environ.get("QATKERNELS_BACKEND") != "reference":
        warnings.warn(
            "qatkernels was installed without its compiled kernels and runs on the (slow) PyTorch reference on CPU; "
            "`qatkernels doctor` says what is missing and how to get it",
            stacklevel=3,
        )


def empty_cache() -> None:
    """Return the memory that the CPU kernels keep for their next results to the system.

    Results of a MiB or more come from blocks that are reused once nothing refers to them; what is kept never makes the
    footprint exceed its own peak. The counterpart of ``torch.cuda.empty_cache``.
    """
    compiled = extension()
    if compiled is not None:
        compiled.empty_cache()
