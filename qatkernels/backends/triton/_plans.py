"""Launch plans: record the kernel launches of a call, and replay them for later calls of the same kind.

A call of a launcher checks its arguments, chooses tiles and constants, and enters Triton. Triton binds the arguments of
each kernel, specializes on them and looks up the compiled kernel. For calls of the same kind all of this has the same
result. So the second call of a kind is recorded: the tensors that it allocates, and the compiled kernels that it
launches, with their arguments. Later calls only allocate and launch. The first call is not recorded, because recording
takes three times as long as the call, and a call with many tokens may never come again.

Two calls are of the same kind if their keys are equal (:meth:`Planned.key`). The key has everything that a launcher may
depend on (all of a tensor but its contents) and everything that Triton specializes on: dtypes, whether an address is a
multiple of 16, every number, and the current device. If a call does more than allocate, view and launch (it computes
with torch, or reads contents), it is never replayed; the recording sees every operation of torch and detects that.

Plans bypass :meth:`JITFunction.run` and call Triton's internal functions. They are used only with versions of Triton
for which these are known (:data:`KNOWN`), and never in the interpreter. What Triton does besides at each launch happens
only at the first calls (checks of global variables), or turns plans off (hooks of profilers).
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
import threading
from array import array
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from ..._torch_compat import TorchDispatchMode
from ...ops._op import Op
from ._element import INTERPRETED

#: Versions of Triton that launch compiled kernels as :func:`_launch` does.
KNOWN = ("3.6.0",)
#: Whether calls are recorded and replayed.
enabled = triton.__version__ in KNOWN and not INTERPRETED
#: Maximum number of plans of an op; then the oldest is dropped. A plan is a few KiB.
MOST = 4096
#: Triton treats addresses that are multiples of this as aligned.
ALIGNMENT = 16

_aten = torch.ops.aten
#: Operations whose result has the address of their argument.
_VIEWS = {_aten.view.default, _aten._unsafe_view.default, _aten.alias.default, _aten.detach.default}
_ALLOCATIONS = {
    _aten.empty.memory_format, _aten.new_empty.default, _aten.empty_like.default, _aten.empty_strided.default,
}  # fmt: skip
_thread = threading.local()
#: States of a key without a plan: not seen, seen once, cannot be replayed.
_UNKNOWN, _ONCE, _NONE = object(), object(), object()


class Allocation(NamedTuple):
    """A contiguous tensor to allocate, by ``new_empty_strided`` of an empty one: the fastest way in Python."""

    prototype: Tensor
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class Launch(NamedTuple):
    """A kernel to launch. ``pointers`` are pairs: the index of an argument, and the number of its tensor."""

    kernel: Any
    grid: tuple[int, int, int]
    arguments: tuple[Any, ...]
    pointers: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Plan:
    """The launches of a call. Tensors are numbered: first those of the arguments, then the allocated ones.

    Attributes:
        allocations: tensors to allocate.
        launches: kernels to launch, in order.
        results: which of the allocations the call returns.
        single: whether it returns a tensor, not a tuple.
    """

    allocations: tuple[Allocation, ...]
    launches: tuple[Launch, ...]
    results: tuple[int, ...]
    single: bool


class Recording(TorchDispatchMode):
    """Records what a call does while this mode is active. ``faithful`` is false if a plan cannot repeat it."""

    def __init__(self, arguments: tuple[Any, ...]) -> None:
        super().__init__()
        self.held = [a for a in arguments if isinstance(a, Tensor)]  # kept alive, so that no id is reused
        self.number = {id(t): i for i, t in enumerate(self.held)}
        self.faithful = len(self.number) == len(self.held)
        self.allocations: list[Allocation] = []
        self.launches: list[Launch] = []
        self.inputs = len(self.held)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, and record its result."""
        out = func(*args, **(kwargs or {}))
        if not isinstance(out, Tensor):
            self.faithful = False
        elif out.device.type == "meta":
            pass  # only the meta rule uses it
        elif func in _ALLOCATIONS and out.is_contiguous() and out.data_ptr() % ALIGNMENT == 0:
            self._name(out, self.inputs + len(self.allocations))
            empty = torch.empty(0, dtype=out.dtype, device=out.device)
            self.allocations.append(Allocation(empty, tuple(out.shape), out.stride()))
        elif func in _VIEWS and id(args[0]) in self.number and out.data_ptr() == args[0].data_ptr():
            self._name(out, self.number[id(args[0])])
        else:
            self.faithful = False
        return out

    def _name(self, tensor: Tensor, number: int) -> None:
        self.held.append(tensor)
        self.number[id(tensor)] = number

    def launched(self, function: JITFunction[Any], kernel: Any, grid: Any, args: Any, kwargs: Any) -> None:
        """Record the launch of a kernel."""
        named = {name: value for name, value in kwargs.items() if name in function.signature.parameters}
        bound = function.signature.bind(*args, **named)
        bound.apply_defaults()
        arguments = list(bound.arguments.values())
        pointers = []
        for i, value in enumerate(arguments):
            if isinstance(value, Tensor):
                if id(value) not in self.number:
                    self.faithful = False
                    return
                pointers.append((i, self.number[id(value)]))
                arguments[i] = 0
        if callable(grid) or kernel is None or hasattr(kernel, "result"):
            self.faithful = False  # the grid depends on arguments, or the kernel is still being compiled
            return
        x, y, z = (*grid, 1, 1)[:3]
        self.launches.append(Launch(kernel, (x, y, z), tuple(arguments), tuple(pointers)))

    def plan(self, returned: Any) -> Plan | object:
        """Return the plan of a call that returned this, or the mark of a call that cannot be replayed."""
        results = (returned,) if isinstance(returned, Tensor) else tuple(returned or ())
        if not self.faithful or any(self.number.get(id(t), 0) < self.inputs for t in results):
            return _NONE
        numbers = tuple(self.number[id(t)] - self.inputs for t in results)
        return Plan(tuple(self.allocations), tuple(self.launches), numbers, isinstance(returned, Tensor))


