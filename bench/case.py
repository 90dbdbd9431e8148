"""What a suite is made of: cases, and the calls that compete in each."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

#: Results of a call in float64; None where there is nothing to compare.
Expected = tuple[Tensor | None, ...]


@dataclass(frozen=True)
class Settings:
    """What the command line asks of a suite.

    Attributes:
        device: where the cases live.
        dtypes: dtypes of the cases.
        peers: whether other libraries compete.
        quick: tiny shapes, for tests.
        gpu_shapes: whether the cases are those of a GPU, wherever they live; None for what the device is.
    """

    device: torch.device
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16)
    peers: bool = False
    quick: bool = False
    gpu_shapes: bool | None = None

    @property
    def for_gpu(self) -> bool:
        """Whether the cases are those of a GPU."""
        return self.device.type == "cuda" if self.gpu_shapes is None else self.gpu_shapes


@dataclass(frozen=True)
class Call:
    """One implementation in a case.

    Attributes:
        name: implementation, as the table shows it.
        run: does the work once and returns the outputs in the order of the case's ``expected``.
        kind: ``"ours"``, ``"peer"``, or ``"baseline"`` for what the others are measured against.
        output: whether the outputs are allocated by the call or supplied to it.
        expected: right answer of an implementation that follows a rule of its own; the case's if None.
        unchecked: why its result cannot be compared with anything; empty if it is compared.
        note: what the reader must know to read the number.
        graph: whether a CUDA graph can hold it.
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
    """An implementation that should be here and is not."""

    name: str
    reason: str


@dataclass(frozen=True)
class Case:
    """One problem, and everything that solves it.

    Attributes:
        op: what is timed.
        shape: shape of the weight.
        dtype: dtype of the weight.
        calls: the competitors.
        expected: gives the right answer; called once, when the first implementation is checked.
        tolerances: largest error of each output, see :func:`bench.exact.errors`.
        bytes: what the op must move: every input read once, every output written once.
        flops: what the op must compute, in matrix products.
        product_dtype: dtype of those products; ``dtype`` if None.
        grid: name of the grid.
        granularity: what shares a scale.
        variant: what else tells this case from its neighbours.
        memory: whether the memory that a call needs is measured.
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
        """The right answer."""
        return self.expected()

    @property
    def title(self) -> str:
        """One line that tells it from every other case."""
        shape = "x".join(map(str, self.shape))
        parts = (self.op, self.grid, shape, str(self.dtype)[6:], self.granularity, self.variant)
        return " ".join(part for part in parts if part)


#: A suite is a function from settings to what builds its cases. They are built one at a time, so that one case's
#: tensors live at once and a case that cannot be built leaves the others alone.
Suite = Callable[[Settings], Iterator[Callable[[], Case]]]


def built(case: Case) -> Callable[[], Case]:
    """Return what gives a case that is there already, because it shares its tensors with others."""
    return lambda: case


def attempt(name: str, build: Callable[[], Call]) -> Call | Missing:
    """Build a call that may need something that is not installed."""
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
