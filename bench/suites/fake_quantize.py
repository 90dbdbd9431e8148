"""Fake quantization: forward, backward, forward mode and codes, at the sizes of a transformer's weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from qatkernels import backends
from qatkernels.dtypes import dtype_name
from qatkernels.grids import Grid, lsq, seq
from qatkernels.ops._op import OPS, as_tuple
from qatkernels.testing.samples import Sample, make

from .. import peers
from ..case import Call, Case, Missing, Settings, bytes_of
from ..exact import expected, without_ties

FORWARD, BACKWARD, JVP, QUANTIZE = "fake_quantize", "fake_quantize_backward", "fake_quantize_jvp", "quantize"

INT4 = lsq(4)

#: Tolerance by dtype of an output: a few roundings, or those of the float32 sum over a row.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.int8: 0.0, torch.uint8: 0.0}

#: Backends to list on any device; those of the device if empty. `bench/gpu/warm.py` sets this.
ONLY: tuple[str, ...] = ()


@dataclass(frozen=True)
class Problem:
    """A case of the list below."""

    op: str
    dtype: torch.dtype
    shape: tuple[int, int]
    grid: Grid = INT4
    granularity: str | int = "row"
    noise: bool = False
    out_dtype: torch.dtype | None = None


def problems(settings: Settings) -> Iterator[Problem]:
    """Return the main case in every form, then variants that change one setting each."""
    large, small, group = ((4096, 4096), (1024, 1024), 128) if not settings.quick else ((64, 256), (16, 32), 32)
    for dtype in settings.dtypes:
        huge = settings.for_gpu and not settings.quick
        widest = (8192, 8192) if huge else large
        for op in (FORWARD, BACKWARD, JVP, QUANTIZE):
            yield Problem(op, dtype, widest)
        for op in (FORWARD, BACKWARD):
            yield Problem(op, dtype, widest, grid=seq(2))
            yield Problem(op, dtype, widest, noise=True)
            yield Problem(op, dtype, large, granularity=group)
            yield Problem(op, dtype, small)
        yield Problem(FORWARD, dtype, large, granularity="tensor")
        yield Problem(BACKWARD, dtype, large, granularity="tensor")
    if torch.float32 in settings.dtypes:
        for op in (FORWARD, BACKWARD):
            yield Problem(op, torch.float32, large, out_dtype=torch.bfloat16)


def cases(settings: Settings) -> Iterator[Callable[[], Case]]:
    """Yield builders of the cases."""
    return (partial(build, problem, settings) for problem in problems(settings))


def build(problem: Problem, settings: Settings) -> Case:
    """Return the case of a problem: every backend present, fresh and into given memory, and the peers."""
    p = problem
    sample = without_ties(make(p.grid, p.shape, p.dtype, p.granularity, settings.device, p.noise, p.out_dtype))
    args = sample.args(p.op)
    calls: list[Call | Missing] = list(ours(p.op, args, settings.device))
    if p.op == FORWARD:
        calls.append(Call("qatkernels.fake_quantize", public(sample)))
    if settings.peers:
        calls += peers.of_op(p.op, sample, args)
    outputs = as_tuple(OPS[p.op].meta(*args))
    variant = ("noise " if p.noise else "") + (f"to {dtype_name(p.out_dtype)}" if p.out_dtype else "")
    inputs = [a for a in args if isinstance(a, torch.Tensor)]
    return Case(
        p.op, p.shape, p.dtype, calls, partial(expected, p.op, sample, args),
        tuple(TOLERANCE[out.dtype] for out in outputs), bytes_of(*inputs, *outputs),
        grid=f"{p.grid.scheme}{p.grid.bits}",
        granularity=f"per {p.granularity}" if isinstance(p.granularity, str) else f"group {p.granularity}",
        variant=variant.strip(),
    )  # fmt: skip


def ours(op: str, args: tuple[Any, ...], device: torch.device) -> Iterator[Call | Missing]:
    """Yield the call of each backend on a device, with outputs that it allocates and with given ones.

    The reference is timed on a CPU only; it would take too much GPU time.
    """
    for backend in ONLY or backends.REGISTRY.preference(device.type.upper()):
        if backend == "reference" and device.type == "cuda":
            continue
        if backend not in backends.IMPLS[op]:
            yield Missing(backend, backends.MISSING.get(backend, "does not implement this op"))
            continue
        impl = backends.IMPLS[op][backend]
        yield Call(backend, lambda f=impl: f(*args))  # type: ignore[misc]
        if into := backends.IMPLS[f"{op}_out"].get(backend):
            yield _into(backend, into, op, args)


def _into(backend: str, impl: Any, op: str, args: tuple[Any, ...]) -> Call:
    outputs = as_tuple(OPS[op].meta(*args))
    for out in outputs:
        # Filled with NaN, so that an element that the call does not write is an error.
        out.fill_(float("nan") if out.is_floating_point() else 113)

    def run() -> Any:
        impl(*args, *outputs)
        return outputs

    return Call(backend, run, output="out")


def public(sample: Sample) -> Any:
    """Return a call of the public function, with its checks and its autograd node."""
    from qatkernels import fake_quantize

    s = sample
    w = s.w.detach().requires_grad_()
    return lambda: fake_quantize(
        w, s.scale, s.grid, group_size=s.group_size, zero_point=s.zero_point, noise_std=s.noise_std,
        scale_noise_std=s.scale_noise_std, seed=s.seed, dtype=s.dtype,
    )  # fmt: skip