class Planned:
    """A Triton implementation of an op that records calls, and replays later calls of the same kind.

    Args:
        op: the op.
        impl: the op, or its ``_out`` form, whose last arguments are the outputs.
    """

    def __init__(self, op: Op, impl: Callable[..., Any]) -> None:
        self.impl = impl
        self.plans: dict[Any, Any] = {}  # by key: a plan, or one of the marks above
        kinds = [*op.parameters.values(), *("Tensor" for _ in op.outputs)]
        self.tensors = [i for i, kind in enumerate(kinds) if kind.startswith("Tensor")]
        self.lists = [i for i, kind in enumerate(kinds) if kind == "float[]"]
        self.floats = [i for i, kind in enumerate(kinds) if kind in ("float", "float?")]
        known = {*self.tensors, *self.lists, *self.floats}
        self.others = [i for i in range(len(kinds)) if i not in known]

    def __call__(self, *args: Any) -> Any:
        """Replay the plan of this kind of call, or call the implementation."""
        if not enabled or knobs.runtime.launch_enter_hook.calls or knobs.runtime.launch_exit_hook.calls:
            return self.impl(*args)
        active = driver.active
        device = active.get_current_device()
        key, addresses = self.key(device, args)
        plan = self.plans.get(key, _UNKNOWN)
        if not isinstance(plan, Plan):
            if plan is _ONCE:
                return self._record(key, args)
            if plan is _UNKNOWN:
                self._keep(key, _ONCE)
            return self.impl(*args)
        made = [prototype.new_empty_strided(shape, strides) for prototype, shape, strides in plan.allocations]
        for t in made:
            addresses.append(t.data_ptr())
        stream = active.get_current_stream(device)
        for launch in plan.launches:
            _launch(launch, addresses, stream)
        if plan.single:
            return made[plan.results[0]]
        return tuple(made[i] for i in plan.results) or None

    def key(self, device: int, args: tuple[Any, ...]) -> tuple[tuple[Any, ...], list[int]]:
        """Return the key of a call on a current device, and the addresses of its tensors."""
        key: list[Any] = [device, len(args)]
        addresses = []
        for i in self.tensors:
            if i >= len(args):
                break
            t = args[i]
            if t is None:
                key.append(None)
                continue
            address = t.data_ptr()
            addresses.append(address)
            key += (t.shape, t.dtype, t.get_device(), address % ALIGNMENT, t.is_contiguous() or t.stride())
        numbers = array("d")  # compared bit by bit: 0.0 and -0.0 are different constants
        for i in self.lists:
            numbers.extend(args[i])
        for i in self.floats:
            if args[i] is None:
                key.append(i)  # the index of the argument that is None
            else:
                numbers.append(args[i])
        key.append(numbers.tobytes())
        for i in self.others:
            key.append(args[i])
        return tuple(key), addresses

    def _record(self, key: Any, args: tuple[Any, ...]) -> Any:
        # New tensor objects, so that a tensor that is passed twice has two numbers.
        given = tuple(a.detach() if isinstance(a, Tensor) else a for a in args)
        recording = Recording(given)
        former, _thread.recording = getattr(_thread, "recording", None), recording
        try:
            with recording:
                returned = self.impl(*given)
        finally:
            _thread.recording = former
        if former is not None:
            former.faithful = False
        self.plans[key] = recording.plan(returned)
        return returned

    def _keep(self, key: Any, what: Any) -> None:
        if len(self.plans) >= MOST:
            self.plans.pop(next(iter(self.plans)), None)
        self.plans[key] = what


def planned(op: Op, impl: Callable[..., Any]) -> Callable[..., Any]:
    """Return an implementation with launch plans, or unchanged if plans are not enabled."""
    return Planned(op, impl) if enabled else impl


def _launch(launch: Launch, addresses: list[int], stream: int) -> None:
    """Launch as Triton's JIT does, with addresses instead of tensors. No hooks are set here, so none are passed."""
    kernel, grid, arguments, pointers = launch
    given = list(arguments)
    for place, number in pointers:
        given[place] = addresses[number]
    kernel.run(*grid, stream, kernel.function, kernel.packed_metadata, None, None, None, *given)


def observe() -> None:
    """Let the kernels of this package report launches to the recording. Call it once all files are imported."""
    package = importlib.import_module(__package__)
    for found in pkgutil.iter_modules(package.__path__):
        for value in vars(importlib.import_module(f"{__package__}.{found.name}")).values():
            if isinstance(value, JITFunction) and "run" not in vars(value):
                value.run = functools.partial(_run, value)


def _run(function: JITFunction[Any], *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
    kernel = JITFunction.run(function, *args, grid=grid, warmup=warmup, **kwargs)
    recording = getattr(_thread, "recording", None)
    if recording is not None and not warmup:
        recording.launched(function, kernel, grid, args, kwargs)
    return kernel
