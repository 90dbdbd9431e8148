"""Registers the backends' implementations with torch's dispatcher.

If several backends can serve a call, the extension chooses in C++, so a call that a C++ kernel takes never enters
Python. Without the extension, the choice is made here in Python.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch

from ..ops._op import LIBRARY, Op
from .compiled import condition
from .registry import DEVICES, REGISTRY, Registry, Stage


def register() -> None:
    """Register each op: the first backend's kernel if it takes every call, otherwise a function that chooses."""
    for op in REGISTRY.ops.values():
        for device in DEVICES:
            stages = REGISTRY.order(op.name, device)
            backend = stages[0].backend
            for op_name in op.schemas:
                if not stages[0].takes_all and "cpp" in REGISTRY.missing:
                    LIBRARY.impl(op_name, choice(op, op_name, stages), device)
                elif not stages[0].takes_all:
                    compiled = importlib.import_module("qatkernels._C")
                    compiled.choose("qatkernels", op_name, device, [named(op, op_name, s, device) for s in stages])
                elif backend == "reference":
                    pass  # torch calls the reference if nothing else is registered
                elif REGISTRY.backends[backend].compiled:
                    importlib.import_module("qatkernels._C").implement("qatkernels", op_name, device)
                else:
                    LIBRARY.impl(op_name, REGISTRY.implementations[op_name][backend], device)


def choice(op: Op, op_name: str, stages: list[Stage], registry: Registry = REGISTRY) -> Callable[..., Any]:
    """Return a Python function that passes each call to the first stage that takes it."""

    def run(*args: Any) -> Any:
        inputs = args[: len(op.parameters)]
        for stage in stages:
            if stage.rows is not None and args[0].shape[:-1].numel() > stage.rows:
                continue
            if not stage.asked or registry.conditions[op.name][stage.backend](*inputs):
                return _implementation(op, op_name, stage, registry)(*args)
        raise RuntimeError(f"no backend takes this call of {op_name}")

    return run


def _implementation(op: Op, op_name: str, stage: Stage, registry: Registry) -> Callable[..., Any]:
    if stage.backend == "reference" and op_name == op.name:
        return op.run_reference
    return registry.implementations[op_name][stage.backend]


def named(
    op: Op, op_name: str, stage: Stage, device: str, registry: Registry = REGISTRY
) -> tuple[str, str | None, int | None]:
    """Return a stage in the form that the extension needs: names of ops. A Python implementation becomes an op.

    Args:
        op: the op.
        op_name: its name, or that of its ``_out`` form.
        stage: a stage of its order.
        device: ``"CPU"`` or ``"CUDA"``, the device of the calls.
        registry: the registry of the stage.

    Returns:
        The op to call, the op that tells whether it takes a call (None if it takes all), and the limit of rows.
    """
    backend = registry.backends.get(stage.backend)
    if backend is not None and backend.compiled:
        return f"qatkernels_cpp::{op_name}", f"qatkernels_cpp::{condition(op)}" if stage.asked else None, stage.rows
    name = _as_op(stage.backend, op.schemas[op_name], _implementation(op, op_name, stage, registry), device)
    if not stage.asked:
        return name, None, stage.rows
    serves = registry.conditions[op.name][stage.backend]
    return name, _as_op(stage.backend, f"{condition(op)}({op.arguments}) -> bool", serves, device), stage.rows


def _as_op(backend: str, schema: str, implementation: Callable[..., Any], device: str) -> str:
    """Register a Python function as an op in the namespace of its backend, and return the op's name."""
    library, (name, signature) = _library(backend), schema.split("(", 1)
    while hasattr(getattr(torch.ops, library.ns), name):
        name += "_again"  # registered before, in a test; earlier choices keep the earlier op
    library.define(f"{name}({signature}")
    library.impl(name, implementation, device)
    return f"{library.ns}::{name}"


@functools.cache
def _library(backend: str) -> torch.library.Library:
    """Return the namespace of a Python backend. It exists until the process ends."""
    return torch.library.Library(f"qatkernels_{backend}", "FRAGMENT")
