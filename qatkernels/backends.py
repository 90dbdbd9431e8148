"""Which implementation serves which call: backends in an order for each device; a call goes to the first that takes it.

`IMPLS[op][backend]` reaches every implementation present, whatever the order; tests and benchmarks use it. The order is
`PREFERENCE`, with the exceptions in `RULES`. A backend that has no kernel for an op is left out. One whose kernel takes
only some calls says so in `CONDITIONS`, and passes the others on. The reference takes every call and ends every order.

``QATKERNELS_BACKEND=reference|cpp|triton|cuda`` puts a backend first for every op that has a kernel there; what its
kernels do not take goes on in the usual order. A backend that is missing altogether is an error, never a silent
substitute.

The choice is made in C++, by the extension: a call that a C++ kernel takes never enters Python.
"""

from __future__ import annotations

import functools
import importlib
import os
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch

from .ops._op import LIBRARY, OPS, Kernel, Op


@dataclass(frozen=True)
class Rule:
    """Calls of an op that try another backend first.

    Attributes:
        backend: the backend.
        rows: the calls are those whose first argument has at most so many rows (tokens); all calls if None.
    """

    backend: str
    rows: int | None = None


@dataclass(frozen=True)
class Stage:
    """A backend that calls of an op may reach.

    Attributes:
        backend: the backend.
        rows: most rows of the first argument that it is asked for; any number if None.
        asked: whether its kernel takes only some calls, and is asked for each.
    """

    backend: str
    rows: int | None = None
    asked: bool = False

    @property
    def takes_all(self) -> bool:
        """Whether no call goes on from here."""
        return self.rows is None and not self.asked


#: Backends by device, fastest first.
PREFERENCE: dict[str, tuple[str, ...]] = {"CPU": ("cpp", "reference"), "CUDA": ("triton", "cuda", "reference")}
#: Exceptions by op and device, first match first. A rule says whether it is measured (in bench/results) or estimated.
RULES: dict[tuple[str, str], tuple[Rule, ...]] = {
    # Estimated, not measured: the machine code of the decode kernel reads 4 bits of 8192 x 28672 in about 48 µs and
    # Triton's in about 90, 4096 x 4096 in 6-8 and about 10. It takes at most 8 tokens (docs/architecture.md).
    ("lowbit_linear", "CUDA"): (Rule("cuda", rows=8),),
}
#: The backends that the extension holds, and their devices.
COMPILED = {"cpp": "CPU", "cuda": "CUDA"}

#: Every implementation present: ``IMPLS[op][backend]``; ``op`` is a name in ``torch.ops.qatkernels``.
IMPLS: dict[str, dict[str, Callable[..., Any]]] = {}
#: What says of an op's arguments whether a kernel that takes only some calls takes one: ``CONDITIONS[op][backend]``.
CONDITIONS: dict[str, dict[str, Callable[..., bool]]] = {}
#: Why a backend is absent, for `qatkernels doctor`.
MISSING: dict[str, str] = {}


def extension() -> ModuleType | None:
    """Return the compiled extension, or None if it was not built."""
    try:
        compiled = importlib.import_module("qatkernels._C")
    except ImportError as error:
        MISSING["cpp"] = str(error)
        return None
    info = compiled.build_info()
    if not fits(info["torch"], torch.__version__, bool(info["cuda_archs"])):
        MISSING["cpp"] = f"the extension was built for torch {info['torch']}, this is {torch.__version__}"
        return None
    return compiled


def fits(built: str, running: str, cuda: bool) -> bool:
    """Return whether an extension works with a torch.

    Nothing promises that another version lays out its tensors alike, so it must be the version that the extension was
    built with. Builds of one release from one source are alike but for CUDA: they differ in the label after the ``+``
    (``2.13.0``, ``2.13.0+cpu``, ``2.13.0+cu130``), and an extension without CUDA kernels uses nothing that differs. One
    with CUDA kernels links to libraries of one label. For versions that are no releases the label is the source.

    Args:
        built: version of torch that the extension was built with.
        running: version of torch that is there.
        cuda: whether the extension holds CUDA kernels.
    """
    release = built.partition("+")[0]
    if cuda or re.fullmatch(r"[0-9.]+(\.post[0-9]+)?", release) is None:
        return built == running
    return release == running.partition("+")[0]


def _load() -> ModuleType | None:
    for name, op in OPS.items():
        IMPLS[name] = {"reference": op.reference}
        if op.outputs:
            IMPLS[f"{name}_out"] = {"reference": op.run_reference_out}
    compiled = extension()
    if compiled is not None:
        if not compiled.build_info()["cuda_archs"]:
            MISSING["cuda"] = "the extension was built without CUDA"
        for op in OPS.values():
            _load_compiled(compiled, op)
    else:
        MISSING["cuda"] = "the extension was not built"
    try:
        triton = importlib.import_module("qatkernels.triton")
        launchers = triton.load()
    except ImportError as error:
        MISSING["triton"] = str(error)
        return compiled
    for name, launcher in launchers.items():
        kernel = Kernel(OPS[name], launcher)
        if OPS[name].outputs:
            IMPLS[f"{name}_out"]["triton"] = triton.planned(OPS[name], kernel.writing)
        IMPLS[name]["triton"] = triton.planned(OPS[name], kernel.allocating)
    return compiled


