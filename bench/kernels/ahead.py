"""Compiles the kernels of a call of a Triton launcher ahead of time, for a GPU that is not there.

A launch is recorded and not run. Its arguments give the signature that Triton's JIT would compile.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import triton
from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend

from qatkernels.backends import IMPLS, load_backend
from qatkernels.backends.triton import _plans
from qatkernels.ops._op import OPS, as_tuple

load_backend("triton")  # a torch without CUDA does not by itself

#: Triton's own assembler and disassemblers.
TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
TYPES = {
    torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float64: "*fp64",
    torch.int8: "*i8", torch.uint8: "*u8", torch.int32: "*i32", torch.int64: "*i64",
}  # fmt: skip

#: A kernel, its arguments by name, and the options of the launch.
Launch = tuple[Any, dict[str, Any], dict[str, Any]]


@contextmanager
def _recording(launches: list[tuple[Any, Any, Any]]) -> Iterator[None]:
    run, replays = triton.JITFunction.run, _plans.enabled
    _plans.enabled = False  # launch plans are off, so that Triton sees every launch
    triton.JITFunction.run = lambda self, *a, grid, warmup, **k: launches.append((self, a, k))
    try:
        yield
    finally:
        triton.JITFunction.run, _plans.enabled = run, replays


def recorded(call: Callable[[], Any]) -> list[Launch]:
    """Return the launches of a call."""
    launches: list[tuple[Any, Any, Any]] = []
    with _recording(launches):
        call()
    found = []
    for kernel, positional, keywords in launches:
        named = dict(zip(kernel.arg_names, positional, strict=False))
        options = {k: keywords.pop(k) for k in list(keywords) if k not in kernel.arg_names}
        found.append((kernel, named | keywords, options))
    return found


def recorded_launches(op: str, args: tuple[Any, ...]) -> list[Launch]:
    """Return the launches of an op."""
    implementation = IMPLS[f"{op}_out" if OPS[op].outputs else op]["triton"]
    return recorded(lambda: implementation(*args, *as_tuple(OPS[op].meta(*args))))


def specialized(kernel: Any, arguments: dict[str, Any]) -> tuple[dict[str, str], dict[str, Any], dict[Any, Any]]:
    """Return the signature, constants and attributes that Triton compiles for a launch with these arguments."""
    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(kernel.params):
        name, value = parameter.name, arguments[parameter.name]
        free = parameter.do_not_specialize
        if parameter.is_constexpr or (isinstance(value, int) and value == 1 and not free):
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name], attributes[(i,)] = TYPES[value.dtype], [["tt.divisibility", 16]]
        elif isinstance(value, int):
            signature[name] = "i32" if abs(value) < 2**31 else "i64"
            if value % 16 == 0 and not free:
                attributes[(i,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32"
    return signature, constants, attributes


def compiled(launch: Launch, architecture: int) -> Any:
    """Compile the kernel of a launch as Triton would for it.

    Args:
        launch: one of :func:`recorded`.
        architecture: ten times the compute capability.
    """
    kernel, arguments, options = launch
    source = ASTSource(kernel, *specialized(kernel, arguments))
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)


def intermediate(launch: Launch, architecture: int) -> Any:
    """Return what Triton makes of the Python code of a kernel, its first step, in which it checks types.

    It takes a hundredth of the time of :func:`compiled`. Arguments are those of that.
    """
    kernel, arguments, options = launch
    target = GPUTarget("cuda", architecture, 32)
    source, backend = ASTSource(kernel, *specialized(kernel, arguments)), make_backend(target)
    chosen = backend.parse_options(options | source.parse_options())
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    functions = backend.get_codegen_implementation(chosen)
    return source.make_ir(target, chosen, functions, backend.get_module_map(), context)


def resources(cubin: bytes) -> tuple[int, int, int]:
    """Return registers, stack and local memory of the one kernel in a cubin."""
    text = _cuobjdump("--dump-resource-usage", cubin)
    found = re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", text)
    if found is None:
        raise RuntimeError(f"cuobjdump reports no registers: {text}")
    registers, stack, local = map(int, found.groups())
    return registers, stack, local


def disassembly(cubin: bytes) -> str:
    """Return the machine code of a cubin as text."""
    return _cuobjdump("-sass", cubin)


def _cuobjdump(what: str, cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(TOOLS / "cuobjdump"), what, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
