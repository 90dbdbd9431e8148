"""Fills Triton's cache with the kernels that the calls on a GPU need, without a GPU.

It runs the same calls on CPU tensors with :mod:`bench.gpu.fake_driver`. Nothing is computed or compared: tensors hold
zeros or arbitrary memory, and Python's ``-O`` removes the assertions of the tests.
"""

from __future__ import annotations

import functools
import itertools
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch

from . import fake_driver
from .target import CAPABILITY

Job = tuple[str, Callable[[], Any]]


def main(part: str, seconds: float, share: tuple[int, int] = (0, 1), *, compiling: bool = True) -> int:
    """Compile the kernels of one part of the calls, or only count them.

    Args:
        part: one of :data:`bench.gpu.target.PARTS`.
        seconds: when to stop.
        share: this process's number and how many there are: each takes every n-th call.
        compiling: whether kernels are compiled.
    """
    if __debug__ and part == "tests":
        raise SystemExit("python -O is needed: the tests' assertions would stop them at the first result")
    fake_driver.install(CAPABILITY, compiling=compiling)
    fake_driver.serve_cpu_tensors()
    start, end = time.monotonic(), time.monotonic() + seconds
    if part == "tests":
        _tests(end, share)
    else:
        jobs = {"rows": _rows, "smoke": _smoke, "tune": _candidates}[part]()
        for name, job in itertools.islice(jobs, share[0], None, share[1]):
            _attempt(name, job)
            if os.environ.get("VERBOSE"):
                print(f"{time.monotonic() - start:.0f} s: {name}", flush=True)
            if time.monotonic() > end:
                print(f"{part}: out of time after {name}", flush=True)
                break
    print(f"{part}: {sum(fake_driver.kernels.values())} kernels in {time.monotonic() - start:.0f} s: "
          f"{dict(fake_driver.kernels)}", flush=True)  # fmt: skip
    for line in fake_driver.failures:
        print(f"not compiled: {line}", flush=True)
    return 0


def _attempt(name: str, job: Callable[[], Any]) -> None:
    try:
        job()
    except Exception as error:  # code that uses the meaningless result may raise; the kernel is compiled by then
        if os.environ.get("VERBOSE"):
            print(f"{name}: {type(error).__name__}: {error}", flush=True)


def _smoke() -> Iterator[Job]:
    from qatkernels.backends import IMPLS
    from qatkernels.ops._op import OPS
    from qatkernels.testing.checks import every_check

    for check in every_check(torch.device("cpu")):
        implementation = IMPLS[f"{check.op}_out" if OPS[check.op].outputs else check.op].get("triton")
        if implementation is not None:  # some ops have no Triton kernel
            yield f"{check.op} {check.name}", lambda run=check.run, impl=implementation: run(impl)  # type: ignore[misc]


def _rows() -> Iterator[Job]:
    """Every call of ours in the suites of the first call, at the shapes of a GPU."""
    _draw_nothing()
    from ..case import Settings
    from ..suites import SUITES, fake_quantize
    from .calls import SUITE_SECONDS

    fake_quantize.ONLY = ("triton",)
    settings = Settings(torch.device("cpu"), gpu_shapes=True)
    smaller = _smaller(settings)
    for name in SUITE_SECONDS:
        for index, build in enumerate(smaller.get(name) or SUITES[name](settings)):
            yield f"{name} {index}", functools.partial(_run_calls, build)
    yield from _bases()


def _bases() -> Iterator[Job]:
    """Gram-Schmidt with as many rows as Lanczos has them: one kernel for each power of two, with and without h."""
    from qatkernels.backends import IMPLS

    from ..suites import hessian

    impl = IMPLS["gram_schmidt_out"]["triton"]
    for dtype, wide in ((torch.float32,) * 2, (torch.bfloat16, torch.float32), (torch.float64,) * 2):
        for rows in (1, *(2**k + 1 for k in range(hessian.STEPS.bit_length()) if 2**k < hessian.STEPS)):
            basis, w = torch.zeros(rows, 1_327_104, dtype=dtype), torch.zeros(1_327_104, dtype=wide)
            dots, sq = torch.empty(rows, dtype=torch.float64), torch.empty((), dtype=torch.float64)
            for h in (None, dots):
                yield f"gram_schmidt {rows} rows of {dtype}", functools.partial(impl, basis, w, h, w, dots, sq)


