"""Hessian-vector products and spectra of the demo's model, compared with one gradient and with other tools."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor

from qatkernels.hessian import spectrum
from qatkernels.trainer.demo_model import ModelConfig

from .. import hessian as tools
from ..case import Call, Case, Missing, Settings, attempt

#: Probes and steps that are timed. Each of the twenty probes of a spectrum costs the same. On a GPU a product with a
#: model of this size takes as long as the host takes to launch its thousands of kernels, and sixty say no more than
#: twenty. The largest eigenvalue has converged by then.
PROBES, STEPS, GPU_STEPS = 1, 60, 20


def cases(settings: Settings) -> Iterator[Callable[[], Case]]:
    """Yield builders of the cases. They are float32 for every --dtype: the only other dtype of products is float64."""
    config = ModelConfig(32, 1, 2, 16, 31) if settings.quick else ModelConfig(context=128)
    problem = cache(lambda: tools.Problem(config, 4 if settings.quick else 16, device=settings.device))
    yield lambda: _product(problem(), settings)
    yield lambda: _spectrum(problem(), settings)


def _product(problem: tools.Problem, settings: Settings) -> Case:
    v = problem.vector()
    kept, fresh = problem.operator(), problem.operator(retain=False)
    forward, saving = problem.operator(engine="forward"), problem.operator(checkpoint=True)
    exact = problem.operator(dtype=torch.float64)
    calls: list[Call | Missing] = [
        Call("gradient", problem.gradient, "baseline", expected=lambda: (exact.gradient(),), graph=False),
        Call("reverse, graph kept", lambda: kept.products([v])[0], graph=False),
        Call("reverse, graph made again", lambda: fresh.products([v])[0], graph=False),
        Call("reverse, checkpointed", lambda: saving.products([v])[0], graph=False),
        Call("forward", lambda: forward.products([v])[0], graph=False),
    ]
    if settings.peers:
        calls += [
            attempt("PyHessian", lambda: _call("PyHessian", tools.pyhessian(problem)[0], v, "graph kept")),
            attempt("hessian-eigenthings", lambda: _call("hessian-eigenthings", tools.eigenthings(problem)[0], v, "")),
            attempt("finite differences", lambda: _differences(problem, v)),
            attempt("curvlinops", lambda: _call("curvlinops", tools.curvlinops(problem)[0], v, "forward over reverse")),
        ]
    # Six matrix products with each weight: a gradient takes three (one is the forward's), and each becomes two.
    return Case(
        "hvp", (problem.n,), torch.float32, calls, lambda: (exact.products([v.double()])[0],), (2e-4,), 8 * problem.n,
        flops=12 * problem.tokens * problem.n, grid="seq2", variant=f"{problem.tokens} tokens",
    )  # fmt: skip


def _call(name: str, times: Callable[[Tensor], Tensor], v: Tensor, note: str) -> Call:
    return Call(name, lambda: times(v), "peer", note=note, graph=False)


def _differences(problem: tools.Problem, v: Tensor) -> Call:
    times, _ = tools.eigenthings(problem, "finite_difference")
    return Call(
        "finite differences", lambda: times(v), "peer", unchecked="differences of a staircase",
        note="of hessian-eigenthings: two gradients; a quantized loss is constant between its steps", graph=False,
    )  # fmt: skip


class Free:
    """A diagonal matrix. Its products cost almost nothing, so only Lanczos' vector work is timed."""

    def __init__(self, n: int, device: torch.device) -> None:
        self.n, self.dtype, self.device = n, torch.float32, device
        self.diagonal = torch.linspace(-0.1, 1, n, device=device)

    def products(self, vectors: list[Tensor]) -> list[Tensor]:
        """Return the diagonal matrix times each vector."""
        return [self.diagonal * v for v in vectors]


def _spectrum(problem: tools.Problem, settings: Settings) -> Case:
    probes, steps = PROBES, 10 if settings.quick else GPU_STEPS if settings.for_gpu else STEPS
    op, small = problem.operator(), problem.operator()
    free = Free(problem.n, problem.device)

    def right(target: Any) -> Callable[[], tuple[Tensor]]:
        return lambda: (torch.tensor([spectrum(target, probes, steps).lambda_max], dtype=torch.float64),)

    def ours(target: Any, **options: Any) -> Callable[[], Tensor]:
        return lambda: torch.tensor([spectrum(target, probes, steps, **options).lambda_max])

    calls: list[Call | Missing] = [
        Call("spectrum", ours(op), graph=False),
        Call("spectrum, bfloat16 basis", ours(small, basis_dtype=torch.bfloat16), graph=False),
        Call("its vector work", ours(free), expected=right(free), graph=False,
             note="Lanczos with products that cost nothing"),
    ]  # fmt: skip
    if settings.peers:
        calls += [
            attempt("hessian-eigenthings", lambda: _eigenthings(problem, probes, steps)),
            attempt("curvlinops", lambda: _curvlinops(problem, probes, steps)),
        ]
    return Case(
        "spectrum", (problem.n,), torch.float32, calls, right(problem.operator(dtype=torch.float64)), (1e-3,),
        4 * problem.n * (steps + 1), flops=probes * steps * 12 * problem.tokens * problem.n, grid="seq2",
        variant=f"{probes} x {steps}, {problem.tokens} tokens",
    )  # fmt: skip


def _eigenthings(problem: tools.Problem, probes: int, steps: int) -> Call:
    from hessian_eigenthings import spectral_density

    times, operator = tools.eigenthings(problem)
    operator.matvec = times

    def run() -> Tensor:
        found = spectral_density(operator, num_runs=probes, lanczos_steps=steps, seed=0)
        return found.raw_eigenvalues.nan_to_num(nan=-torch.inf).max().reshape(1)

    return Call("hessian-eigenthings", run, "peer", note="starts of its own (random signs)", graph=False)


class _Start:
    """An operator with the interface that curvlinops' Lanczos needs."""

    def __init__(self, times: Callable[[Tensor], Tensor], operator: Any) -> None:
        self.times, self.operator = times, operator
        self.shape, self.dtype, self.device = operator.shape, operator.dtype, operator.device

    def __matmul__(self, v: Tensor) -> Tensor:
        return self.times(v)


def _curvlinops(problem: tools.Problem, probes: int, steps: int) -> Call:
    from curvlinops.papyan2020traces.spectrum import fast_lanczos

    operator = _Start(*tools.curvlinops(problem))

    def run() -> Tensor:
        return torch.stack([fast_lanczos(operator, steps)[0].max() for _ in range(probes)]).max().reshape(1)

    note = "starts of its own; its Lanczos does not reorthogonalize"
    return Call("curvlinops", run, "peer", note=note, graph=False)
