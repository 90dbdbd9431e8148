"""Products of tokens with the weights of their experts: packed weights against a loop, and a training step."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qatkernels.dtypes import dtype_name
from qatkernels.grids import Grid, paretoq
from qatkernels.nn import GroupedQuantLinear, QuantConfig, QuantLinear
from qatkernels.ops import PackedWeight, grouped_lowbit_linear, lowbit_linear
from qatkernels.testing.samples import Sample, weights

from ..case import Call, Case, Expected, Missing, Settings, attempt, bytes_of
from ..exact import avoid_ties, expected

#: Tolerance by dtype: sums of up to 4096 products, and the rounding of the result.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2}


@dataclass(frozen=True)
class Problem:
    """A stack of experts, and how many tokens each has."""

    experts: int
    rows: int
    cols: int
    tokens: int
    load: str
    dtype: torch.dtype
    device: torch.device
    bits: float = 4

    @property
    def grid(self) -> Grid:
        """The grid of the weights."""
        return paretoq(self.bits)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape of the weights."""
        return self.experts, self.rows, self.cols

    @property
    def counts(self) -> list[int]:
        """Tokens of each expert: equal, or decreasing with the expert's index, with none for the last quarter."""
        if self.load == "balanced":
            return [self.tokens // self.experts] * self.experts
        busy = max(1, self.experts * 3 // 4)
        share = torch.arange(busy, 0, -1).double()
        ends = (share.cumsum(0) / share.sum() * self.tokens).round().long().tolist()
        return [b - a for a, b in zip((0, *ends), ends, strict=False)] + [0] * (self.experts - busy)

    @property
    def offsets(self) -> Tensor:
        """Where each expert's tokens end."""
        return torch.tensor(self.counts).cumsum(0).int().to(self.device)

    def draw(self, columns: int, seed: int) -> Tensor:
        """Return activations or gradients."""
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(sum(self.counts), columns, generator=generator).to(self.device, self.dtype)

    @property
    def names(self) -> dict[str, Any]:
        """The fields that name the case."""
        return {
            "grid": f"{self.grid.scheme}{self.grid.bits}", "granularity": "per row",
            "variant": f"{sum(self.counts)} tokens, {self.load}",
        }  # fmt: skip


def problems(settings: Settings, training: bool) -> Iterator[Problem]:
    """Return few large experts and many small ones, with few and many tokens each."""
    shapes = ((4, 32, 64, (8, 24)),) if settings.quick else ((8, 1024, 2048, (8, 64, 512)), (64, 256, 512, (64, 512)))
    for experts, rows, cols, batches in shapes:
        for tokens in batches:
            for load in ("balanced", "ragged"):
                for dtype in settings.dtypes if training else (torch.bfloat16,):
                    if dtype in settings.dtypes:
                        yield Problem(experts, rows, cols, tokens, load, dtype, settings.device)


def cases(settings: Settings) -> Iterator[Callable[[], Case]]:
    """Yield builders of the cases."""
    yield from (functools.partial(packed, p) for p in problems(settings, training=False))
    yield from (functools.partial(step, p) for p in problems(settings, training=True))


def _looped(p: Problem, x: Tensor, experts: list[Callable[[Tensor], Tensor]]) -> Callable[[], Tensor]:
    """Return a call that loops over the experts, as models without a grouped product do."""
    counts = p.counts
    return lambda: torch.cat([e(part) for e, part in zip(experts, x.split(counts), strict=True) if len(part)])


def _each(p: Problem, x: Tensor, w: Tensor) -> Tensor:
    """Return the product of each token with its expert's ``[N, K]`` of ``w`` in float64."""
    return torch.cat([part.double() @ e.double().T for part, e in zip(x.split(p.counts), w, strict=True)])


def packed(p: Problem) -> Case:
    """Return the case of packed experts. ``dense`` multiplies all tokens with one weight, so its result differs."""
    w = weights((p.experts * p.rows, p.cols), torch.float32, p.device).view(p.shape)
    weight = PackedWeight.from_float(w, p.grid.init_scale(w), p.grid)
    one = PackedWeight.from_float(w[0], p.grid.init_scale(w[0]), p.grid)
    values, x, offsets = weight.dequantize(), p.draw(p.cols, 3), p.offsets
    plain = values.to(p.dtype)
    linears: list[Callable[[Tensor], Tensor]] = [_linear(e) for e in plain]
    dense = one.dequantize()
    calls: list[Call | Missing] = [
        Call(f"loop of nn.Linear {dtype_name(p.dtype)}", _looped(p, x, linears), "baseline", graph=False),
        attempt("torch._grouped_mm", lambda: _grouped_mm(x, plain, offsets)),
        Call("packed, grouped", lambda: grouped_lowbit_linear(x, weight, offsets)),
        Call(
            "packed, one dense weight", lambda: lowbit_linear(x, one), expected=lambda: (x.double() @ dense.double().T,)
        ),
    ]
    used = sum(count > 0 for count in p.counts) / p.experts
    moved = int(weight.nbytes * used) + bytes_of(x) + sum(p.counts) * p.rows * x.element_size()
    return Case(
        "packed experts", p.shape, p.dtype, calls, lambda: (_each(p, x, values),), (TOLERANCE[p.dtype],), moved,
        flops=2 * sum(p.counts) * p.rows * p.cols, product_dtype=p.dtype, **p.names,
    )  # fmt: skip


def _linear(w: Tensor) -> nn.Linear:
    layer = nn.Linear(w.shape[1], w.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(w.clone(), requires_grad=False)
    return layer


def _grouped_mm(x: Tensor, w: Tensor, offsets: Tensor) -> Call:
    product = torch._grouped_mm
    product(x, w.mT, offs=offsets)
    return Call("torch._grouped_mm", lambda: product(x, w.mT, offs=offsets), "peer")


def step(p: Problem) -> Case:
    """Return the case of a forward and backward of fake-quantized experts."""
    x, g, offsets, config = p.draw(p.cols, 3), p.draw(p.rows, 4), p.offsets, QuantConfig(bits=p.bits)
    w = weights((p.experts * p.rows, p.cols), p.dtype, p.device)
    scale = p.grid.init_scale(w) * 0.5  # half the usual scales, so that some weights saturate
    w = avoid_ties(w, scale, p.grid)
    grouped = GroupedQuantLinear.from_stacked(nn.Parameter(w.view(p.shape).clone()), config=config, transposed=False)
    grouped.scale.data.copy_(scale.view(p.shape[:2]))
    experts = [QuantLinear.from_linear(_trainable(e), config) for e in w.view(p.shape)]
    plain, dense = [_trainable(e) for e in w.view(p.shape)], QuantLinear.from_linear(_trainable(w[: p.rows]), config)
    for expert, part in zip((*experts, dense), (*scale.split(p.rows), scale[: p.rows]), strict=True):
        expert.scale.data.copy_(part)

    def over(layers: list[Any]) -> Callable[[Tensor], Tensor]:
        return lambda x: _looped(p, x, layers)()

    right = functools.cache(lambda: _expected(p, x, g, w, scale))

    def of_first() -> Expected:
        return tuple(t if t is None or i < 2 else t[0] for i, t in enumerate(right()))

    calls: list[Call | Missing] = [
        Call("loop of nn.Linear", _step(over(plain), x, g, plain, ("weight",)), "baseline", graph=False,
             expected=lambda: _plain(p, x, g, w), note="checked: output, gradients of tokens and of the first expert"),
        Call("loop of QuantLinear", _step(over(experts), x, g, experts, ("weight", "scale")), "baseline",
             expected=of_first, graph=False, note="checked as above"),
        Call("GroupedQuantLinear", _step(lambda x: grouped(x, offsets), x, g, [grouped], ("weight", "scale"))),
        Call("QuantLinear, one dense weight", _step(dense, x, g, [dense], ("weight", "scale")), "baseline",
             unchecked="the product of another weight"),
    ]  # fmt: skip
    return Case(
        "experts step", p.shape, p.dtype, calls, right, (TOLERANCE[p.dtype],) * 4, 2 * bytes_of(x, g, w),
        flops=6 * sum(p.counts) * p.rows * p.cols, product_dtype=p.dtype, **p.names,
    )  # fmt: skip


def _trainable(w: Tensor) -> nn.Linear:
    return _linear(w).requires_grad_()


def _step(
    run: Callable[[Tensor], Tensor], x: Tensor, g: Tensor, layers: list[Any], names: tuple[str, ...]
) -> Callable[[], Any]:
    """Return a call of a forward and backward: the output, and the gradients of x and of the first of the layers."""
    x = x.detach().requires_grad_()
    parameters = [getattr(layer, name) for layer in layers for name in names]

    def once() -> tuple[Tensor | None, ...]:
        x.grad = None
        for parameter in parameters:
            parameter.grad = None
        y = run(x)
        y.backward(g)
        return y, x.grad, *(getattr(layers[0], name).grad for name in names)

    return once


def _plain(p: Problem, x: Tensor, g: Tensor, w: Tensor) -> Expected:
    first = p.counts[0]
    each = w.view(p.shape)
    return _each(p, x, each), _each(p, g, each.mT), g[:first].double().T @ x[:first].double()


def _expected(p: Problem, x: Tensor, g: Tensor, w: Tensor, scale: Tensor) -> Expected:
    # The experts' rows are rows of one tall weight, but the factor of the scales' gradients depends on one expert.
    sample = Sample("", p.grid, w, scale)
    (values,) = expected("fake_quantize", sample, sample.args("fake_quantize"))
    assert values is not None
    each = values.view(p.shape)
    pairs = zip(g.split(p.counts), x.split(p.counts), strict=True)
    upstream = torch.cat([a.double().T @ b.double() for a, b in pairs])
    dw, ds, _ = expected("fake_quantize_backward", sample, (upstream, *sample.point))
    assert dw is not None
    assert ds is not None
    ds = ds * (p.grid.grad_scale(p.rows * p.cols) / p.grid.grad_scale(w.numel()))
    return _each(p, x, each), _each(p, g, each.mT), dw.view(p.shape), ds.view(p.shape[:2])
