"""Second derivatives: forward mode of a quantized linear layer, the vector work of Lanczos, cross-entropy."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qatkernels import ops
from qatkernels.grids import lsq
from qatkernels.nn import QuantConfig, QuantLinear
from qatkernels.ops._op import OPS
from qatkernels.testing.samples import Sample, draw, make

from ..case import Call, Case, Expected, Missing, Settings, bytes_of
from ..exact import expected, without_ties
from .fake_quantize import ours

#: Tolerance by dtype: a few roundings, or those of a sum of a thousand products.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 4e-2, torch.float16: 8e-3}
#: Standard deviation of the weights of the layer that computes logits.
WEIGHT_SIZE = 0.05


def cases(settings: Settings) -> Iterator[Callable[[], Case]]:
    """Yield builders of the cases."""
    for dtype in settings.dtypes:
        for tokens in (4,) if settings.quick else (64, 512):
            for features in (32,) if settings.quick else (1024, 4096):
                yield partial(linear, tokens, features, dtype, settings)
        for rows, cols in _bases(settings):
            for update in (False, True):
                yield partial(gram_schmidt, rows, cols, dtype, update, settings)
        yield partial(rows_twice, dtype, settings)
        yield partial(loss_twice, dtype, settings)
        yield partial(linear_loss_twice, dtype, settings)


def _bases(settings: Settings) -> tuple[tuple[int, int], ...]:
    if settings.quick:
        return ((5, 1000),)
    return ((60, 1_400_000), (60, 100_000_000) if settings.for_gpu else (10, 40_000_000))


def _random(*shape: int, device: torch.device, dtype: torch.dtype, seed: int) -> Tensor:
    return draw(shape, dtype, device, seed)


def linear(tokens: int, features: int, dtype: torch.dtype, settings: Settings) -> Case:
    """Return output and tangent of a quantized linear layer, against the same in separate ops and three products."""
    device = settings.device
    sample = without_ties(make(lsq(4), (features, features), dtype, device=device))
    x, u = (_random(tokens, features, device=device, dtype=dtype, seed=seed) for seed in (3, 4))
    v = sample.tangents()[0]

    def right() -> Expected:
        q, along = _weight_and_tangent(sample)
        return x.double() @ q.T, x.double() @ along.T + u.double() @ q.T

    args = (x, u, v, None, None, *sample.point, False)
    quantize, tangent = torch.ops.qatkernels.fake_quantize, torch.ops.qatkernels.fake_quantize_jvp

    def unfused() -> Any:
        q = quantize(*sample.point, None)
        y = F.linear(x, q)
        return y, F.linear(u, q) + F.linear(x, tangent(v, None, None, *sample.point, None))

    calls: list[Call | Missing] = [Call("unfused", unfused, "baseline"), *ours("quant_linear_dual", args, device)]
    calls.append(_module(sample, x, u, v))
    return Case(
        "linear forward mode", (features, features), dtype, calls, right, (TOLERANCE[dtype],) * 2,
        bytes_of(x, u, sample.w, v, x, x), flops=6 * tokens * features**2, grid="lsq4", granularity="per row",
        variant=f"{tokens} tokens", memory=True,
    )  # fmt: skip


def _weight_and_tangent(sample: Sample) -> tuple[Tensor, Tensor]:
    (q,) = expected("fake_quantize", sample, sample.args("fake_quantize"))
    args = (*(t if i == 0 else None for i, t in enumerate(sample.tangents())), *sample.point, None)
    (along,) = expected("fake_quantize_jvp", sample, args)
    assert q is not None
    assert along is not None
    return q, along


def _module(sample: Sample, x: Tensor, u: Tensor, v: Tensor) -> Call:
    rows, cols = sample.w.shape
    layer = QuantLinear(cols, rows, bias=False, config=QuantConfig(4), device=x.device, dtype=x.dtype)
    layer.weight.data.copy_(sample.w)
    layer.scale.data.copy_(sample.scale)

    def push(w: Tensor, x: Tensor) -> Tensor:
        return torch.func.functional_call(layer, {"weight": w}, (x,))

    return Call("torch.func.jvp of QuantLinear", lambda: torch.func.jvp(push, (layer.weight.data, x), (v, u)))


def gram_schmidt(rows: int, cols: int, dtype: torch.dtype, update: bool, settings: Settings) -> Case:
    """Return one pass of reorthogonalization, against torch's two products with the basis.

    The tolerance is that of torch's float32 sums over tens of millions of elements; ours are float64.
    """
    device = settings.device
    basis = torch.empty(rows, cols, dtype=dtype, device=device).normal_()
    w = _random(cols, device=device, dtype=torch.float32, seed=1)
    h = _random(rows, device=device, dtype=torch.float64, seed=2) if update else None

    def plain() -> Any:
        new = w if h is None else torch.addmv(w.to(dtype), basis.t(), h.to(dtype), alpha=-1).float()
        return new, basis @ new.to(dtype), new @ new

    args = (basis, w, h)
    unchecked = "" if dtype == torch.float32 else "products in 16 bits"
    calls = [Call("torch", plain, "baseline", unchecked=unchecked), *ours("gram_schmidt", args, device)]
    return Case(
        "gram_schmidt", (rows, cols), dtype, calls,
        lambda: tuple(t.double() for t in OPS["gram_schmidt"].reference(*args)), (1e-6, 2e-3, 2e-3),
        bytes_of(basis, w, w if update else None), variant="update and products" if update else "products",
    )  # fmt: skip


def _tokens(settings: Settings) -> tuple[int, int, int]:
    """Return tokens, vocabulary and features."""
    if settings.quick:
        return 6, 50, 16
    return (8192, 50257, 2048) if settings.for_gpu else (512, 50257, 256)


def _logits(dtype: torch.dtype, settings: Settings) -> tuple[Tensor, Tensor, Tensor]:
    tokens, vocabulary, _ = _tokens(settings)
    z, v = (_random(tokens, vocabulary, device=settings.device, dtype=dtype, seed=seed) for seed in (1, 2))
    targets = torch.randint(vocabulary, (tokens,), generator=torch.Generator().manual_seed(3))
    return z, v, targets.to(settings.device)


def _exact(z: Tensor, v: Tensor, targets: Tensor, g: Tensor) -> Expected:
    """Return the tangents of gradient and loss in float64, computed a few rows at a time."""
    parts = []
    for rows in torch.arange(len(z), device=z.device).split(64):
        wide, along = z[rows].double(), v[rows].double()
        lse = torch.logsumexp(wide, 1)
        parts.append(OPS["cross_entropy_hvp"].reference(along, None, g[rows], wide, lse, targets[rows], -100))
    return tuple(torch.cat(column) for column in zip(*parts, strict=True))


def rows_twice(dtype: torch.dtype, settings: Settings) -> Case:
    """Return the pass over logits that a Hessian-vector product needs in addition to a gradient."""
    z, v, targets = _logits(dtype, settings)
    g = torch.full((len(z),), 1.0 / len(z), device=z.device)
    lse = torch.logsumexp(z.float(), 1)
    calls = list(ours("cross_entropy_hvp", (v, None, g, z, lse, targets, -100), settings.device))
    return Case(
        "cross_entropy_hvp", tuple(z.shape), dtype, calls, lambda: _exact(z, v, targets, g.double()),
        (max(TOLERANCE[dtype] / 4, 2e-5), 2e-5), bytes_of(z, v, z),
    )  # fmt: skip


def _product(loss: Callable[..., Tensor], leaves: tuple[Tensor, ...], vs: tuple[Tensor, ...]) -> Callable[[], Any]:
    """Return a Hessian-vector product by double backward."""

    def run() -> Any:
        points = [t.detach().requires_grad_() for t in leaves]
        gs = torch.autograd.grad(loss(*points), points, create_graph=True)
        return torch.autograd.grad(gs, points, vs)

    return run


def loss_twice(dtype: torch.dtype, settings: Settings) -> Case:
    """Return a Hessian-vector product through the loss alone, by double backward."""
    z, v, targets = _logits(dtype, settings)
    g = torch.full((len(z),), 1.0 / len(z), device=z.device, dtype=torch.float64)
    calls = [
        Call("F.cross_entropy", _product(lambda z: F.cross_entropy(z, targets), (z,), (v,)), "baseline"),
        Call("cross_entropy", _product(lambda z: ops.cross_entropy(z, targets), (z,), (v,))),
    ]
    return Case(
        "cross-entropy double backward", tuple(z.shape), dtype, calls, lambda: _exact(z, v, targets, g)[:1],
        (TOLERANCE[dtype],), bytes_of(z, z, z, z, v, z), memory=True,
    )  # fmt: skip


def _sums_of_float32(tokens: int, vocabulary: int, features: int) -> tuple[float, float]:
    """Return the tolerances of `linear_loss_twice` for h and w, if each sum adds its products one by one in float32.

    Each addition rounds the sum so far by a random part of it: u / sqrt(3) of it, where u = 2^-24. The sum of n terms
    with random signs grows like sqrt(k), so the n errors add up to u sqrt(n / 6) of its final size. The largest of N
    normal numbers is about sqrt(2 log N) standard deviations.

    Both results are two such sums, over the vocabulary and over the tokens. Their terms contain the softmax, whose
    relative error is the error of a logit. A token's softmax is largest at its largest logit z, a sum that grows like
    k z / n; so its n errors add up to u z sqrt(n) / 3.
    """
    unit = 2.0**-24

    def largest(count: int) -> float:
        return math.sqrt(2 * math.log(count))

    z = WEIGHT_SIZE * math.sqrt(features) * largest(tokens * vocabulary)
    of_logits = unit * z * math.sqrt(features) / 3 * largest(tokens)
    of_h = math.sqrt(2) * unit * math.sqrt(vocabulary / 6) * largest(tokens * features)
    of_w = math.sqrt(2) * unit * math.sqrt(tokens / 6) * largest(vocabulary * features)
    return of_logits + of_h, of_logits + of_w


def linear_loss_twice(dtype: torch.dtype, settings: Settings) -> Case:
    """Return the same through the layer that computes the logits. The floor counts each product once."""
    tokens, vocabulary, features = _tokens(settings)
    device = settings.device
    h, vh = (_random(tokens, features, device=device, dtype=dtype, seed=seed) for seed in (1, 2))
    w, vw = (_random(vocabulary, features, device=device, dtype=dtype, seed=seed) * WEIGHT_SIZE for seed in (3, 4))
    targets = torch.randint(vocabulary, (tokens,), generator=torch.Generator().manual_seed(5)).to(device)

    def plain(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda h, w: loss(F.linear(h, w), targets)

    def right() -> Expected:
        leaves, vs = (tuple(t.double() for t in pair) for pair in ((h, w), (vh, vw)))
        return _product(lambda h, w: ops.linear_cross_entropy(h, w, targets), leaves, vs)()

    leaves, vs = (h, w), (vh, vw)
    # Sums are float32 in every dtype. In 16 bits the roundings of their terms and results are larger.
    tolerances = tuple(max(t, 2 * TOLERANCE[dtype]) for t in _sums_of_float32(tokens, vocabulary, features))
    calls = [
        Call("F.cross_entropy of F.linear", _product(plain(F.cross_entropy), leaves, vs), "baseline"),
        Call("cross_entropy of F.linear", _product(plain(ops.cross_entropy), leaves, vs)),
        Call("linear_cross_entropy", _product(lambda h, w: ops.linear_cross_entropy(h, w, targets), leaves, vs)),
    ]
    return Case(
        "linear cross-entropy double backward", (tokens, vocabulary), dtype, calls, right, tolerances,
        bytes_of(h, w, vh, vw, h, w), flops=9 * 2 * tokens * vocabulary * features, variant=f"{features} features",
        memory=True,
    )  # fmt: skip
