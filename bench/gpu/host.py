"""Host time of a call in microseconds: ``python -m bench.gpu host``. It needs no GPU.

Without a GPU the process uses `fake_runtime.cpp`, a CUDA runtime whose launches do nothing, and `fake_driver.py` for
Triton. Everything before a launch is real: Python, the dispatcher, checks, allocation, the choice of a kernel. The
launch itself is missing: 2 to 3 µs in CUDA's runtime or driver, and Triton's C launcher.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from ..suites.lowbit import DECODED
from .target import CAPABILITY, FOLDER

_SOURCE = Path(__file__).with_name("fake_runtime.cpp")
_CALLS, _TURNS = 200, 40
#: Few for the decode kernel, and more for Triton's.
_TOKENS = (1, 8, 9, 512)


def main() -> int:
    """Measure. Without a GPU a new process runs with the fake runtime."""
    if torch.cuda.is_available():
        _measure()
        return 0
    library = build()
    environment = {**os.environ, "LD_PRELOAD": str(library), "OMP_NUM_THREADS": "1"}
    code = "from bench.gpu import host; host.pretend(); host._measure()"
    return subprocess.run([sys.executable, "-W", "ignore", "-c", code], env=environment, check=False).returncode


def build() -> Path:
    """Compile the runtime, and return the library to preload.

    Raises:
        SystemExit: if this torch has no CUDA or the headers of CUDA are not here.
    """
    nvcc = shutil.which("nvcc")
    if torch.version.cuda is None or nvcc is None:
        raise SystemExit("host times of CUDA calls need a torch with CUDA, and nvcc on the PATH for its headers")
    target = FOLDER / "libcuda.so.1"
    target.parent.mkdir(parents=True, exist_ok=True)
    options = ("-O2", "-shared", "-Xcompiler", "-fPIC", "--cudart", "none", "-Xlinker", "-soname,libcuda.so.1")
    command = [nvcc, *options, "-o", str(target), str(_SOURCE)]
    subprocess.run(command, check=True)
    return target


def pretend() -> None:
    """Install a fake driver, so that Triton neither compiles nor launches."""
    from . import fake_driver

    fake_driver.install(CAPABILITY, compiling=False)


def microseconds(run: Callable[[], Any]) -> float:
    """Return the thread time of a call: the 10th percentile of repetitions, since other processes only add time."""
    for _ in range(20):
        run()
    turns = []
    for _ in range(_TURNS):
        torch.cuda.synchronize()
        start = time.thread_time_ns()
        for _ in range(_CALLS):
            run()
        turns.append((time.thread_time_ns() - start) / _CALLS * 1e-3)
    return sorted(turns)[len(turns) // 10]


def calls() -> Iterator[tuple[str, Callable[[], Any]]]:
    """Yield the calls that are timed."""
    import qatkernels as qk
    from qatkernels.backends import IMPLS
    from qatkernels.nn.packed_linear import PackedLinear
    from qatkernels.testing.samples import make

    device, grid = torch.device("cuda"), qk.grids.lsq(4)
    packed = torch.zeros(1024, 512, dtype=torch.uint8, device=device)
    weight = qk.PackedWeight(packed, torch.ones(1024, 1, device=device), None, grid, 1024)
    layer, plain = PackedLinear(weight), torch.zeros(1024, 1024, dtype=torch.bfloat16, device=device)
    for tokens in _TOKENS:
        x, name = torch.zeros(tokens, 1024, dtype=torch.bfloat16, device=device), f"lowbit_linear, {tokens} tokens"
        args = (x, weight.packed, weight.scale, None, None, None, list(grid.constants), grid.code_min, 4, None)
        yield f"{name}: PackedLinear", partial(layer, x)
        yield f"{name}: qk.lowbit_linear", partial(qk.lowbit_linear, x, weight)
        for backend in ("triton", "cuda"):
            if backend in IMPLS["lowbit_linear"] and (backend == "triton" or tokens <= DECODED):
                yield f"{name}: {backend} alone", partial(IMPLS["lowbit_linear"][backend], *args)
    sample = make(grid, (64, 1024), torch.bfloat16, device=device)
    yield "fake_quantize: qk.fake_quantize", partial(qk.fake_quantize, sample.w, sample.scale, sample.grid)
    for op in ("fake_quantize", "fake_quantize_backward"):
        for backend in ("triton", "cuda"):
            if backend in IMPLS[op]:
                yield f"{op}: {backend} alone", partial(IMPLS[op][backend], *sample.args(op))
    x = torch.zeros(1, 1024, dtype=torch.bfloat16, device=device)
    yield "torch.add", partial(torch.add, x, x)
    if torch.cuda.get_device_name() != "no GPU":  # cuBLAS asks more of a device
        yield "F.linear", partial(F.linear, x, plain)
    few, small = torch.zeros(1, 8), torch.zeros(8, 8)
    yield "F.linear of 1 x 8 on the CPU", partial(F.linear, few, small)


def _measure() -> None:
    torch.set_num_threads(1)
    print(f"µs of host time a call, {torch.cuda.get_device_name()}, torch {torch.__version__}")
    with torch.no_grad():
        for name, run in calls():
            print(f"{microseconds(run):8.1f}  {name}", flush=True)
