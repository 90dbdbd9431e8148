"""A training step of a linear layer, forward and backward: the cost of QAT compared with nn.Linear."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from qatkernels.dtypes import dtype_name
from qatkernels.grids import Grid, paretoq
from qatkernels.nn import QuantConfig, QuantLinear
from qatkernels.testing.samples import Sample, draw, weights

from .. import peers
from ..case import Call, Case, Expected, Missing, Settings, attempt, bytes_of
from ..exact import avoid_ties, expected

#: Tolerance by dtype: sums of 1024 products, and of 1024 tokens.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}


@dataclass(frozen=True)
class Problem:
    """A layer and its batch. With ``autocast`` the parameters are float32 and the products in that dtype."""

    tokens: int
    features: int
    bits: float
    dtype: torch.dtype
    device: torch.device
    autocast: torch.dtype | None = None

    @property
    def grid(self) -> Grid:
        """The grid of the weight."""
        return paretoq(self.bits)

    @property
    def product_dtype(self) -> torch.dtype:
        """The dtype of the matrix products."""
        return self.autocast or self.dtype

    def activations(self) -> tuple[Tensor, Tensor]:
        """Return the layer's input and the gradient of its output."""
        shape = self.tokens, self.features
        return draw(shape, self.product_dtype, self.device, seed=3), draw(
            shape, self.product_dtype, self.device, seed=4
        )

    def linear(self) -> nn.Linear:
        """Return an nn.Linear."""
        layer = nn.Linear(self.features, self.features, bias=False, device=self.device, dtype=self.dtype)
        layer.weight.data.copy_(weights((self.features, self.features), self.dtype, self.device))
        return layer


def problems(settings: Settings) -> Iterator[Problem]:
    """Return batch sizes and widths, with both kinds of 16-bit training: bfloat16 parameters, or autocast."""
    sizes = tuple((tokens, features) for features in (1024, 4096) for tokens in (64, 256, 1024))
    if settings.for_gpu:
        sizes = ((8192, 4096), (1024, 4096), (8192, 1024), (1024, 1024))
    for tokens, features in ((4, 32),) if settings.quick else sizes:
        for bits in (2, 4):
            for dtype in settings.dtypes:
                yield Problem(tokens, features, bits, dtype, settings.device)
            if torch.float32 in settings.dtypes:
                yield Problem(tokens, features, bits, torch.float32, settings.device, autocast=torch.bfloat16)


def cases(settings: Settings) -> Iterator[Callable[[], Case]]:
    """Yield builders of the cases."""
    return (partial(build, problem, settings) for problem in problems(settings))


def build(p: Problem, settings: Settings) -> Case:
    """Return the case of a problem: QuantLinear, nn.Linear, and the peers."""
    x, g = p.activations()
    w, scale = _layer_without_ties(p)
    calls: list[Call | Missing] = [_plain(p, x, g), _ours(p, x, g, w, scale)]
    if settings.peers:
        calls += _peers(p, x, g, w, scale)
    return Case(
        "linear step", (p.features, p.features), p.dtype, calls, partial(_expected, p, x, g, w, scale),
        (TOLERANCE[p.product_dtype],) * 4,
        bytes_of(x, g, w) + bytes_of(g, x, w), flops=6 * p.tokens * p.features**2, product_dtype=p.product_dtype,
        grid=f"{p.grid.scheme}{p.grid.bits}", granularity="per row",
        variant=f"{p.tokens} tokens" + (f", autocast to {dtype_name(p.autocast)}" if p.autocast else ""),
    )  # fmt: skip


def _layer_without_ties(p: Problem) -> tuple[Tensor, Tensor]:
    w = p.linear().weight.detach()
    # Half the usual scales, so that some weights saturate.
    scale = p.grid.init_scale(w) * 0.5
    return avoid_ties(w, scale, p.grid), scale


def _expected(p: Problem, x: Tensor, g: Tensor, w: Tensor, scale: Tensor) -> Expected:
    sample = Sample("", p.grid, w, scale)
    (values,) = expected("fake_quantize", sample, sample.args("fake_quantize"))
    assert values is not None
    upstream = g.double().T @ x.double()
    dw, ds, _ = expected("fake_quantize_backward", sample, (upstream, *sample.point))
    return x.double() @ values.T, g.double() @ values, dw, ds


def step(
    p: Problem, layer: Callable[[Tensor], Tensor], x: Tensor, g: Tensor, parameters: list[Tensor]
) -> Callable[[], Any]:
    """Return a call of one forward and backward, which gives the output and the gradients of x and the parameters."""
    x = x.detach().requires_grad_()

    def run() -> tuple[Tensor | None, ...]:
        for leaf in (x, *parameters):
            leaf.grad = None
        with torch.autocast(p.device.type, p.autocast) if p.autocast else nullcontext():
            y = layer(x)
        y.backward(g)
        return y, x.grad, *(leaf.grad for leaf in parameters)

    return run


def _plain(p: Problem, x: Tensor, g: Tensor) -> Call:
    layer = p.linear()

    def right() -> Expected:
        w = layer.weight.detach().double()
        return x.double() @ w.T, g.double() @ w, g.double().T @ x.double()

    return Call("nn.Linear", step(p, layer, x, g, [layer.weight]), "baseline", expected=right)


def _ours(p: Problem, x: Tensor, g: Tensor, w: Tensor, scale: Tensor) -> Call:
    layer = QuantLinear.from_linear(p.linear(), QuantConfig(bits=p.bits))
    layer.weight.data.copy_(w)
    layer.scale.data.copy_(scale)
    return Call("QuantLinear", step(p, layer, x, g, [layer.weight, layer.scale]))


def _peers(p: Problem, x: Tensor, g: Tensor, w: Tensor, scale: Tensor) -> Iterator[Call | Missing]:
    torch.compiler.reset()
    w, scale = (t.clone().requires_grad_() for t in (w, scale))
    grad_scale = p.grid.grad_scale(w.numel())

    def layer(x: Tensor) -> Tensor:
        values: Tensor = peers.EagerFakeQuantize.apply(w, scale, p.grid, grad_scale)
        return nn.functional.linear(x, values)

    for name, function in (("eager formula", layer), ("torch.compile", peers.compiled(layer))):
        yield Call(name, step(p, function, x, g, [w, scale]), "peer")
    if p.grid.scheme == "lsq":
        yield attempt("torchao FakeQuantizedLinear", lambda: _torchao(p, x, g))
        yield attempt("brevitas QuantLinear", lambda: _brevitas(p, x, g))


def _torchao(p: Problem, x: Tensor, g: Tensor) -> Call:
    from torchao.quantization.qat import FakeQuantizedLinear, IntxFakeQuantizeConfig

    config = IntxFakeQuantizeConfig(getattr(torch, f"int{p.bits}"), group_size=min(128, p.features))
    layer = FakeQuantizedLinear.from_linear(p.linear(), weight_config=config)
    run = step(p, layer, x, g, [layer.weight])
    note = f"groups of {config.group_size}"
    return Call("torchao FakeQuantizedLinear", run, "peer", unchecked="scales of its own", note=note)


def _brevitas(p: Problem, x: Tensor, g: Tensor) -> Call:
    from brevitas.nn import QuantLinear

    layer = QuantLinear(p.features, p.features, bias=False, weight_bit_width=int(p.bits)).to(p.device, p.dtype)
    layer.weight.data.copy_(p.linear().weight.data)
    return Call("brevitas QuantLinear", step(p, layer, x, g, [layer.weight]), "peer", unchecked="scales of its own")
