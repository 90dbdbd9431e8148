"""Which implementation serves which call: backends in an order for each device; a call goes to the first that takes it.

A backend is declared in a file of its own (:class:`Backend`) and enters its implementations itself, each where it is
defined. One whose kernel takes only some calls enters a condition with it, and passes the others on. The reference
takes every call and ends every order.

``QATKERNELS_BACKEND=<name>`` puts a backend first for every op that has a kernel there; what its kernels do not take
goes on in the usual order. A backend that is missing altogether is an error, never a silent substitute.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from ..ops._op import OPS, Kernel, Op

#: Devices, as torch's dispatcher names them.
DEVICES = ("CPU", "CUDA")


@dataclass(frozen=True)
class Backend:
    """Implementations that come together.

    Attributes:
        name: what QATKERNELS_BACKEND and `doctor` call it.
        devices: where its kernels run: ``"CPU"``, ``"CUDA"``.
        load: enters its implementations into a registry; raises ImportError with the reason if it is not here.
        priority: of two backends of a device, calls try the one with more first.
        compiled: whether the extension holds its kernels.
        wrap: makes of an op and what would run it what runs it.
        unreachable: says why no call can reach its kernels in this process, None if one can. Such a backend is loaded
            only on demand (:meth:`Registry.load_backend`), because that takes time.
    """

    name: str
    devices: tuple[str, ...]
    load: Callable[[Registry], None]
    priority: int = 0
    compiled: bool = False
    wrap: Callable[[Op, Callable[..., Any]], Callable[..., Any]] = lambda op, run: run
    unreachable: Callable[[], str | None] = lambda: None


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
        conditions: what says of an op's arguments whether a kernel that takes only some calls takes one,
            ``conditions[op][backend]``.
        loaded: names of the backends whose implementations are entered.
        missing: why a backend is absent, for `qatkernels doctor`.
        rules: exceptions from the usual order by op and device, first match first.
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
        """Enter the references and what every backend has; a backend that is not here says why in ``missing``."""
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
        """Enter what a backend has, even if no call can reach it, as for compiling its kernels ahead of time.

        Raises:
            ImportError: if it is not here.
        """
        if name not in self.loaded:
            self.backends[name].load(self)
            self.loaded.add(name)
            self.missing.pop(name, None)

    def enter(self, backend: str, name: str, run: Callable[..., Any]) -> None:
        """Enter what runs an op, or its ``_out`` form, on a backend; it sees to its arguments itself."""
        self.implementations.setdefault(name, {})[backend] = run

    def enter_kernel(
        self, backend: str, op: str, run: Callable[..., None], serves: Callable[..., bool] | None = None
    ) -> None:
        """Enter a kernel that is written in Python; it is called as the contract of the op says.

        Args:
            backend: the backend.
            op: name of the op.
            run: takes the arguments of the op, then its outputs, which it writes.
            serves: says of the arguments of the op whether the kernel takes a call; it takes all if None.
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
        """Return the backends that calls of an op may reach, in the order in which a call tries them.

        Args:
            op: name of the op.
            device: ``"CPU"`` or ``"CUDA"``.

        Returns:
            Stages. The last one, and only it, takes all calls.

        Raises:
            RuntimeError: if QATKERNELS_BACKEND names a backend that is unknown or missing, or a rule one of another
                device.
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
        """Return the backend that QATKERNELS_BACKEND puts first on a device, None if it says nothing about it."""
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
        """Return by op and device what a call tries, in order, as text; and by op what is ``present``."""
        return {
            op: {device: [str(stage) for stage in self.order(op, device)] for device in DEVICES}
            | {"present": sorted(self.implementations[op])}
            for op in self.ops
        }


def _asked(op: Op, serves: Callable[..., bool], *args: Any) -> bool:
    """Whether a kernel takes a call; it is asked only for calls that the contract of the op allows."""
    op.contract.check(args)
    return serves(*args)


def read_rules(path: Path) -> dict[tuple[str, str], tuple[Rule, ...]]:
    """Read exceptions from the usual order, each of which says what it rests on."""
    found: dict[tuple[str, str], tuple[Rule, ...]] = {}
    for entry in json.loads(path.read_text()):
        key = entry["op"], entry["device"]
        found[key] = (*found.get(key, ()), Rule(entry["backend"], entry.get("rows")))
    return found


#: What serves ``torch.ops.qatkernels``.
REGISTRY = Registry(ops=OPS, rules=read_rules(Path(__file__).with_name("choices.json")))


def implements(
    op: str, backend: str, *, serves: Callable[..., bool] | None = None, registry: Registry = REGISTRY
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Return a decorator that enters a function as the kernel of an op on a backend.

    Args:
        op: name of the op.
        backend: name of the backend, which is declared.
        serves: says of the arguments of the op whether the kernel takes a call; it takes all if None.
        registry: where it is entered.
    """

    def enter(run: Callable[..., None]) -> Callable[..., None]:
        registry.enter_kernel(backend, op, run, serves)
        return run

    return enter


def declare(backends: Iterable[Backend]) -> None:
    """Declare backends in the registry that serves ``torch.ops.qatkernels``."""
    for backend in backends:
        REGISTRY.add(backend)
