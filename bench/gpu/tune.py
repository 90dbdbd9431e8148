"""Times tile sizes of the Triton kernels, to choose the rows of their tables: ``python -m bench.gpu tune``.

A candidate replaces the choice that a launcher makes. Its result is compared with that of the launcher's own choice,
then it is timed with a cold L2 cache. Each candidate is a line of the journal the moment it is known.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

import qatkernels as qk
from qatkernels.backends import IMPLS
from qatkernels.dtypes import dtype_name
from qatkernels.testing.samples import draw, make

from ..case import reason
from ..clock import Events, captured
from ..codes import DOOMED
from ..journal import Journal, read
from ..machine import alive
from ..suites import lowbit

#: Repetitions, and how far a result may be from that of the launcher's own choice.
_REPETITIONS, _TOLERANCE = 11, 1e-2

Run = Callable[[], Any]


@dataclass(frozen=True)
class Product:
    """A product with a packed weight."""

    shape: tuple[int, int]
    bits: float
    group_size: int | None
    tokens: int
    act_bits: int | None = None

    def __str__(self) -> str:
        """What the journal calls it."""
        size = "" if self.group_size is None else f"g{self.group_size}"
        kind = "" if self.act_bits is None else f"A{self.act_bits}"
        return f"W{self.bits}{size}{kind} {self.shape[0]}x{self.shape[1]} {self.tokens} tokens"

    def call(self, device: torch.device) -> Run:
        """Return the call."""
        _, packed = lowbit._packed(lowbit.Problem(self.shape, self.bits, self.group_size, self.tokens), device)
        x = draw((self.tokens, self.shape[1]), torch.bfloat16, device, seed=3)
        grid = (list(packed.grid.constants), packed.grid.code_min, packed.bits)
        args = (x, packed.packed, packed.scale, packed.zero_point, None, None, *grid, self.act_bits)
        out = x.new_empty(self.tokens, self.shape[0])
        into = IMPLS["lowbit_linear_out"]["triton"]
        return lambda: (into(*args, out), out)[1]


@dataclass(frozen=True)
class Elementwise:
    """A call of the fake-quantize family on a weight of 8192 x 8192."""

    op: str
    dtype: torch.dtype
    noise: bool

    def __str__(self) -> str:
        """What the journal calls it."""
        return f"{self.op} {dtype_name(self.dtype)}{' noise' if self.noise else ''}"

    def call(self, device: torch.device) -> Run:
        """Return the call."""
        shape = (8192, 8192) if device.type == "cuda" else (256, 8192)
        sample = make(qk.grids.lsq(4), shape, self.dtype, "row", device, self.noise)
        args = sample.args(self.op)
        impl = IMPLS[self.op]["triton"]
        return lambda: impl(*args)


class Candidate(NamedTuple):
    """A problem, what is tried, and the context in which the launcher does it."""

    problem: Product | Elementwise
    name: str
    using: Callable[[], contextlib.AbstractContextManager[Any]]


@contextlib.contextmanager
def _patched(*changes: tuple[Any, str, Any]) -> Iterator[None]:
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in changes]
    for owner, name, value in changes:
        setattr(owner, name, value)
    try:
        yield
    finally:
        for owner, name, value in before:
            setattr(owner, name, value)


def _tile(*numbers: int) -> Callable[[], contextlib.AbstractContextManager[Any]]:
    """Return the context in which every product has these blocks, warps, stages and split."""
    from qatkernels.backends.triton import _library as library
    from qatkernels.backends.triton import _plans, _products, lowbit_linear

    config = _products.Config((9, 0), "rows", float("inf"), *numbers)
    return lambda: _patched(
        (_plans, "enabled", False), (_products, "PROGRAMS", 1 << 20), (lowbit_linear, "NARROW", 1 << 20),
        (lowbit_linear, "NARROW_HOPPER", 1 << 20),
        (lowbit_linear, "choose", lambda *args: config), (library, "CODES_TOKENS", 1 << 40),
        (library, "PARTS_TOKENS", 1 << 40), (library, "GROUPS_TOKENS", 1 << 40),
    )  # fmt: skip


def _library(megabytes: int) -> Callable[[], contextlib.AbstractContextManager[Any]]:
    from qatkernels.backends.triton import _library as library
    from qatkernels.backends.triton import _plans

    return lambda: _patched(
        (_plans, "enabled", False), (library, "CODES_TOKENS", 1), (library, "PARTS_TOKENS", 1),
        (library, "GROUPS_TOKENS", 1),
        (library, "SLICE_BYTES", megabytes << 20),
    )  # fmt: skip


def _elements(tile: int, warps: int) -> Callable[[], contextlib.AbstractContextManager[Any]]:
    from qatkernels.backends.triton import _plans, _rows

    options = {**_rows.OPTIONS, "num_warps": warps}
    return lambda: _patched((_plans, "enabled", False), (_rows, "TILE_ELEMENTS", tile), (_rows, "OPTIONS", options))


WIDE, SQUARE = (8192, 28672), (4096, 4096)
#: (block_m, block_n, block_k, warps, stages, split)
_FEW = (
    (16, 32, 128, 4, 4, 1), (16, 32, 256, 4, 4, 1), (16, 32, 256, 4, 3, 2), (16, 32, 512, 4, 3, 1),
    (16, 64, 128, 4, 4, 2), (16, 64, 256, 4, 3, 2), (16, 64, 256, 4, 3, 4), (16, 64, 256, 8, 3, 2),
    (16, 64, 512, 8, 3, 4), (16, 128, 128, 4, 4, 4), (16, 128, 256, 8, 3, 4), (16, 16, 512, 4, 3, 1),
)  # fmt: skip
_SOME = (
    (64, 64, 128, 4, 3, 2), (64, 64, 128, 4, 4, 2), (64, 64, 64, 4, 4, 2), (64, 64, 256, 4, 3, 2),
    (64, 128, 64, 4, 4, 4), (64, 128, 128, 4, 3, 4), (64, 128, 128, 8, 3, 4), (64, 32, 256, 4, 3, 1),
    (64, 128, 64, 4, 4, 2), (64, 64, 128, 8, 3, 2),
)  # fmt: skip
_MANY = (
    (128, 128, 64, 4, 3, 1), (128, 128, 64, 8, 3, 1), (128, 128, 64, 8, 4, 1), (128, 128, 128, 8, 3, 1),
    (128, 256, 64, 8, 3, 1), (128, 256, 64, 8, 4, 1), (256, 128, 64, 8, 3, 1), (256, 64, 64, 8, 3, 1),
    (64, 256, 64, 4, 3, 1), (128, 64, 128, 4, 3, 1),
)  # fmt: skip
_GROUPS = {
    16: ((16, 32, 128, 4, 4, 1), (16, 64, 128, 4, 4, 2), (16, 64, 128, 8, 3, 2), (16, 128, 128, 4, 3, 4),
         (16, 128, 128, 8, 3, 4)),
    64: ((64, 64, 128, 4, 3, 2), (64, 64, 128, 8, 3, 2), (64, 128, 128, 8, 3, 4), (64, 128, 64, 4, 3, 4),
         (64, 32, 128, 4, 3, 2)),
    4096: ((128, 64, 128, 8, 2, 1), (128, 128, 128, 8, 2, 1), (128, 128, 128, 8, 3, 1), (128, 128, 64, 8, 3, 1),
           (128, 64, 128, 4, 3, 1), (64, 128, 128, 4, 3, 1), (128, 256, 64, 8, 3, 1), (256, 64, 64, 8, 3, 1)),
}  # fmt: skip


def candidates() -> Iterator[Candidate]:
    """Yield what is tried, the most informative first."""
    for tokens, sizes in _GROUPS.items():
        p = Product(WIDE, 4, 128, tokens)
        yield from (Candidate(p, "x".join(map(str, size)), _tile(*size)) for size in sizes)
    for tokens in (128, 256, 512, 4096):
        p = Product(WIDE, 4, 128, tokens)
        yield from (Candidate(p, f"library, {mb} MiB", _library(mb)) for mb in (64, 256, 1024))
    for tokens in (4096, 1024, 512):
        p = Product(SQUARE, 4, None, tokens)
        yield from (Candidate(p, f"library, {mb} MiB", _library(mb)) for mb in (8, 16, 32))
        yield from (Candidate(p, "x".join(map(str, size)), _tile(*size)) for size in _MANY[:6])
    for op in ("fake_quantize", "fake_quantize_backward"):
        for dtype in (torch.bfloat16, torch.float32):
            for noise in (False, True):
                for tile, warps in ((4096, 8), (4096, 4), (2048, 4), (2048, 8), (8192, 8), (1024, 4)):
                    yield Candidate(Elementwise(op, dtype, noise), f"{tile}, {warps} warps", _elements(tile, warps))
    for tokens in (512, 4096):
        p = Product(WIDE, 4, None, tokens, 8)
        yield from (Candidate(p, f"library, {mb} MiB", _library(mb)) for mb in (16, 64))
        yield from (Candidate(p, "x".join(map(str, size)), _tile(*size)) for size in
                    ((128, 128, 128, 8, 3, 1), (128, 256, 128, 8, 3, 1), (128, 128, 64, 4, 3, 1)))  # fmt: skip
    for bits in (3, 8):
        yield from (
            Candidate(Product(WIDE, bits, None, 16), "x".join(map(str, size)), _tile(*size)) for size in _FEW[:6]
        )
    for bits, tokens, sizes in ((4, 4096, _MANY), (4, 512, _MANY), (4, 16, _FEW), (4, 64, _SOME), (1, 16, _FEW),
                                (2, 16, _FEW), (1, 64, _SOME), (4, 128, (*_MANY[:4], *_SOME[:7]))):  # fmt: skip
        p = Product(WIDE, bits, None, tokens)
        yield from (Candidate(p, "x".join(map(str, size)), _tile(*size)) for size in sizes)
        if tokens >= 512:
            yield from (Candidate(p, f"library, {mb} MiB", _library(mb)) for mb in (64, 128, 256, 1024))


def main(journal: Path, seconds: float) -> int:
    """Time the candidates, and print the best of each problem."""
    out, device, end = Journal(journal), torch.device("cuda"), time.monotonic() + seconds
    done = {(r["problem"], r["name"]) for r in read(journal, "tune")}
    clock, problem, best = Events(), None, {}
    for c in candidates():
        if (str(c.problem), c.name) in done:
            continue
        if time.monotonic() > end:
            print("tune: out of time", flush=True)
            break
        out.write("tune", {"problem": str(c.problem), "name": c.name, "status": "begun"})
        record: dict[str, Any] = {"problem": str(c.problem), "name": c.name}
        try:
            if problem != c.problem:
                problem, run = c.problem, c.problem.call(device)
                right = _first(run()).double()
                record["chosen_us"] = _microseconds(run, clock)
            with c.using():
                error = ((_first(run()).double() - right).norm() / right.norm()).item()
                record |= {"us": _microseconds(run, clock), "error": float(f"{error:.2g}")}
            record["status"] = "ok" if error <= _TOLERANCE else "wrong"
        except Exception as trouble:  # a candidate that does not fit the GPU does not stop the others
            record |= {"status": "failed", "note": reason(trouble)}
        out.write("tune", record)
        if record["status"] == "ok":
            best[record["problem"]] = min(best.get(record["problem"], (1e9, "")), (record["us"], c.name))
            if "chosen_us" in record:
                best[record["problem"]] = min(best[record["problem"]], (record["chosen_us"], "the table's choice"))
        elif not alive(device):
            return DOOMED
    for name, (us, which) in best.items():
        print(f"{name}: {us:.1f} us, {which}", flush=True)
    return 0


def _first(outputs: Any) -> torch.Tensor:
    return outputs if isinstance(outputs, torch.Tensor) else outputs[0]


def _microseconds(run: Run, clock: Events) -> float:
    replay = captured(run)
    replay()
    return round(1e3 * statistics.median(clock(replay, launch=False) for _ in range(_REPETITIONS)), 2)
