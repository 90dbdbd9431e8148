"""Calls of single kernels for a profiler. The profiler starts and stops at marks in the program."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

import qatkernels as qk
from qatkernels.backends import IMPLS
from qatkernels.ops import PackedWeight
from qatkernels.testing.samples import draw, make, weights

Run = Callable[[], Any]


def _packed(backend: str, shape: tuple[int, int], device: torch.device) -> Run:
    grid, w = qk.grids.lsq(4), weights(shape, torch.float32, device)
    packed = PackedWeight.from_float(w, grid.init_scale(w), grid)
    x = draw((1, shape[1]), torch.bfloat16, device)
    args = (x, packed.packed, packed.scale, None, None, None, list(grid.constants), grid.code_min, 4, None)
    return lambda: IMPLS["lowbit_linear"][backend](*args)


def _backward(backend: str, shape: tuple[int, int], device: torch.device) -> Run:
    args = make(qk.grids.lsq(4), shape, torch.bfloat16, device=device).args("fake_quantize_backward")
    return lambda: IMPLS["fake_quantize_backward"][backend](*args)


#: Profiled kernels: the decode kernel in CUDA C++ and in Triton at one token, and the backward of fake quantization.
CALLS: dict[str, tuple[Callable[[str, tuple[int, int], torch.device], Run], str, tuple[int, int]]] = {
    "gemv": (_packed, "cuda", (8192, 28672)),
    "decode": (_packed, "triton", (8192, 28672)),
    "backward": (_backward, "triton", (8192, 8192)),
}


def main(name: str, *, dry: bool = False) -> int:
    """Run a kernel a few times, and the last time between the profiler's start and stop marks."""
    build, backend, shape = CALLS[name]
    if dry:
        build(
            backend if backend in IMPLS["fake_quantize"] and backend != "triton" else "cpp",
            (64, 64),
            torch.device("cpu"),
        )()
        return 0
    run = build(backend, shape, torch.device("cuda"))
    for _ in range(3):
        run()
    torch.cuda.synchronize()
    torch.cuda.cudart().cudaProfilerStart()
    run()
    torch.cuda.synchronize()
    torch.cuda.cudart().cudaProfilerStop()
    return 0
