"""ggml's products with quantized weights, called in the shared libraries of llama-cpp-python."""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

#: ggml's type numbers. They are part of its file format, so they do not change.
TYPES = {"Q4_0": 2, "Q2_K": 10, "TQ1_0": 34, "TQ2_0": 35}


class _Parameters(ctypes.Structure):
    _fields_ = (("mem_size", ctypes.c_size_t), ("mem_buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool))


class _Plan(ctypes.Structure):
    _fields_ = (("work_size", ctypes.c_size_t), ("work_data", ctypes.c_void_p), ("rest", ctypes.c_uint8 * 240))


def _libraries() -> tuple[ctypes.CDLL, ctypes.CDLL]:
    spec = importlib.util.find_spec("llama_cpp")
    if spec is None or spec.origin is None:
        raise ImportError("llama-cpp-python is not installed")
    folder = Path(spec.origin).parent / "lib"
    base = ctypes.CDLL(str(folder / "libggml-base.so"), mode=ctypes.RTLD_GLOBAL)
    cpu = ctypes.CDLL(str(folder / "libggml-cpu.so"), mode=ctypes.RTLD_GLOBAL)
    pointer, size, integer = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int64
    for library, name, result, arguments in (
        (base, "ggml_init", pointer, (_Parameters,)),
        (base, "ggml_free", None, (pointer,)),
        (base, "ggml_new_tensor_2d", pointer, (pointer, ctypes.c_int, integer, integer)),
        (base, "ggml_mul_mat", pointer, (pointer, pointer, pointer)),
        (base, "ggml_new_graph", pointer, (pointer,)),
        (base, "ggml_build_forward_expand", None, (pointer, pointer)),
        (base, "ggml_get_data", pointer, (pointer,)),
        (base, "ggml_row_size", size, (ctypes.c_int, integer)),
        (base, "ggml_quantize_chunk", size, (ctypes.c_int, pointer, pointer, integer, integer, integer, pointer)),
        (cpu, "ggml_graph_plan", _Plan, (pointer, ctypes.c_int, pointer)),
        (cpu, "ggml_graph_compute", ctypes.c_int, (pointer, ctypes.POINTER(_Plan))),
        (cpu, "ggml_cpu_init", None, ()),
    ):
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    cpu.ggml_cpu_init()
    return base, cpu


def linear(weight: Tensor, tokens: int, kind: str) -> Callable[[Tensor], Tensor]:
    """Return a function from float32 ``[tokens, K]`` to ``[tokens, N]`` with torch's number of threads.

    Args:
        weight: float32 ``[N, K]``; ggml quantizes it.
        tokens: number of rows that the function takes.
        kind: name in :data:`TYPES`.

    Raises:
        ImportError: if llama-cpp-python is not installed.
    """
    base, cpu = _libraries()
    (rows, cols), number = weight.shape, TYPES[kind]
    packed = rows * base.ggml_row_size(number, cols)
    context = base.ggml_init(_Parameters(packed + 4 * tokens * (rows + cols) + (1 << 20), None, False))
    w = base.ggml_new_tensor_2d(context, number, cols, rows)
    x = base.ggml_new_tensor_2d(context, 0, cols, tokens)
    weight = weight.float().contiguous()
    base.ggml_quantize_chunk(number, weight.data_ptr(), base.ggml_get_data(w), 0, rows, cols, None)
    y = base.ggml_mul_mat(context, w, x)
    graph = base.ggml_new_graph(context)
    base.ggml_build_forward_expand(graph, y)
    plan = cpu.ggml_graph_plan(graph, torch.get_num_threads(), None)
    work = torch.empty(plan.work_size + 64, dtype=torch.uint8)
    plan.work_data = work.data_ptr()
    result = torch.empty(tokens, rows)
    target, source = base.ggml_get_data(x), base.ggml_get_data(y)

    def run(activations: Tensor) -> Tensor:
        assert work.data_ptr() == plan.work_data  # keeps `work` alive: the plan holds only its address
        ctypes.memmove(target, activations.data_ptr(), activations.nbytes)
        if status := cpu.ggml_graph_compute(graph, ctypes.byref(plan)):
            raise RuntimeError(f"ggml_graph_compute returned status {status}")
        ctypes.memmove(result.data_ptr(), source, result.nbytes)
        return result

    return run