def _smaller(settings: Any) -> dict[str, list[Callable[[], Any]]]:
    """Leave out of the suites what no kernel depends on and a CPU would take long for, and return those that change."""
    from qatkernels.ops import PackedWeight

    from ..suites import fake_quantize, hessian, linear, lowbit, second_order

    def packed(p: Any, device: torch.device) -> Any:
        few = torch.zeros(64, p.shape[1])  # quantized and packed, so that those kernels are there
        made = PackedWeight.from_float(few, p.grid.init_scale(few, p.group_size), p.grid, p.group_size)
        rows, scale = p.shape[0], made.scale
        zeros = torch.zeros(rows, made.packed.shape[1], dtype=torch.uint8)
        return few, PackedWeight(zeros, torch.ones(rows, scale.shape[1]), None, p.grid, p.shape[1])

    problem = hessian.tools.Problem
    hessian.tools.Problem = lambda config, windows, device: problem(config, 1, device=device, steps=1)  # type: ignore[assignment, misc]
    hessian.GPU_STEPS = 2  # `_bases` has the kernels of longer bases
    second_order._tokens = lambda settings: (64, 50257, 64)
    lowbit._packed = packed
    families = {replace(p, shape=(256, p.shape[1])): None for p in fake_quantize.problems(settings)}
    steps = {replace(p, tokens=16): None for p in linear.problems(settings)}
    return {
        "fake_quantize": [functools.partial(fake_quantize.build, p, settings) for p in families],
        "linear": [functools.partial(linear.build, p, settings) for p in steps],
    }


def _candidates() -> Iterator[Job]:
    _draw_nothing()
    from ..case import Settings
    from . import tune

    _smaller(Settings(torch.device("cpu"), gpu_shapes=True))

    for c in tune.candidates():

        def run(c: tune.Candidate = c) -> None:
            call = c.problem.call(torch.device("cpu"))
            with c.using():
                call()

        yield f"{c.problem} {c.name}", run


def _run_calls(build: Callable[[], Any]) -> None:
    case = build()
    for call in case.calls:
        if getattr(call, "kind", "") == "ours" and call.name != "reference":
            _attempt(f"{case.title} {call.name}", call.run)


def _draw_nothing() -> None:
    """Make random tensors zero, which takes no memory, and leave weights on ties where they are."""
    from qatkernels.testing import samples

    from .. import exact

    def zeros(shape: Any, dtype: Any = torch.float32, *unused: Any, **ignored: Any) -> torch.Tensor:
        return torch.zeros(tuple(shape), dtype=dtype)

    samples.draw = zeros
    torch.Tensor.normal_ = lambda self, *args, **kwargs: self  # type: ignore[method-assign, assignment]
    exact.avoid_ties = lambda w, *args: w  # type: ignore[assignment]


def _tests(end: float, share: tuple[int, int]) -> None:
    import pytest

    from tests import implementations

    from .calls import GPU_TESTS

    implementations.HAS_GPU, implementations.GPU = True, torch.device("cpu")
    implementations.CPU_BACKENDS, implementations.GPU_BACKENDS = (), ("triton",)

    class Stop:
        @staticmethod
        def pytest_collection_modifyitems(items: list[Any]) -> None:
            items[:] = items[share[0] :: share[1]]

        @staticmethod
        def pytest_runtest_setup(item: Any) -> None:
            if time.monotonic() > end:
                pytest.exit("out of time")

    arguments = ["-q", "-p", "no:cacheprovider", "--assert=plain", "--tb=no", "-k", "not compiled", *GPU_TESTS]
    sys.stdout.flush()
    pytest.main(arguments, plugins=[Stop()])
