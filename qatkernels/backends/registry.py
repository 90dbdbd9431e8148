"""Which implementation serves a call. Each device has an order of backends; the first that takes a call serves it.

Each backend is declared in its own file (:class:`Backend`) and registers its implementations where they are defined. A
kernel that takes only some calls is registered with a condition; other calls go to the next backend. The reference
takes every call and is the last in every order.

``QATKERNELS_BACKEND=<name>`` puts a backend first for every op that it has a kernel for. Calls that its kernels do not
take go to the others in the usual order. If that backend is not available, an error is raised; it is never replaced
silently.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..ops._op import OPS, Kernel, Op
from ..ops.packed_weight import PackedWeight

#: Devices, as torch's dispatcher names them.
DEVICES = ("CPU", "CUDA")


@dataclass(frozen=True)
class Backend:
    """A set of implementations.

    Attributes:
        name: its name in QATKERNELS_BACKEND and `doctor`.
        devices: devices of its kernels: ``"CPU"``, ``"CUDA"``.
        load: registers its implementations; raises ImportError with the reason if the backend is not available.
        priority: calls try the backend with the highest priority first.
        compiled: whether its kernels are in the compiled extension.
        wrap: takes an op and its implementation, and returns the implementation to use.
        unreachable: returns why no call can reach its kernels in this process, None if one can. Such a backend is
            loaded only on demand (:meth:`Registry.load_backend`), because loading takes time.
        warm_up: compiles what it will launch for products with a packed weight, so that no call waits for a compiler.
            It takes the weight, the dtype of activations, the bias or None, and act_bits or None. None if there is
            nothing to compile.
    """

    name: str
    devices: tuple[str, ...]
    load: Callable[[Registry], None]
    priority: int = 0
    compiled: bool = False
    wrap: Callable[[Op, Callable[..., Any]], Callable[..., Any]] = lambda op, run: run
    unreachable: Callable[[], str | None] = lambda: None
    warm_up: Callable[[PackedWeight, torch.dtype, Tensor | None, int | None], None] | None = None


@dataclass(frozen=True)
class Rule:
    """Calls of an op that try another backend first.

    Attributes:
        backend: the backend.
        rows: the rule holds for calls whose first argument has at most so many rows (tokens); for all if None.
    """

    backend: str
    rows: int | None = None


@dataclass(frozen=True)
class Stage:
    """A backend in the order of an op.

    Attributes:
        backend: the backend.
        rows: only calls whose first argument has at most so many rows reach it; all calls if None.
        asked: whether its kernel has a condition, which is evaluated for each call.
    """

    backend: str
    rows: int | None = None
    asked: bool = False

    @property
    def takes_all(self) -> bool:
        """Whether it takes every call that reaches it."""
        return self.rows is None and not self.asked

    def __str__(self) -> str:
        limits = [f"<= {self.rows} rows"] * (self.rows is not None) + ["some calls"] * self.asked
        return f"{self.backend} ({', '.join(limits)})" if limits else self.backend


@dataclass
class Registry:
    """Backends, their implementations, and the order in which calls try them.

    Attributes:
        ops: the ops by name.
        backends: the backends by name.
        implementations: every implementation present, ``implementations[op][backend]``; ``op`` is a name in
            ``torch.ops.qatkernels``, with ``_out`` for the form that writes into given outputs.
        conditions: for a kernel that takes only some calls, a function of the op's arguments that returns whether it
            takes a call, ``conditions[op][backend]``.
        loaded: names of the backends that are loaded.
        missing: why a backend is not available, for `qatkernels doctor`.
        rules: exceptions from the usual order by op and device; the first that matches counts.
    """

    ops: dict[str, Op] = field(default_factory=dict)
    backends: dict[str, Backend] = field(default_factory=dict)
    implementations: dict[str, dict[str, Callable[..., Any]]] = field(default_factory=dict)
    conditions: dict[str, dict[str, Callable[..., bool]]] = field(default_factory=dict)
    loaded: set[str] = field(default_factory=set)
    missing: dict[str, str] = field(default_factory=dict)
    rules: dict[tuple[str, str], tuple[Rule, ...]] = field(default_factory=dict)

    def add(self, backend: Backend) -> None:
        """Declare a backend.

        Raises:
            ValueError: if there is one of this name, or a device is unknown.
        """
        if backend.name in self.backends:
            raise ValueError(f"backend {backend.name!r} is declared twice")
        if not set(backend.devices) <= set(DEVICES):
            raise ValueError(f"devices of backend {backend.name!r} are {backend.devices}, must be of {DEVICES}")
        self.backends[backend.name] = backend

    def load(self) -> None:
        """Register the references and the implementations of every backend that is available."""
        for op in self.ops.values():
            self.enter("reference", op.name, op.reference)
            if op.outputs:
                self.enter("reference", f"{op.name}_out", op.run_reference_out)
        for name, backend in self.backends.items():
            if reason := backend.unreachable():
                self.missing[name] = reason
                continue
            try:
                self.load_backend(name)
            except ImportError as error:
                self.missing[name] = str(error)

    def load_backend(self, name: str) -> None:
        """Register the implementations of a backend even if no call can reach them; to compile them, say.

        Raises:
            ImportError: if the backend is not available.
        """
        if name not in self.loaded:
            self.backends[name].load(self)
            self.loaded.add(name)
            self.missing.pop(name, None)

    def enter(self, backend: str, name: str, run: Callable[..., Any]) -> None:
        """Register an implementation of an op, or of its ``_out`` form, that checks its arguments itself."""
        self.implementations.setdefault(name, {})[backend] = run

    def enter_kernel(
        self, backend: str, op: str, run: Callable[..., None], serves: Callable[..., bool] | None = None
    ) -> None:
        """Register a kernel that is written in Python. Its arguments are checked by the op's contract before.

        Args:
            backend: the backend.
            op: name of the op.
            run: takes the arguments of the op, then the outputs, and writes the outputs.
            serves: takes the arguments of the op, and returns whether the kernel takes the call; all calls if None.
        """
        declared, wrap = self.ops[op], self.backends[backend].wrap
        kernel = Kernel(declared, run)
        if declared.outputs:
            self.enter(backend, f"{op}_out", wrap(declared, kernel.writing))
        self.enter(backend, op, wrap(declared, kernel.allocating))
        if serves is not None:
            self.conditions.setdefault(op, {})[backend] = partial(_asked, declared, serves)

    def preference(self, device: str) -> tuple[str, ...]:
        """Return the backends of a device, in the order in which calls try them."""
        here = [backend for backend in self.backends.values() if device in backend.devices]
        here.sort(key=lambda backend: -backend.priority)
        return (*(backend.name for backend in here), "reference")

    def order(self, op: str, device: str) -> list[Stage]:
        """Return the backends of an op, in the order in which a call tries them.

        Args:
            op: name of the op.
            device: ``"CPU"`` or ``"CUDA"``.

        Returns:
            Stages. The last one, and only it, takes all calls.

        Raises:
            RuntimeError: if QATKERNELS_BACKEND names a backend that is unknown or not available, or a rule names a
                backend of another device.
        """
        forced, preference = self._forced(device), self.preference(device)
        first = self.rules.get((op, device), ()) if forced is None else (Rule(forced),)
        stages: list[Stage] = []
        for rule in (*first, *map(Rule, preference)):
            if rule.backend not in preference:
                raise RuntimeError(f"a rule for {op} on {device} names {rule.backend!r}, must be one of {preference}")
            if rule.backend not in self.implementations[op] or rule.backend in self.missing:
                continue
            stages.append(Stage(rule.backend, rule.rows, rule.backend in self.conditions.get(op, {})))
            if stages[-1].takes_all:
                break
        return stages

    def _forced(self, device: str) -> str | None:
        """Return the backend that QATKERNELS_BACKEND puts first on a device, or None."""
        forced = os.environ.get("QATKERNELS_BACKEND")
        if not forced:
            return None
        known = sorted({*self.backends, "reference"})
        if forced not in known:
            raise RuntimeError(f"QATKERNELS_BACKEND is {forced!r}, must be one of {known}")
        if forced not in self.preference(device):
            return None
        if forced in self.missing:
            raise RuntimeError(f"QATKERNELS_BACKEND is {forced!r}, which is not available: {self.missing[forced]}")
        return forced

    def chosen(self, op: str, device: str) -> str:
        """Return the backend that calls of an op try first on a device (``"CPU"`` or ``"CUDA"``).

        Raises:
            RuntimeError: if QATKERNELS_BACKEND names a backend that cannot serve it.
        """
        return self.order(op, device)[0].backend

    def report(self) -> dict[str, dict[str, list[str]]]:
        """Return the order of backends as text, by op and device; and by op the backends that are ``present``."""
        return {
            op: {device: [str(stage) for stage in self.order(op, device)] for device in DEVICES}
            | {"present": sorted(self.implementations[op])}
            for op in self.ops
        }


def _asked(op: Op, serves: Callable[..., bool], *args: Any) -> bool:
    """Return whether a kernel takes a call. The op's contract is checked first."""
    op.contract.check(args)
    return serves(*args)


