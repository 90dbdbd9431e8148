"""What a suite is made of: cases, and the calls that compete in each."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from qatkernels.dtypes import dtype_name

#: Expected outputs in float64; None for an output that is not compared.
Expected = tuple[Tensor | None, ...]


@dataclass(frozen=True)
class Settings:
    """What the command line asks of a suite.

    Attributes:
        device: device of the tensors.
        dtypes: dtypes of the cases.
        peers: whether other libraries are timed too.
        quick: tiny shapes, for tests.
        gpu_shapes: whether to use the shapes meant for a GPU, on any device; None to decide by the device.
    """

    device: torch.device
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16)
    peers: bool = False
    quick: bool = False
    gpu_shapes: bool | None = None

    @property
    def for_gpu(self) -> bool:
        """Whether to use the shapes meant for a GPU."""
        return self.device.type == "cuda" if self.gpu_shapes is None else self.gpu_shapes


@dataclass(frozen=True)
class Call:
    """One implementation in a case.

    Attributes:
        name: implementation, as the table shows it.
        run: does the work once and returns the outputs in the order of the case's ``expected``.
        kind: ``"ours"``, ``"peer"``, or ``"baseline"`` for the copies that give the floor.
        output: ``"fresh"`` if the call allocates its outputs, ``"out"`` if it writes into given ones.
        expected: expected outputs of an implementation with another gradient rule; those of the case if None.
        unchecked: why its result is not compared; empty if it is.
        note: a remark that the report prints with the number.
        graph: whether it can be captured in a CUDA graph.
    """

    name: str
    run: Callable[[], Any]
    kind: Literal["ours", "peer", "baseline"] = "ours"
    output: Literal["fresh", "out"] = "fresh"
    expected: Callable[[], Expected] | None = None
    unchecked: str = ""
    note: str = ""
    graph: bool = True


class Missing(NamedTuple):
    """An implementation that is not available here."""

    name: str
    reason: str


@dataclass(frozen=True)
class Case:
    """One problem, and the calls that solve it.

    Attributes:
        op: what is timed.
        shape: shape of the weight.
        dtype: dtype of the weight.
        calls: the calls that are compared.
        expected: returns the expected outputs; called once, when the first implementation is checked.
        tolerances: largest error of each output, see :func:`bench.exact.errors`.
        bytes: what the op must move: every input read once, every output written once.
        flops: what the op must compute, in matrix products.
        product_dtype: dtype of those products; ``dtype`` if None.
        grid: name of the grid.
        granularity: which weights share a scale.
        variant: any other setting that distinguishes this case.
        memory: whether peak memory is measured.
    """

    op: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    calls: Sequence[Call | Missing]
    expected: Callable[[], Expected]
    tolerances: tuple[float, ...]
    bytes: int
    flops: int = 0
    product_dtype: torch.dtype | None = None
    grid: str = ""
    granularity: str = ""
    variant: str = ""
    memory: bool = False

    @functools.cached_property
    def right(self) -> Expected:
        """The expected outputs."""
        return self.expected()

    @property
    def title(self) -> str:
        """One line that identifies the case."""
        shape = "x".join(map(str, self.shape))
        parts = (self.op, self.grid, shape, dtype_name(self.dtype), self.granularity, self.variant)
        return " ".join(part for part in parts if part)


#: A suite takes the settings and yields builders of cases. Cases are built one at a time, so that only one case's
#: tensors are in memory, and a case that cannot be built does not stop the others.
Suite = Callable[[Settings], Iterator[Callable[[], Case]]]


def built(case: Case) -> Callable[[], Case]:
    """Return a builder for a case that exists already, because it shares its tensors with others."""
    return lambda: case


def attempt(name: str, build: Callable[[], Call]) -> Call | Missing:
    """Build a call whose library may not be installed."""
    try:
        return build()
    except (ImportError, AttributeError, TypeError, RuntimeError, ValueError) as error:
        return Missing(name, reason(error))


def reason(error: BaseException) -> str:
    """Return an exception as one short line."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:160]


def bytes_of(*tensors: Tensor | None) -> int:
    """Return the bytes that tensors occupy."""
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)
