"""A fake driver for Triton: it compiles for a GPU that is not there, and launches nothing.

Triton's own launch path runs on CPU tensors: it binds arguments, specializes on them, computes the cache key and
compiles. Afterwards the cache holds the kernels that the same calls need on the GPU.
"""

from __future__ import annotations

import collections
import hashlib
import importlib
import os
import pkgutil
import subprocess
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import driver as nvidia
from triton.runtime import build, driver
from triton.runtime.cache import get_cache_manager
from triton.runtime.jit import JITFunction

#: Kernels compiled, found in the cache or counted since the driver was installed, by name.
kernels: collections.Counter[str] = collections.Counter()
#: Kernels that could not be compiled, with the error.
failures: list[str] = []


class _Utils:
    def load_binary(self, name: str, kernel: bytes, shared: int, device: int) -> tuple[int, ...]:
        return 1, 1, 32, 0, 1024

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 232448, "multiprocessor_count": 132, "warpSize": 32}


class _Launcher:
    """Compiles the C launcher of a kernel, and does not launch."""

    def __init__(self, source: Any, metadata: Any) -> None:
        constants = getattr(source, "constants", {})
        index = {(source.fn.arg_names.index(k),) if isinstance(k, str) else k: v for k, v in constants.items()}
        code = nvidia.make_launcher(index, dict(source.signature), getattr(metadata, "tensordesc_meta", None))
        compile_module(code, "__triton_launcher")

    def __call__(self, *args: Any) -> None:
        pass


class _Driver:
    utils, launcher_cls = _Utils(), _Launcher

    def __init__(self, capability: tuple[int, int]) -> None:
        self.capability = capability

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 10 * self.capability[0] + self.capability[1], 32)

    def get_device_capability(self, device: int = 0) -> tuple[int, int]:
        return self.capability

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def map_python_to_cpp_type(self, name: str) -> str:
        return nvidia.ty_to_cpp(name)


def compile_module(source: str, name: str) -> None:
    """Put a C module into Triton's cache, as Triton does, but do not load it: that needs a driver."""
    cache = get_cache_manager(hashlib.sha256((source + build.platform_key()).encode()).hexdigest())
    file = f"{name}{sysconfig.get_config_var('EXT_SUFFIX')}"
    if cache.get_file(file) is not None:
        return
    with tempfile.TemporaryDirectory() as folder:
        # Link to an empty library with the driver's name; on the GPU machine the real driver has the functions.
        empty = ("-shared", "-x", "c", "/dev/null", "-Wl,-soname,libcuda.so.1")
        subprocess.run(["gcc", *empty, "-o", f"{folder}/libcuda.so.1"], check=True)
        path = Path(folder) / f"{name}.c"
        path.write_text(source)
        built = build._build(name, str(path), folder, [folder], nvidia.include_dirs, nvidia.libraries, [])
        cache.put(Path(built).read_bytes(), file, binary=True)


class _Counted:
    """Replaces a kernel when kernels are only counted."""

    function, packed_metadata = 1, None

    def launch_metadata(self, *args: Any) -> None:
        return None

    def run(self, *args: Any) -> None:
        pass


def install(capability: tuple[int, int], *, compiling: bool = True) -> None:
    """Replace Triton's driver, and let the launchers see a GPU of a given capability.

    Args:
        capability: compute capability of the GPU.
        compiling: whether kernels are compiled, or only counted.
    """
    os.environ.pop("TRITON_INTERPRET", None)
    driver.set_active(_Driver(capability))
    if compiling:
        compile_module((Path(nvidia.dirname) / "driver.c").read_text(), "cuda_utils")
    importlib.import_module("qatkernels.backends").load_backend("triton")  # also with a torch that has no CUDA
    package = importlib.import_module("qatkernels.backends.triton")
    for found in pkgutil.iter_modules(package.__path__):
        module = importlib.import_module(f"qatkernels.backends.triton.{found.name}")
        if hasattr(module, "capability"):
            module.capability = lambda device: capability
    compile_kernel = JITFunction._do_compile

    def counted(self: Any, key: Any, *args: Any, **kwargs: Any) -> Any:
        kernels[self.__name__] += 1
        if not compiling:
            kernel = self.device_caches[0][0][key] = _Counted()
            return kernel
        try:
            return compile_kernel(self, key, *args, **kwargs)
        except Exception as error:
            failures.append(f"{self.__name__}: {type(error).__name__}: {error}"[:300])
            raise

    JITFunction._do_compile = counted  # type: ignore[method-assign]


def serve_cpu_tensors() -> None:
    """Register the Triton launchers for CPU tensors too. What they allocate is zero.

    Launch plans are off: they would allocate memory that is not zero.
    """
    from qatkernels.backends import IMPLS
    from qatkernels.backends.triton import _plans
    from qatkernels.ops._op import OPS, as_tuple

    _plans.enabled = False

    def zeroed(meta: Any) -> Any:
        def outputs(*args: Any) -> Any:
            found = meta(*args)
            for out in as_tuple(found):
                out.set_(torch.zeros_like(out))  # zero pages take no memory until something writes to them
            return found

        return outputs

    library = importlib.import_module("qatkernels.backends.triton._library")
    library.library_product = lambda x, w: torch.zeros(
        len(x), w.shape[1], dtype=torch.int32 if x.dtype == torch.int8 else torch.float32
    )
    for op in OPS.values():
        op.contract.meta = zeroed(op.contract.meta)  # type: ignore[method-assign]
    global _library
    _library = torch.library.Library("qatkernels", "IMPL")
    for name, implementations in IMPLS.items():
        if "triton" in implementations:
            _library.impl(name, implementations["triton"], "CPU", allow_override=True)


_library: Any = None