def _load_compiled(compiled: ModuleType, op: Op) -> None:
    """Declare what the extension holds of an op: its kernels, and their conditions."""
    condition = f"{op.name}_serves"
    compiled.state(op.name, f"{op.name}({op.arguments}) -> ()", op.contract.text)
    for op_name, schema in {**op.schemas, condition: f"{condition}({op.arguments}) -> bool"}.items():
        served = [backend for backend, device in COMPILED.items() if compiled.serves(op_name, device)]
        if served:
            compiled.declare("qatkernels_cpp", op_name, schema)
        for backend in served:
            table, key = (CONDITIONS, op.name) if op_name == condition else (IMPLS, op_name)
            table.setdefault(key, {})[backend] = getattr(torch.ops.qatkernels_cpp, op_name)


def order(op: str, device: str) -> list[Stage]:
    """Return the backends that calls of an op may reach, in the order in which a call tries them.

    Args:
        op: name of the op.
        device: ``"CPU"`` or ``"CUDA"``.

    Returns:
        Stages. The last one, and only it, takes all calls.

    Raises:
        RuntimeError: if QATKERNELS_BACKEND names a backend that is unknown or missing, or a rule one of another device.
    """
    forced = _forced(device)
    first = RULES.get((op, device), ()) if forced is None else (Rule(forced),)
    stages: list[Stage] = []
    for rule in (*first, *map(Rule, PREFERENCE[device])):
        if rule.backend not in PREFERENCE[device]:
            raise RuntimeError(
                f"a rule for {op} on {device} names {rule.backend!r}, must be one of {PREFERENCE[device]}"
            )
        if rule.backend not in IMPLS[op] or (rule.rows is not None and "cpp" in MISSING):
            continue  # not here, or nobody to count rows
        stages.append(Stage(rule.backend, rule.rows, rule.backend in CONDITIONS.get(op, {})))
        if stages[-1].takes_all:
            break
    return stages


def _forced(device: str) -> str | None:
    """Return the backend that QATKERNELS_BACKEND puts first on a device, None if it says nothing about the device."""
    forced = os.environ.get("QATKERNELS_BACKEND")
    if not forced:
        return None
    known = sorted({backend for preference in PREFERENCE.values() for backend in preference})
    if forced not in known:
        raise RuntimeError(f"QATKERNELS_BACKEND is {forced!r}, must be one of {known}")
    if forced not in PREFERENCE[device]:
        return None
    if forced in MISSING:
        raise RuntimeError(f"QATKERNELS_BACKEND is {forced!r}, which is not available: {MISSING[forced]}")
    return forced


def chosen(op: str, device: str) -> str:
    """Return the backend that calls of an op try first on a device type (``"CPU"`` or ``"CUDA"``).

    Raises:
        RuntimeError: if QATKERNELS_BACKEND names a backend that cannot serve it.
    """
    return order(op, device)[0].backend


def register() -> None:
    """Register the orders with torch's dispatcher: a kernel itself where it takes every call, a choice where not."""
    for name, op in OPS.items():
        for device in PREFERENCE:
            stages = order(name, device)
            backend = stages[0].backend
            for op_name in op.schemas:
                if not stages[0].takes_all:
                    compiled = importlib.import_module("qatkernels._C")
                    compiled.choose("qatkernels", op_name, device, [named(op, op_name, s, device) for s in stages])
                elif backend in COMPILED:
                    importlib.import_module("qatkernels._C").implement("qatkernels", op_name, device)
                elif backend != "reference":
                    LIBRARY.impl(op_name, IMPLS[op_name][backend], device)


def named(op: Op, op_name: str, stage: Stage, device: str) -> tuple[str, str | None, int | None]:
    """Return a stage as the extension's choice takes it, by names of ops: what is written in Python becomes one.

    Args:
        op: the op.
        op_name: its name, or that of its ``_out`` form.
        stage: a stage of its order.
        device: ``"CPU"`` or ``"CUDA"``, where the choice is to be made.

    Returns:
        The op to call, the op that says whether it takes a call if there is one, and the stage's limit of rows.
    """
    condition = f"{op.name}_serves"
    if stage.backend in COMPILED:
        return f"qatkernels_cpp::{op_name}", f"qatkernels_cpp::{condition}" if stage.asked else None, stage.rows
    implementation = IMPLS[op_name][stage.backend]
    if stage.backend == "reference" and op_name == op.name:
        implementation = op.run_reference
    name = _as_op(stage.backend, op.schemas[op_name], implementation, device)
    if not stage.asked:
        return name, None, stage.rows
    asked = _as_op(stage.backend, f"{condition}({op.arguments}) -> bool", CONDITIONS[op.name][stage.backend], device)
    return name, asked, stage.rows


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


def install() -> None:
    """Find the implementations and register them."""
    compiled = _load()
    register()
    if compiled is None and os.environ.get("QATKERNELS_BACKEND") != "reference":
        warnings.warn(
            "qatkernels has no compiled kernels that work here and runs on the (slow) PyTorch reference on CPU; "
            "`qatkernels doctor` says why and how to get them",
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
