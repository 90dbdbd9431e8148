"""The steps of the two calls, each with a time limit."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..codes import MISSED
from ..journal import read
from . import pack
from .steps import Call, Step
from .target import ROOT

#: The suites of the first call, the most informative first, and the seconds that each may take on a GPU.
SUITE_SECONDS = {"fake_quantize": 45, "lowbit": 100, "linear": 35, "second_order": 30, "grouped": 20, "hessian": 15}
#: Tests that need a GPU: `pytest -m "gpu or backends"` on these, in one pool of processes.
GPU_TESTS = (
    "tests/cuda/test_gpu.py", "tests/cuda/test_gpu_products.py", "tests/hessian/test_hessian_gpu.py", "tests/ops",
    "tests/nn/test_forward_mode.py", "-m", "gpu or backends",
)  # fmt: skip
#: What a dry run starts instead: a few tests, and suites that take seconds on a CPU.
DRY_TESTS = ("tests/cuda/test_gpu_products.py", "tests/ops/test_packing.py", "-k", "views or float64")
SLOW = ("hessian", "second_order", "grouped")
#: Kernels that the profiler looks at, as `bench.gpu profile` knows them.
PROFILED = ("gemv", "decode", "backward")
SANITIZERS = ("memcheck", "racecheck")
#: What :func:`again` can run besides.
MORE = ("tests", "tune", *SANITIZERS, *PROFILED)
#: Selects the hand-written CUDA kernels by a part of their names.
CUDA_KERNELS = "kernel_substring=qk4cuda"
#: The end-to-end study of a real model, where there is one.
STUDY = ROOT / "studies/real_model.py"

_GPU = (sys.executable, "-m", "bench.gpu")


def first(call: Call) -> None:
    """Run import, doctor, smoke checks, benchmarks and tests: is everything right, and how fast is it?"""
    if not call.dry:
        call.note("pack", pack.unpack())
        if call.run(Step("import", (sys.executable, "-c", _IMPORT), 40)) != 0:
            call.run(Step("build", (sys.executable, "setup.py", "build_ext", "--inplace"), 150, env=pack.BUILD))
    call.run(Step("doctor", (sys.executable, "-m", "qatkernels", "doctor"), 30))
    if not call.dry and call.run(Step("cache", (*_GPU, "probe"), 40)) == MISSED:
        # Triton is not the version that made the pack: compile what the benchmarks need now, on all processors.
        share = (sys.executable, "-O", "-W", "ignore", *_GPU[1:], "warm", "rows", "--share")
        call.run_together([Step(f"warm {i}", (*share, f"{i}/12"), 60) for i in range(12)])
    few = ("--every", "5") if call.dry else ()
    call.persist(Step("smoke", (*_GPU, "smoke", *_shared(call), *few), 60))
    _rows(call, 0.02 if call.dry else 0.15, reserve=0 if call.dry else 130)
    if not call.dry:
        call.persist(Step("tune", (*_GPU, "tune", *_shared(call), "--seconds", "45"), 50))
    _tests(call, DRY_TESTS if call.dry else GPU_TESTS, 100)


def again(call: Call, after: Path, suites: Sequence[str], then: Sequence[str]) -> None:
    """Run after a change: all smoke checks, some suites as a whole, the tests that failed in an earlier call, and more.

    Args:
        call: the call.
        after: journal of the earlier call.
        suites: names of the suites.
        then: what to run besides, of :data:`MORE`.
    """
    call.note("pack", pack.unpack())
    call.persist(Step("smoke", (*_GPU, "smoke", *_shared(call)), 60))
    _rows(call, 0.12, reserve=20 * len(then), suites={name: SUITE_SECONDS[name] for name in suites})
    failed = tuple(dict.fromkeys(record["id"] for record in read(after, "test")))
    if failed:
        _tests(call, failed, 60)
    for name in then:
        if name == "tune":
            call.persist(Step("tune", (*_GPU, "tune", *_shared(call), "--seconds", "25"), 30))
        elif name == "tests":
            _tests(call, GPU_TESTS, 100)
        elif name in PROFILED:
            _profile(call, name)
        else:
            _sanitize(call, name, 45)


def second(call: Call, after: Path) -> None:
    """Run again what failed in the first call, then sanitizers, the profiler, and a study of a real model.

    Args:
        call: the call.
        after: journal of the first call.
    """
    if not call.dry:
        call.note("pack", pack.unpack())
    if after.exists():
        earlier = ("--again", str(after))
        call.persist(Step("smoke again", (*_GPU, "smoke", *_shared(call), *earlier), 40))
        _rows(call, 0.02 if call.dry else 0.4, reserve=120, again=earlier)
        failed = tuple(dict.fromkeys(record["id"] for record in read(after, "test")))
        if failed:
            _tests(call, failed[:60], 40)
    else:
        call.skip("again", f"there is no journal of a first call at {after}")
    for tool in SANITIZERS:
        _sanitize(call, tool, 90)
    for kernel in PROFILED:
        _profile(call, kernel)
    if STUDY.exists():
        study = (sys.executable, "-m", "studies", STUDY.stem, "--out", str(call.folder / "study"), "--minutes", "1.5")
        call.run(Step("study", (*study, "--smoke") if call.dry else study, 120))
    else:
        call.skip("study", f"there is no study of a real model in this checkout ({STUDY.relative_to(ROOT)})")


def _sanitize(call: Call, tool: str, limit: float) -> None:
    sanitizer = ("compute-sanitizer", "--tool", tool, "--error-exitcode", "86", "--kernel-name", CUDA_KERNELS)
    every = "12" if call.dry else "3"
    checks = (*_GPU, "smoke", *_shared(call), "--backend", "cuda", "--every", every, "--under", tool)
    # torch's caching allocator would hide an access beyond the end of a tensor.
    call.run_under(Step(tool, checks, limit, env={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}), sanitizer)


def _profile(call: Call, kernel: str) -> None:
    profiler = ("ncu", "--clock-control", "none", "--profile-from-start", "off", "--launch-count", "4", *_SECTIONS)
    call.run_under(Step(f"ncu {kernel}", (*_GPU, "profile", kernel, *_dry(call)), 40, log="ncu.txt"), profiler)


def _rows(
    call: Call, budget: float, reserve: float, again: tuple[str, ...] = (), suites: Mapping[str, float] = SUITE_SECONDS
) -> None:
    """Run suites, each for some seconds, and leave ``reserve`` seconds for what comes after them."""
    quick = (
        ("--quick", "--device", "cpu", "--threads", "1")
        if call.dry
        else ("--case-seconds", "25", "--dtype", "bf16", "fp32")
    )
    seconds = min(call.left() - reserve, 30 if call.dry else sum(suites.values()))
    named = [f"{name}:{limit}" for name, limit in suites.items() if not (call.dry and name in SLOW)]
    command = (sys.executable, "-m", "bench", *named, "--journal", str(call.journal.path), *quick, *again)
    timing = ("--budget", str(budget), "--seconds", str(max(seconds, 1)))
    call.persist(Step("rows", (*command, *timing), seconds + 20), reserve)


def _tests(call: Call, tests: tuple[str, ...], limit: float) -> None:
    workers = 0 if call.dry else min(14, pack.processors())
    parallel = ("-n", str(workers), "--dist", "worksteal") if workers and pack.has("xdist") else ()
    # One test that hangs must not prevent the tests after it.
    patience = ("--timeout", "60") if pack.has("pytest_timeout") else ()
    options = ("-q", "-p", "no:cacheprovider", "-p", "bench.gpu.recorder", "--tb=short", *parallel, *patience)
    environment = {"QATKERNELS_JOURNAL": str(call.journal.path)} | ({"OMP_NUM_THREADS": "1"} if parallel else {})
    call.run(Step("tests", (sys.executable, "-m", "pytest", *options, *tests), limit, env=environment))


def _shared(call: Call) -> tuple[str, ...]:
    return ("--journal", str(call.journal.path), *_dry(call))


def _dry(call: Call) -> tuple[str, ...]:
    return ("--dry",) if call.dry else ()


_SECTIONS = tuple(
    part
    for section in ("SpeedOfLight", "MemoryWorkloadAnalysis", "Occupancy", "WarpStateStats", "LaunchStats")
    for part in ("--section", section)
)
_IMPORT = """
import torch
import qatkernels._C as extension
from qatkernels.backends import MISSING
print(torch.__version__, torch.cuda.get_device_name(0), extension.build_info(), MISSING)
assert "cpp" not in MISSING and extension.build_info()["cuda_archs"], MISSING
"""