def read_rules(path: Path) -> dict[tuple[str, str], tuple[Rule, ...]]:
    """Read the exceptions from the usual order. Each entry of the file names the results that support it."""
    found: dict[tuple[str, str], tuple[Rule, ...]] = {}
    for entry in json.loads(path.read_text()):
        key = entry["op"], entry["device"]
        found[key] = (*found.get(key, ()), Rule(entry["backend"], entry.get("rows")))
    return found


#: The registry of ``torch.ops.qatkernels``.
REGISTRY = Registry(ops=OPS, rules=read_rules(Path(__file__).with_name("choices.json")))


def implements(
    op: str, backend: str, *, serves: Callable[..., bool] | None = None, registry: Registry = REGISTRY
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Return a decorator that registers a function as the kernel of an op on a backend.

    Args:
        op: name of the op.
        backend: name of a declared backend.
        serves: takes the arguments of the op, and returns whether the kernel takes the call; all calls if None.
        registry: the registry to use.
    """

    def enter(run: Callable[..., None]) -> Callable[..., None]:
        registry.enter_kernel(backend, op, run, serves)
        return run

    return enter


def declare(backends: Iterable[Backend]) -> None:
    """Declare backends in the registry of ``torch.ops.qatkernels``."""
    for backend in backends:
        REGISTRY.add(backend)
