"""Launch plans: a call like an earlier one launches the same kernels again, without asking how.

A call of a launcher checks its arguments, decides tiles and constants, and enters Triton, which binds the arguments of
each kernel, specializes on them and looks for the compiled kernel. For calls that are alike all of that has the same
outcome. The second of them is recorded: the tensors that it allocates, and the compiled kernels that it launches with
their arguments. Later ones allocate and launch, nothing else. The first is left alone, because recording costs three
times what it does, and a call of many tokens may never come again.

Two calls are alike if their keys are equal (:meth:`Planned.key`). The key has all that a launcher may look at, which is
everything about a tensor but its numbers, and all that Triton specializes on: dtypes, whether an address is a multiple
of 16, every number, and the current device. A call that does anything else than allocate, view and launch (it computes
with torch, or looks at numbers) is not replayed; the recording sees every operation of torch and decides that.

Plans take the place of :meth:`JITFunction.run` and call what it would call, so they are used only with the versions of
Triton for which this is known (:data:`KNOWN`), and never in its interpreter. What Triton does at each launch besides
(hooks of profilers, checks of global variables) happens where a hook is set, and at the first call.
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

#: Versions of Triton whose compiled kernels are launched as :func:`_launch` does.
KNOWN = ("3.6.0",)
#: Whether calls are recorded and replayed.
enabled = triton.__version__ in KNOWN and not INTERPRETED
#: Plans that an op keeps; the oldest makes room. One is a few KiB.
MOST = 4096
#: Addresses that Triton takes for aligned are multiples of this.
ALIGNMENT = 16

_aten = torch.ops.aten
#: Operations whose result is where their argument is.
_VIEWS = {_aten.view.default, _aten._unsafe_view.default, _aten.alias.default, _aten.detach.default}
_ALLOCATIONS = {
    _aten.empty.memory_format, _aten.new_empty.default, _aten.empty_like.default, _aten.empty_strided.default,
}  # fmt: skip
_thread = threading.local()
#: What is known of a key without a plan: nothing, that it came once, that there is none.
_UNKNOWN, _ONCE, _NONE = object(), object(), object()


class Allocation(NamedTuple):
    """A contiguous tensor to make: as new of another that is empty, which is the fastest way from Python."""

    prototype: Tensor
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class Launch(NamedTuple):
    """A kernel to launch. ``pointers`` are pairs: which of ``arguments`` is the address of which tensor."""

    kernel: Any
    grid: tuple[int, int, int]
    arguments: tuple[Any, ...]
    pointers: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Plan:
    """What a call does. Tensors are numbered: those of the arguments in their order, then what is allocated.

    Attributes:
        allocations: tensors to make.
        launches: kernels to launch, in order.
        results: which of the allocations the call returns.
        single: whether it returns a tensor, not a tuple.
    """

    allocations: tuple[Allocation, ...]
    launches: tuple[Launch, ...]
    results: tuple[int, ...]
    single: bool


class Recording(TorchDispatchMode):
    """What a call does while this is the current mode; ``faithful`` as long as a plan can say it."""

    def __init__(self, arguments: tuple[Any, ...]) -> None:
        super().__init__()
        self.held = [a for a in arguments if isinstance(a, Tensor)]  # kept, so that no id is given twice
        self.number = {id(t): i for i, t in enumerate(self.held)}
        self.faithful = len(self.number) == len(self.held)
        self.allocations: list[Allocation] = []
        self.launches: list[Launch] = []
        self.inputs = len(self.held)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, and note what comes of it."""
        out = func(*args, **(kwargs or {}))
        if not isinstance(out, Tensor):
            self.faithful = False
        elif out.device.type == "meta":
            pass  # a description of a tensor, for the shape rule
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
        """Note a launch of a kernel."""
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
            self.faithful = False  # a grid that depends on arguments, or a kernel that is still being compiled
            return
        x, y, z = (*grid, 1, 1)[:3]
        self.launches.append(Launch(kernel, (x, y, z), tuple(arguments), tuple(pointers)))

    def plan(self, returned: Any) -> Plan | object:
        """Return the plan of a call that returned this, or the mark of a call that has none."""
        results = (returned,) if isinstance(returned, Tensor) else tuple(returned or ())
        if not self.faithful or any(self.number.get(id(t), 0) < self.inputs for t in results):
            return _NONE
        numbers = tuple(self.number[id(t)] - self.inputs for t in results)
        return Plan(tuple(self.allocations), tuple(self.launches), numbers, isinstance(returned, Tensor))


class Planned:
    """An implementation of an op by launchers of Triton, which records calls and replays those like them.

    Args:
        op: the op.
        impl: the op, or its ``_out`` form: that has the outputs behind the other arguments.
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
        """Call the implementation, or do what it did for a call like this one."""
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
        numbers = array("d")  # to be compared bit by bit: 0.0 and -0.0 are two constants
        for i in self.lists:
            numbers.extend(args[i])
        for i in self.floats:
            if args[i] is None:
                key.append(i)  # which argument is None; the others are numbers
            else:
                numbers.append(args[i])
        key.append(numbers.tobytes())
        for i in self.others:
            key.append(args[i])
        return tuple(key), addresses

    def _record(self, key: Any, args: tuple[Any, ...]) -> Any:
        # Tensors of their own, so that one that is given twice has two numbers.
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
    """Return an implementation with plans, or as it is where there are none."""
    return Planned(op, impl) if enabled else impl


def _launch(launch: Launch, addresses: list[int], stream: int) -> None:
    """Launch as Triton's JIT does, with addresses in place of tensors and without hooks, of which there are none."""
    kernel, grid, arguments, pointers = launch
    given = list(arguments)
    for place, number in pointers:
        given[place] = addresses[number]
    kernel.run(*grid, stream, kernel.function, kernel.packed_metadata, None, None, None, *given)


def observe() -> None:
    """Have the kernels of this package tell the recording about their launches; once all of it is imported."""
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
