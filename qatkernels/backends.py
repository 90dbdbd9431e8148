"""Which implementation serves which call: backends in an order for each device; a call goes to the first that takes it.

`IMPLS[op][backend]` reaches every implementation present, whatever the order; tests and benchmarks use it. The order is
`PREFERENCE`, with the exceptions in `RULES`. A backend that has no kernel for an op is left out. One whose kernel takes
only some calls says so in `CONDITIONS`, and passes the others on. The reference takes every call and ends every order.

``QATKERNELS_BACKEND=reference|cpp|triton|cuda`` puts a backend first for every op that has a kernel there; what its
kernels do not take goes on in the usual order. A backend that is missing altogether is an error, never a silent
substitute.
"""

from __future__ import annotations

import importlib
import os
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch

from .ops._op import LIBRARY, OPS, Op, allocating, checked, writing

Condition = Callable[..., bool]


@dataclass(frozen=True)
class Rule:
    """Calls of an op that try another backend first.

    Attributes:
        backend: the backend.
        when: says of the op's arguments, which nobody has checked yet, whether a call is one of them; all are if None.
    """

    backend: str
    when: Condition | None = None


#: Backends by device, fastest first.
PREFERENCE: dict[str, tuple[str, ...]] = {"CPU": ("cpp", "reference"), "CUDA": ("triton", "cuda", "reference")}
#: Exceptions by op and device, first match first, each with its measurement in bench/results; there is none yet.
RULES: dict[tuple[str, str], tuple[Rule, ...]] = {}
#: The backends that the extension holds, and their devices.
COMPILED = {"cpp": "CPU", "cuda": "CUDA"}

#: Every implementation present: ``IMPLS[op][backend]``; ``op`` is a name in ``torch.ops.qatkernels``.
IMPLS: dict[str, dict[str, Callable[..., Any]]] = {}
#: What kernels that take only some calls say of the op's arguments: ``CONDITIONS[op][backend]``.
CONDITIONS: dict[str, dict[str, Condition]] = {}
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
            IMPLS[f"{name}_out"] = {"reference": op.reference_out}
    compiled = extension()
    if compiled is not None:
        if not compiled.build_info()["cuda_archs"]:
            MISSING["cuda"] = "the extension was built without CUDA"
        for op in OPS.values():
            _load_compiled(compiled, op)
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


def _load_compiled(compiled: ModuleType, op: Op) -> None:
    """Declare what the extension holds of an op: its kernels, and their conditions."""
    condition = f"{op.name}_serves"
    for op_name, schema in {**op.schemas, condition: f"{condition}({op.arguments}) -> bool"}.items():
        served = [backend for backend, device in COMPILED.items() if compiled.serves(op_name, device)]
        if served:
            compiled.declare("qatkernels_cpp", op_name, schema)
        for backend in served:
            table, key = (CONDITIONS, op.name) if op_name == condition else (IMPLS, op_name)
            table.setdefault(key, {})[backend] = getattr(torch.ops.qatkernels_cpp, op_name)


def order(op: str, device: str) -> list[tuple[str, Condition | None]]:
    """Return the backends that calls of an op may reach, in the order in which a call tries them.

    Args:
        op: name of the op.
        device: ``"CPU"`` or ``"CUDA"``.

    Returns:
        Backends, each with the condition that a call must meet. The last one, and only it, has none.

    Raises:
        RuntimeError: if QATKERNELS_BACKEND names a backend that is unknown or missing, or a rule one of another device.
    """
    forced = _forced(device)
    first = RULES.get((op, device), ()) if forced is None else (Rule(forced),)
    stages: list[tuple[str, Condition | None]] = []
    for rule in (*first, *map(Rule, PREFERENCE[device])):
        if rule.backend not in PREFERENCE[device]:
            raise RuntimeError(
                f"a rule for {op} on {device} names {rule.backend!r}, must be one of {PREFERENCE[device]}"
            )
        if rule.backend in IMPLS[op]:
            condition = _both(rule.when, CONDITIONS.get(op, {}).get(rule.backend))
            stages.append((rule.backend, condition))
            if condition is None:
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


def _both(a: Condition | None, b: Condition | None) -> Condition | None:
    if a is None or b is None:
        return a or b
    return lambda *inputs: a(*inputs) and b(*inputs)


def chosen(op: str, device: str) -> str:
    """Return the backend that calls of an op try first on a device type (``"CPU"`` or ``"CUDA"``).

    Raises:
        RuntimeError: if QATKERNELS_BACKEND names a backend that cannot serve it.
    """
    return order(op, device)[0][0]


def by_call(op: Op, stages: list[tuple[Callable[..., Any], Condition | None]]) -> Callable[..., Any]:
    """Return an implementation of an op, or of its ``_out`` form, that passes each call to the first that takes it.

    Args:
        op: the op.
        stages: implementations and their conditions, which see the arguments without the outputs; the last has none.
    """
    count = len(op.parameters)

    def run(*args: Any) -> Any:
        inputs = args[:count]
        return next(impl for impl, condition in stages if condition is None or condition(*inputs))(*args)

    return run


def register() -> None:
    """Register the orders with torch's dispatcher: a kernel itself where it takes every call, a choice where not."""
    for name, op in OPS.items():
        for device in PREFERENCE:
            stages = order(name, device)
            backend, condition = stages[0]
            for op_name in op.schemas:
                if condition is not None:
                    impls = {b: IMPLS[op_name][b] for b, _ in stages}
                    if op_name == name and "reference" in impls:
                        impls["reference"] = checked(op, op.reference)
                    LIBRARY.impl(op_name, by_call(op, [(impls[b], c) for b, c in stages]), device)
                elif backend in COMPILED:
                    importlib.import_module("qatkernels._C").implement("qatkernels", op_name, device)
                elif backend != "reference":
                    LIBRARY.impl(op_name, IMPLS[op_name][backend], device)


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
