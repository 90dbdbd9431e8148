"""The implementations of an op on this machine, with their devices, for tests that compare backends."""

from functools import cache

import torch

from qatkernels.backends import IMPLS
from qatkernels.ops._op import OPS
from qatkernels.testing.checks import moved
from qatkernels.testing.samples import every_sample

__all__ = ["CPU_BACKENDS", "GPU", "GPU_BACKENDS", "HAS_GPU", "implementations", "moved", "samples_on"]

HAS_GPU = torch.cuda.is_available()
GPU = torch.device("cuda")
#: Backends of the CPU and of CUDA, without the reference. `bench/gpu/warm.py` sets these.
CPU_BACKENDS: tuple[str, ...] = ("cpp",)
GPU_BACKENDS: tuple[str, ...] = ("triton", "cuda")


def implementations(op):
    """Return (backend, implementation, device): the `_out` form, or the op itself if it works in place."""
    name = f"{op}_out" if OPS[op].outputs else op
    here = [(backend, torch.device("cpu")) for backend in CPU_BACKENDS]
    here += [(backend, GPU) for backend in GPU_BACKENDS if HAS_GPU]
    return [(backend, IMPLS[name][backend], device) for backend, device in here if backend in IMPLS[name]]


@cache
def samples_on(device):
    """Return the samples of the fake-quantize family on a device (cached)."""
    return tuple(every_sample(device))
