"""Largest eigenvalue and trace by each Hessian tool on one problem.

The tools are curvlinops, hessian-eigenthings and PyHessian (bench/requirements-peers.txt); one that is not installed is
left out. The table says whether a tool agrees with ours: within 1e-3 of the eigenvalue, and within three standard
errors of the two traces together.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bench import hessian as tools
from bench.case import reason
from qatkernels.hessian import Estimate, eigs, trace
from qatkernels.trainer.demo_model import ModelConfig

from .results import Case, Figures, Results
from .runner import Session, Study, UnavailableError


class Size(NamedTuple):
    """A size of the study: the model, windows in the batch, and products for each trace."""

    model: ModelConfig
    windows: int = 4
    samples: int = 100


SIZES = {
    "cpu": Size(ModelConfig(width=64, depth=2, heads=2, context=64)),
    "large": Size(ModelConfig(context=128)),
    "smoke": Size(ModelConfig(width=16, depth=1, heads=2, context=8), 2, 8),
}


@functools.cache
def problem_of(size: Size) -> tools.Problem:
    """Return the problem, on the GPU where there is one."""
    return tools.Problem(size.model, size.windows, device=torch.device("cuda" if torch.cuda.is_available() else "cpu"))


def ours(problem: tools.Problem, samples: int) -> Figures:
    """Our eigenvalue and traces."""
    op = problem.operator()
    top = eigs(op, 1, "largest")
    plus = trace(op, samples, "hutch++")
    return _figures(float(top.values[-1]), trace(op, samples)) | {
        "hutch++": plus.to_dict(),
        "residual": float(top.residuals[-1]),
    }


def _figures(largest: float, found: Estimate) -> Figures:
    return {"lambda_max": largest, "trace": found.to_dict()}


def pyhessian(problem: tools.Problem, samples: int) -> Figures:
    """PyHessian's power iteration and Hutchinson estimate."""
    _, computer = tools.pyhessian(problem)
    with tools.sdpa_kernel(tools.SDPBackend.MATH):
        values, _ = computer.eigenvalues(maxIter=500, tol=1e-6)
        found = computer.trace(maxIter=samples, tol=0.0)
    return _figures(float(values[0]), Estimate.of(torch.tensor(found, dtype=torch.float64)))


def eigenthings(problem: tools.Problem, samples: int) -> Figures:
    """Lanczos and Hutchinson of hessian-eigenthings."""
    from hessian_eigenthings import hutchinson, lanczos

    times, operator = tools.eigenthings(problem)
    operator.matvec = times
    largest = float(lanczos(operator, k=1, max_iter=60, seed=0).eigenvalues.max())
    found = hutchinson(operator, num_samples=samples, seed=0)
    return _figures(largest, Estimate(float(found.estimate), float(found.stderr)))


def curvlinops(problem: tools.Problem, samples: int) -> Figures:
    """Scipy's eigsh, as curvlinops' documentation does, and sampled products for the trace."""
    import numpy as np
    from scipy.sparse.linalg import LinearOperator, eigsh

    times, _ = tools.curvlinops(problem)

    def multiply(v: Any) -> Any:
        return times(torch.from_numpy(np.ascontiguousarray(v)).float().to(problem.device)).cpu().numpy()

    shape = (problem.n, problem.n)
    largest = float(
        eigsh(LinearOperator(shape, multiply, dtype=np.float32), 1, which="LA", return_eigenvectors=False)[0]
    )
    generator = torch.Generator().manual_seed(5)
    values = []
    for _ in range(samples):
        z = (torch.randint(0, 2, (problem.n,), generator=generator) * 2.0 - 1).to(problem.device)
        values.append(float((z.double() * times(z).double()).sum()))
    return _figures(largest, Estimate.of(torch.tensor(values, dtype=torch.float64)))


TOOLS: dict[str, Callable[[tools.Problem, int], Figures]] = {
    "qatkernels": ours, "PyHessian": pyhessian, "hessian-eigenthings": eigenthings, "curvlinops": curvlinops,
}  # fmt: skip


def settings(session: Session) -> dict[str, Any]:
    """Return the size of the problem."""
    problem = problem_of(session.size)
    return {"parameters": problem.n, "tokens": problem.tokens, "samples": session.size.samples}


def cases(session: Session) -> Iterator[Case]:
    """Yield the tools."""
    for name in TOOLS:
        yield Case(name, 0, {}, partial(run, session.size, name))


def run(size: Size, name: str) -> Figures:
    """Return what a tool finds.

    Raises:
        UnavailableError: if it is not installed.
    """
    try:
        return TOOLS[name](problem_of(size), size.samples)
    except ImportError as error:
        raise UnavailableError(reason(error)) from error


def agreement(mine: Figures, other: Figures) -> tuple[float, float, bool]:
    """Return how far two results are apart (relative, and in standard errors), and whether that is close enough."""
    relative = abs(other["lambda_max"] / mine["lambda_max"] - 1)
    difference = abs(other["trace"]["value"] - mine["trace"]["value"])
    sigmas = difference / math.hypot(other["trace"]["error"], mine["trace"]["error"])
    return relative, sigmas, relative < 1e-3 and sigmas < 3


def report(results: Results, folder: Path) -> str:
    """Return the table."""
    found = {row["case"]: row["figures"] for row in results.rows}
    samples = results.study["settings"]["samples"]
    lines = [
        f"| | largest eigenvalue | relative difference | trace, {samples} products | agrees |",
        "|---|---|---|---|---|",
    ]
    for name, figures in found.items():
        shown = [name, f"{figures['lambda_max']:.6f}", "", _trace(figures["trace"]), ""]
        if name != "qatkernels" and "qatkernels" in found:
            relative, _, agrees = agreement(found["qatkernels"], figures)
            shown[2], shown[4] = f"{relative:.1e}", "yes" if agrees else "NO"
        lines.append(f"| {' | '.join(shown)} |")
        if "hutch++" in figures:
            lines.append(f"| {name}, Hutch++ | | | {_trace(figures['hutch++'])} | |")
    return "\n".join(lines)


def _trace(found: dict[str, float]) -> str:
    return f"{found['value']:.1f} ± {found['error']:.1f}"


STUDY = Study("hessian_peers", SIZES, cases, report, settings)
