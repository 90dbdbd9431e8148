"""Products with packed weights against a 16-bit linear layer and other packed formats, by number of tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from qatkernels.dtypes import dtype_name
from qatkernels.grids import Grid, paretoq
from qatkernels.ops import PackedWeight, lowbit_linear
from qatkernels.testing.samples import draw, weights

from .. import ggml
from ..case import Call, Case, Missing, Settings, attempt, bytes_of
from .fake_quantize import ours

#: Tolerance by dtype of the activations: sums of up to 16384 products, and the rounding of the result.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
#: Most tokens that the CUDA kernel takes.
DECODED = 8


@dataclass(frozen=True)
class Problem:
    """A layer, how it is packed, and the number of tokens."""

    shape: tuple[int, int]
    bits: float
    group_size: int | None
    tokens: int
    dtype: torch.dtype = torch.bfloat16

    @property
    def grid(self) -> Grid:
        """The grid of the weight."""
        return paretoq(self.bits)

    @property
    def names(self) -> dict[str, str]:
        """The fields that name the case."""
        return {
            "grid": f"{self.grid.scheme}{self.grid.bits}", "variant": f"{self.tokens} tokens",
            "granularity": "per row" if self.group_size is None else f"groups of {self.group_size}",
        }  # fmt: skip


def problems(settings: Settings) -> Iterator[Problem]:
    """Return 4 bits at every number of tokens, other widths at some, and weights larger than any cache."""
    small, large = (4096, 4096), (16384, 16384)
    if settings.quick:
        yield from (Problem((64, 64), 4, 32, 1), Problem((64, 64), 2, None, 5))
        yield Problem((64, 64), 4, None, 3, torch.float32)
        return
    if settings.for_gpu:
        yield from _of_gpu()
        return
    if torch.bfloat16 in settings.dtypes:
        for group_size in (None, 128, 32):
            for tokens in (1, 4, 8, 16, 32, 64, 128, 512):
                yield Problem(small, 4, group_size, tokens)
        for group_size in (None, 128):
            for bits in (1, 1.58, 2, 3, 8):
                for tokens in (1, 8, 64, 512):
                    yield Problem(small, bits, group_size, tokens)
        for bits in (1, 2, 4):
            yield Problem(large, bits, None, 1)
    if torch.float32 in settings.dtypes:
        for tokens in (1, 8, 64, 512):
            yield Problem(small, 4, 128, tokens, torch.float32)


def _of_gpu() -> Iterator[Problem]:
    """Return every width at every number of tokens, the most informative first: time on a GPU may run out."""
    widths = ((1, None), (1.58, None), (2, None), (3, None), (4, None), (4, 128), (8, None))
    for tokens in (1, 4096, 8, 64, 512, 2048, 16, 4, 128, 2, 32):
        for shape in ((8192, 28672), (4096, 4096)):
            for bits, group_size in widths:
                yield Problem(shape, bits, group_size, tokens)


def cases(settings: Settings) -> Iterator[Callable[[], Case]]:
    """Yield builders of the cases."""
    yield from (partial(build, problem, settings) for problem in problems(settings))
    shape, batches = ((64, 64), (3,)) if settings.quick else ((4096, 4096), (512, 4096))
    if settings.quick or settings.for_gpu:
        yield from (partial(transposed, Problem(shape, 4, None, tokens), settings) for tokens in batches)


def build(p: Problem, settings: Settings) -> Case:
    """Return the case of a problem."""
    w, packed = _packed(p, settings.device)
    x = draw((p.tokens, p.shape[1]), p.dtype, settings.device, seed=3)
    plain = draw(p.shape, p.dtype, settings.device, width=0.02)
    calls: list[Call | Missing] = [
        Call(f"nn.Linear {dtype_name(p.dtype)}", lambda: F.linear(x, plain), "baseline", unchecked="another weight"),
        Call("packed", lambda: lowbit_linear(x, packed)),
        Call("packed, A8", lambda: lowbit_linear(x, packed, act_bits=8), unchecked="activations of 8 bits"),
    ]
    if settings.for_gpu:
        calls += _backends(p, x, packed, settings.device)
        if p.bits == 4 and p.group_size == 128 and settings.device.type == "cuda":  # a part of torch: always there
            calls.append(attempt("int4pack", lambda: _int4pack(p, x, w)))
    elif settings.peers:
        calls += _peers(p, x, w)
    moved = packed.nbytes + bytes_of(x) + p.tokens * p.shape[0] * x.element_size()
    return Case(
        "packed linear", p.shape, p.dtype, calls, lambda: (product(x, packed.dequantize()),), (TOLERANCE[p.dtype],),
        moved, flops=2 * p.tokens * p.shape[0] * p.shape[1], product_dtype=p.dtype, **p.names,
    )  # fmt: skip


def _packed(p: Problem, device: torch.device) -> tuple[Tensor, PackedWeight]:
    w = weights(p.shape, torch.float32, device)
    return w, PackedWeight.from_float(w, p.grid.init_scale(w, p.group_size), p.grid, p.group_size)


def _backends(p: Problem, x: Tensor, w: PackedWeight, device: torch.device) -> Iterator[Call | Missing]:
    """Yield the call of each backend, with the CUDA kernel where it takes the call."""
    grid = (list(p.grid.constants), p.grid.code_min, w.bits)
    for call in ours("lowbit_linear", (x, w.packed, w.scale, w.zero_point, None, None, *grid, None), device):
        if getattr(call, "output", "fresh") == "fresh" and (call.name != "cuda" or p.tokens <= DECODED):
            yield call


def transposed(p: Problem, settings: Settings) -> Case:
    """Return the case of the transposed product, which gives the gradient of activations."""
    _, packed = _packed(p, settings.device)
    g = draw((p.tokens, p.shape[0]), p.dtype, settings.device, seed=3)
    plain = draw(p.shape, p.dtype, settings.device, width=0.02)
    grid = (list(p.grid.constants), p.grid.code_min, packed.bits, p.shape[1])
    args = (g, packed.packed, packed.scale, packed.zero_point, None, *grid)
    calls: list[Call | Missing] = [
        Call(f"matmul {dtype_name(p.dtype)}", lambda: g @ plain, "baseline", unchecked="another weight"),
        *ours("lowbit_linear_transposed", args, settings.device),
    ]
    return Case(
        "packed linear, transposed", p.shape, p.dtype, calls, lambda: (product(g, packed.dequantize().T),),
        (TOLERANCE[p.dtype],), packed.nbytes + 2 * bytes_of(g), flops=2 * p.tokens * p.shape[0] * p.shape[1],
        product_dtype=p.dtype, **p.names,
    )  # fmt: skip


def product(x: Tensor, w: Tensor) -> Tensor:
    """Return x Wᵀ in float64, without a float64 copy of the weight."""
    return torch.cat([x.double() @ part.double().T for part in w.split(1024)], -1)


def _peers(p: Problem, x: Tensor, w: Tensor) -> Iterator[Call | Missing]:
    if p.dtype == torch.bfloat16:
        if p.bits == 4:
            yield attempt("int4pack", lambda: _int4pack(p, x, w))
        if p.bits == 8:
            yield attempt("int8pack", lambda: _int8pack(p, x))
        yield attempt("int8 mm", lambda: _int8_mm(p))
    if p.bits in (2, 4, 8):
        for level in (0, 4):  # float32 or int8 products
            yield attempt(f"onnxruntime {level}", lambda level=level: _onnxruntime(p, x, level))  # type: ignore[misc]
    kinds = {4: ("Q4_0",), 2: ("Q2_K",), 1.58: ("TQ2_0", "TQ1_0")}.get(p.bits, ())
    for kind in kinds:
        yield attempt(f"ggml {kind}", lambda kind=kind: _ggml(x, w, kind))  # type: ignore[misc]


def _int4pack(p: Problem, x: Tensor, w: Tensor) -> Call:
    rows, group, on_gpu = p.shape[0], min(128, p.shape[1]), w.device.type == "cuda"
    if on_gpu:  # two codes of a byte, in tiles of 8 rows and 16 * 8 columns
        codes = torch.randint(0, 256, (rows, p.shape[1] // 2), dtype=torch.uint8, device=w.device)
        packed = torch.ops.aten._convert_weight_to_int4pack(codes, 8)
        product = torch.ops.aten._weight_int4pack_mm
    else:
        codes = torch.randint(0, 16, p.shape, dtype=torch.int32)
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
        product = torch.ops.aten._weight_int4pack_mm_for_cpu
    scales = torch.ones(p.shape[1] // group, rows, 2, dtype=torch.bfloat16, device=w.device)
    note = f"groups of {group}; codes of its own"
    return Call("int4pack", lambda: product(x, packed, group, scales), "peer", unchecked="codes of its own", note=note)


def _onnxruntime(p: Problem, x: Tensor, level: int) -> Call:
    """MatMulNBits, whose accuracy level 4 quantizes activations to 8 bits."""
    import numpy as np
    import onnx
    import onnxruntime

    (rows, cols), bits, block = p.shape, int(p.bits), p.group_size or 128
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 256, (rows, cols // block, block * bits // 8), dtype=np.uint8)
    tensors = [
        onnx.numpy_helper.from_array(codes, "codes"),
        onnx.numpy_helper.from_array(np.ones(rows * cols // block, dtype=np.float32), "scales"),
    ]
    node = onnx.helper.make_node(
        "MatMulNBits", ["x", "codes", "scales"], ["y"], domain="com.microsoft", K=cols, N=rows, bits=bits,
        block_size=block, accuracy_level=level,
    )  # fmt: skip
    described = [
        [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [None, size])]
        for name, size in (("x", cols), ("y", rows))
    ]
    graph = onnx.helper.make_graph([node], "product", *described, tensors)
    opsets = [onnx.helper.make_opsetid("", 21), onnx.helper.make_opsetid("com.microsoft", 1)]
    model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    # Threads that wait in a loop for the next call would slow the other calls of the race.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    given = {"x": x.float().numpy()}
    note = f"float32 activations; groups of {block}; codes of its own"
    return Call(
        f"onnxruntime {level}", lambda: session.run(None, given), "peer", unchecked="codes of its own", note=note
    )


def _int8pack(p: Problem, x: Tensor) -> Call:
    codes = torch.randint(-128, 128, p.shape, dtype=torch.int8)
    scale = torch.ones(p.shape[0], dtype=x.dtype)
    product = torch.ops.aten._weight_int8pack_mm
    return Call(
        "int8pack", lambda: product(x, codes, scale), "peer", unchecked="codes of its own", note="a scale a row"
    )


def _int8_mm(p: Problem) -> Call:
    codes = torch.randint(-128, 128, p.shape, dtype=torch.int8).t()
    x = torch.randint(-128, 128, (p.tokens, p.shape[1]), dtype=torch.int8)
    note = "integers in, integers out: without the quantization of activations, and without scales"
    return Call("int8 mm", lambda: torch._int_mm(x, codes), "peer", unchecked="integers", note=note)


def _ggml(x: Tensor, w: Tensor, kind: str) -> Call:
    activations = x.float().contiguous()
    product = ggml.linear(w, x.shape[0], kind)
    note = "float32 activations, which it quantizes to 8 bits; a copy of them and of the result included"
    return Call(f"ggml {kind}", lambda: product(activations), "peer", unchecked="a format of its own", note=note)
