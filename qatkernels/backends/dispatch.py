"""What the registry says, told to torch's dispatcher.

The choice between backends is made in C++, by the extension: a call that a C++ kernel takes never enters Python.
Without the extension it is made here.
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
    """Register the orders with torch's dispatcher: a kernel itself where it takes every call, a choice where not."""
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
                    pass  # it serves where nothing else does
                elif REGISTRY.backends[backend].compiled:
                    importlib.import_module("qatkernels._C").implement("qatkernels", op_name, device)
                else:
                    LIBRARY.impl(op_name, REGISTRY.implementations[op_name][backend], device)


def choice(op: Op, op_name: str, stages: list[Stage], registry: Registry = REGISTRY) -> Callable[..., Any]:
    """Return what passes each call to the first stage that takes it, in Python."""

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
    """Return a stage as the extension's choice takes it, by names of ops: what is written in Python becomes one.

    Args:
        op: the op.
        op_name: its name, or that of its ``_out`` form.
        stage: a stage of its order.
        device: ``"CPU"`` or ``"CUDA"``, where the choice is to be made.
        registry: where the stage is from.

    Returns:
        The op to call, the op that says whether it takes a call if there is one, and the stage's limit of rows.
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
    """Make an op of a Python function, in a namespace of its backend, and return its name."""
    library, (name, signature) = _library(backend), schema.split("(", 1)
    while hasattr(getattr(torch.ops, library.ns), name):
        name += "_again"  # registered before, in a test: choices made then keep what they had
    library.define(f"{name}({signature}")
    library.impl(name, implementation, device)
    return f"{library.ns}::{name}"


@functools.cache
def _library(backend: str) -> torch.library.Library:
    """Return the namespace of a backend that is written in Python; as long as the process lives."""
    return torch.library.Library(f"qatkernels_{backend}", "FRAGMENT")
