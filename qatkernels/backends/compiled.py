"""The backends in the compiled extension: C++ kernels for the CPU, and CUDA kernels if it was built with CUDA."""

from __future__ import annotations

import importlib
import re
from types import ModuleType

import torch

from ..ops._op import Op
from .registry import Backend, Registry


def extension() -> ModuleType | None:
    """Return the compiled extension, or None if there is none that works here."""
    try:
        return _extension()
    except ImportError:
        return None


def _extension() -> ModuleType:
    """Return the compiled extension.

    Raises:
        ImportError: if it was not built, or for another torch.
    """
    compiled = importlib.import_module("qatkernels._C")
    info = compiled.build_info()
    if not fits(info["torch"], torch.__version__, bool(info["cuda_archs"])):
        raise ImportError(f"the extension was built for torch {info['torch']}, this is {torch.__version__}")
    return compiled


def fits(built: str, running: str, cuda: bool) -> bool:
    """Return whether an extension works with the running version of torch.

    The release must be the same, because torch guarantees no binary compatibility between releases. Builds of one
    release (``2.13.0``, ``2.13.0+cpu``, ``2.13.0+cu130``) differ only in CUDA. An extension without CUDA kernels works
    with all of them; one with CUDA kernels links to CUDA libraries, so it needs the same build. Of a version that is
    not a release, the part after the ``+`` names the source, so it must be the same too.

    Args:
        built: version of torch that the extension was built with.
        running: version of torch that is installed.
        cuda: whether the extension has CUDA kernels.
    """
    release = built.partition("+")[0]
    if cuda or re.fullmatch(r"[0-9.]+(\.post[0-9]+)?", release) is None:
        return built == running
    return release == running.partition("+")[0]


def _load_cpp(registry: Registry) -> None:
    compiled = _extension()
    for op in registry.ops.values():
        compiled.state(op.name, f"{op.name}({op.arguments}) -> ()", op.contract.text)
        for name, schema in {**op.schemas, condition(op): f"{condition(op)}({op.arguments}) -> bool"}.items():
            if any(compiled.serves(name, device) for device in ("CPU", "CUDA")):
                compiled.declare("qatkernels_cpp", name, schema)
        _enter(registry, compiled, op, "cpp", "CPU")
    for name in compiled.trained():
        _declare_trained(registry.ops[name], compiled)


def _declare_trained(op: Op, compiled: ModuleType) -> None:
    """Give an op its form with gradients in C++, which Op.call prefers; the process has one."""
    if op.trained is None:
        compiled.declare_trained("qatkernels_cpp", op.name, f"{op.name}_trained({op.arguments}) -> Tensor")
        object.__setattr__(op, "trained", getattr(torch.ops.qatkernels_cpp, f"{op.name}_trained").default)


def _load_cuda(registry: Registry) -> None:
    try:
        compiled = _extension()
    except ImportError:
        raise ImportError("the extension was not built") from None
    if not compiled.build_info()["cuda_archs"]:
        raise ImportError("the extension was built without CUDA")
    for op in registry.ops.values():
        _enter(registry, compiled, op, "cuda", "CUDA")


def _enter(registry: Registry, compiled: ModuleType, op: Op, backend: str, device: str) -> None:
    """Register the extension's kernels of an op on a device, and the condition under which they take a call."""
    for name in op.schemas:
        if compiled.serves(name, device):
            registry.enter(backend, name, getattr(torch.ops.qatkernels_cpp, name))
    if compiled.serves(condition(op), device):
        registry.conditions.setdefault(op.name, {})[backend] = getattr(torch.ops.qatkernels_cpp, condition(op))


def condition(op: Op) -> str:
    """Return the name of the op that tells whether a kernel takes a call."""
    return f"{op.name}_serves"


BACKENDS = (
    Backend("cpp", ("CPU",), _load_cpp, priority=10, compiled=True),
    Backend("cuda", ("CUDA",), _load_cuda, priority=10, compiled=True),
)
