"""Products with packed weights against a 16-bit linear layer and other packed formats, by number of tokens."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from qatkernels.grid import Grid, paretoq
from qatkernels.ops import PackedWeight, lowbit_linear
from qatkernels.ops.samples import weights

from .. import ggml
from ..case import Call, Case, Missing, Settings, attempt, bytes_of

#: Largest error by dtype of the activations: sums of up to 16384 products, and the rounding of the result.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
#: With quantized activations the right answer is another one; this is how far quantization to 8 bits takes it.
TOLERANCE_A8 = 0.1


@dataclass(frozen=True)
class Problem:
    """A layer, how it is packed, and how many tokens it meets."""

    features: int
    bits: float
    group_size: int | None
    tokens: int
    dtype: torch.dtype = torch.bfloat16

    @property
    def grid(self) -> Grid:
        """The grid of the weight."""
        return paretoq(self.bits)


def problems(settings: Settings) -> Iterator[Problem]:
    """4 bits at every number of tokens, other widths at some, and weights that no cache holds."""
    if settings.quick:
        yield from (Problem(64, 4, 32, 1), Problem(64, 2, None, 5), Problem(64, 4, None, 3, torch.float32))
        return
    if torch.bfloat16 in settings.dtypes:
        for group_size in (None, 128, 32):
            for tokens in (1, 4, 8, 16, 32, 64, 128, 512):
                yield Problem(4096, 4, group_size, tokens)
        for bits in (1, 1.58, 2, 3, 8):
            for tokens in (1, 8, 64, 512):
                yield Problem(4096, bits, None, tokens)
        for bits in (1, 2, 4):
            yield Problem(16384, bits, None, 1)
    if torch.float32 in settings.dtypes:
        for tokens in (1, 8, 64, 512):
            yield Problem(4096, 4, 128, tokens, torch.float32)


def cases(settings: Settings) -> Iterator[Case]:
    """Yield the suite's cases."""
    return (build(problem, settings) for problem in problems(settings))


def build(p: Problem, settings: Settings) -> Case:
    """Return the case of a problem."""
    w = weights((p.features, p.features), torch.float32, settings.device)
    packed = PackedWeight.from_float(w, p.grid.init_scale(w, p.group_size), p.grid, p.group_size)
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(p.tokens, p.features, generator=generator).to(settings.device, p.dtype)
    values = packed.dequantize()
    right = product(x, values)
    plain = values.to(p.dtype)
    calls: list[Call | Missing] = [
        Call(f"nn.Linear {str(p.dtype)[6:]}", lambda: torch.nn.functional.linear(x, plain), "baseline"),
        Call("packed", lambda: lowbit_linear(x, packed)),
        Call("packed, A8", lambda: lowbit_linear(x, packed, act_bits=8), unchecked="activations of 8 bits"),
    ]
    if settings.peers and settings.device.type == "cpu":
        calls += _peers(p, x, w)
    moved = packed.nbytes + 2 * bytes_of(x)
    return Case(
        "packed linear", (p.features, p.features), p.dtype, calls, (right,), (TOLERANCE[p.dtype],), moved,
        flops=2 * p.tokens * p.features**2, product_dtype=p.dtype, grid=f"{p.grid.scheme}{p.grid.bits}",
        granularity="per row" if p.group_size is None else f"groups of {p.group_size}", variant=f"{p.tokens} tokens",
    )  # fmt: skip


def product(x: Tensor, w: Tensor) -> Tensor:
    """Return x Wᵀ in float64, without a float64 copy of the weight."""
    return torch.cat([x.double() @ part.double().T for part in w.split(1024)], -1)


def _peers(p: Problem, x: Tensor, w: Tensor) -> Iterator[Call | Missing]:
    if p.bits == 4 and p.dtype == torch.bfloat16:
        yield attempt("int4pack", lambda: _int4pack(p, x, w))
    kinds = {4: ("Q4_0",), 2: ("Q2_K",), 1.58: ("TQ2_0", "TQ1_0")}.get(p.bits, ())
    for kind in kinds:
        yield attempt(f"ggml {kind}", lambda kind=kind: _ggml(x, w, kind))  # type: ignore[misc]


def _int4pack(p: Problem, x: Tensor, w: Tensor) -> Call:
    rows, group = p.features, min(128, p.features)
    codes = torch.randint(0, 16, (rows, p.features), dtype=torch.int32)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    scales = torch.ones(p.features // group, rows, 2, dtype=torch.bfloat16)
    product = torch.ops.aten._weight_int4pack_mm_for_cpu
    note = f"groups of {group}; codes of its own"
    return Call("int4pack", lambda: product(x, packed, group, scales), "peer", unchecked="codes of its own", note=note)


def _ggml(x: Tensor, w: Tensor, kind: str) -> Call:
    activations = x.float().contiguous()
    product = ggml.linear(w, x.shape[0], kind)
    note = "float32 activations, which it quantizes to 8 bits; a copy of them and of the result included"
    return Call(f"ggml {kind}", lambda: product(activations), "peer", unchecked="a format of its own", note=note)
