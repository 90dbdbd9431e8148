"""The cost of WinQ and SQuAT: in a whole training step, and of each of their passes over the weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from qatkernels.grids import paretoq
from qatkernels.methods import SQuAT, WinQ
from qatkernels.nn import QuantConfig, QuantLinear, quantize_model, quantized_modules
from qatkernels.ops import perturb_swap_, perturbation_norms, reset_
from qatkernels.testing.samples import Sample, weights
from qatkernels.trainer import TrainConfig, loop
from qatkernels.trainer.data import Corpus
from qatkernels.trainer.parallel import Processes
from qatkernels.trainer.phases import Phase

from ..case import Call, Case, Settings, built, bytes_of
from ..exact import avoid_ties, expected

#: The noise of the released scripts. Its size does not change its cost.
NOISE = 1e-3
#: Why a step's result is not compared here.
TESTED = "tests/methods compares it"


@dataclass(frozen=True)
class Problem:
    """A layer and its batch; with ``autocast`` the parameters are float32 and the products in bfloat16."""

    name: str
    shape: tuple[int, int]
    tokens: int
    dtype: torch.dtype
    autocast: bool
    device: torch.device


def cases(settings: Settings) -> Iterator[Callable[[], Case]]:
    """Yield builders of steps of the demo's model and of single layers, then of the single passes."""
    widths, tokens = ((32,), (8, 16)) if settings.quick else ((1024, 2048, 4096), (1024, 4096))
    for dtype in settings.dtypes:
        for autocast in (False, True) if dtype == torch.float32 else (False,):
            if dtype == torch.float32:
                yield from map(built, _loop(settings, "bfloat16" if autocast else "float32"))
            for width, count in (*((width, tokens[0]) for width in widths), (widths[len(widths) // 2], tokens[1])):
                yield partial(_step, Problem("layer", (width, width), count, dtype, autocast, settings.device))
        for width in widths:
            yield from map(built, _passes(width, dtype, settings.device))


def _loop(settings: Settings, precision: str) -> Iterator[Case]:
    """Yield steps of the training loop on the demo's model, and what runs between them."""
    small: dict[str, Any] = {"width": 32, "depth": 1, "heads": 2, "context": 16, "batch": 2} if settings.quick else {}

    def training(**kwargs: Any) -> loop.Training:
        device = settings.device.type
        config = TrainConfig(device=device, precision=precision, bits=(2,), qat_lr=0.0, scale_lr=0.0, **small, **kwargs)
        text = torch.randint(256, (2**20,), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
        corpus = Corpus("random bytes", text, text, (), (), "", len(text), len(text))
        # Learning rates of zero, so that the weights do not change while a call is timed.
        phase = Phase(
            "w2", 2, 1000, 0.0, 0.0, lambda step: 0.0, quantization=config.quantization(2), method=config.method_config
        )
        return loop.begin(loop.Run(config, corpus, None, None, None, Processes()), phase)  # type: ignore[arg-type]

    def call(name: str, kind: Any, **kwargs: Any) -> Call:
        made = training(**kwargs)
        return Call(name, lambda: loop.take_step(made, 0), kind, unchecked=TESTED, graph=False)

    calls = [
        call("plain QAT", "baseline"),
        call("WinQ", "ours", method="winq", reset_every=0),
        call("SQuAT", "ours", method="squat"),
        call("SQuAT, latent", "ours", method="squat", target="latent"),
        call("SQuAT, ASAM", "ours", method="squat", norm="asam"),
    ]
    winq = training(method="winq", reset_every=0)
    loop.take_step(winq, 0)
    config, parameters = winq.run.config, list(winq.model.parameters())
    width, tokens = config.shape.width, config.training.batch * config.shape.context
    features = sum(w.numel() for w in parameters if w.ndim == 2)
    common: dict[str, Any] = {"grid": "seq2", "granularity": "per row"}
    shape, product = (width, width), torch.bfloat16 if precision == "bfloat16" else torch.float32
    yield Case(
        "step of the training loop", shape, torch.float32, calls, tuple, (), 4 * bytes_of(*parameters),
        flops=6 * tokens * features, product_dtype=product, memory=True,
        variant=f"demo model, {tokens} tokens, {precision}", **common,
    )  # fmt: skip
    if precision == "float32":
        assert isinstance(winq.method, WinQ)
        resets = [
            Call("WinQ.reset", winq.method.reset, unchecked=TESTED, graph=False),
            Call("AdamW, fused", winq.optimizer.step, "baseline", unchecked="an optimizer step", graph=False),
        ]
        weights = bytes_of(*(m.weight for m in quantized_modules(winq.model).values()))
        yield Case(
            "reset of a model", shape, torch.float32, resets, tuple, (), 2 * weights, variant="demo model", **common
        )


def _model(p: Problem) -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
    """Return a new layer, and a loss with a random gradient, so that all products of a layer in a model are done."""
    torch.manual_seed(0)
    layer = nn.Linear(*p.shape, bias=False, device=p.device, dtype=p.dtype)
    layer.weight.data.copy_(weights(p.shape, p.dtype, p.device))
    x = torch.randn(p.tokens, p.shape[1]).to(p.device, torch.bfloat16 if p.autocast else p.dtype).requires_grad_()
    g = torch.randn(p.tokens, p.shape[0]).to(p.device, x.dtype)
    return quantize_model(layer, QuantConfig(bits=2)), lambda model: (model(x) * g).sum()


def _step(p: Problem) -> Case:
    """Return whole steps: forward, backward, AdamW."""

    def call(name: str, kind: Any, build: Callable[[nn.Module, Any], Callable[[Callable[[], Tensor]], object]]) -> Call:
        model, loss = _model(p)
        model.train()
        # A learning rate of zero, so that the weights do not change while a call is timed.
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.0, fused=True)
        step = build(model, optimizer)

        def closure() -> Tensor:
            optimizer.zero_grad()
            with torch.autocast(p.device.type, torch.bfloat16) if p.autocast else nullcontext():
                value = loss(model)
            value.backward()  # type: ignore[no-untyped-call]
            return value

        return Call(name, lambda: step(closure), kind, unchecked=TESTED, graph=False)

    def plain(model: nn.Module, optimizer: Any) -> Any:
        return lambda closure: (closure(), optimizer.step())

    def winq(model: nn.Module, optimizer: Any) -> Any:
        part = WinQ(model, reset_every=None, reset_weight=0.4, noise_std=NOISE)
        return lambda closure: (closure(), optimizer.step(), part.after_step())

    def squat(**kwargs: Any) -> Any:
        return lambda model, optimizer: SQuAT(model, optimizer, **kwargs).step

    calls = [
        call("plain QAT", "baseline", plain),
        call("WinQ", "ours", winq),
        call("SQuAT", "ours", squat()),
        call("SQuAT, latent", "ours", squat(target="latent")),
        call("SQuAT, ASAM", "ours", squat(norm="asam")),
    ]
    model, _ = _model(p)
    parameters = list(model.parameters())
    features = sum(w.numel() for w in parameters if w.ndim == 2)
    return Case(
        f"step of the {p.name}", p.shape, p.dtype, calls, tuple, (), 4 * bytes_of(*parameters),
        flops=6 * p.tokens * features, product_dtype=torch.bfloat16 if p.autocast else p.dtype, grid="seq2",
        granularity="per row", memory=True,
        variant=f"{p.tokens} tokens" + (", autocast to bfloat16" if p.autocast else ""),
    )  # fmt: skip


def _passes(width: int, dtype: torch.dtype, device: torch.device) -> Iterator[Case]:
    """Yield a reset, compared with an optimizer's step, and the passes of a perturbation."""
    grid, shape = paretoq(2), (width, width)
    scale = grid.init_scale(weights(shape, dtype, device)) * 0.5
    w = avoid_ties(weights(shape, dtype, device), scale, grid)
    sample = Sample("", grid, w, scale)
    (values,) = expected("fake_quantize", sample, sample.args("fake_quantize"))
    common = {"grid": "seq2", "granularity": "per row"}
    tolerance = (2.0**-7 if dtype == torch.bfloat16 else 1e-5,)

    # The weight of the reset is 1: it moves weights onto the grid, so a second reset changes nothing.
    moving = w.clone()
    layer = QuantLinear(width, width, bias=False, config=QuantConfig(bits=2), device=device, dtype=dtype)
    layer.weight.grad, layer.scale.grad = torch.ones_like(w), torch.ones_like(scale)
    adam = torch.optim.AdamW(layer.parameters(), lr=0.0, fused=True)
    calls = [
        Call("reset_", lambda: reset_(moving, scale, grid, 1.0), output="out"),
        Call("AdamW, fused", adam.step, "baseline", unchecked="an optimizer step", graph=False),
    ]
    yield Case("reset", shape, dtype, calls, lambda: (values,), tolerance, 2 * bytes_of(w), **common)  # type: ignore[arg-type]

    # A factor of zero, so that the weight does not change; from the first call on it is in the gradient's memory.
    changed, g, factor = w.clone(), torch.randn_like(w), torch.zeros((), device=device)

    def swap() -> tuple[Tensor, Tensor]:
        perturb_swap_(changed, g, factor)
        return changed, g

    yield Case("perturb and swap", shape, dtype, [Call("perturb_swap_", swap, output="out")],
               lambda: (w.double(), w.double()), (0.0, 0.0),               4 * bytes_of(w))  # fmt: skip
    size, eta = w.double().abs() + 0.01, 0.01
    once = w.double() * size
    norms = torch.stack([once.square().sum(), (once * size).square().sum()])
    yield Case("perturbation norms", shape, dtype, [Call("perturbation_norms", lambda: perturbation_norms(w, w, eta))],
               lambda: (norms,), (1e-5,), 2 * bytes_of(w), variant="ASAM")  # fmt: skip
