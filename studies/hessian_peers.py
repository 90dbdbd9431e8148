"""Largest eigenvalue and trace by each Hessian tool on one problem: ``python -m studies.hessian_peers``.

The tools are curvlinops, hessian-eigenthings and PyHessian (bench/requirements-peers.txt); one that is not installed is
listed as missing. The exit code is 1 if one that is there disagrees with us: by more than 1e-3 of the eigenvalue, or by
more than three standard errors of the two traces together.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bench import hessian as tools
from bench.case import Settings, reason
from bench.machine import Machine
from bench.report import RESULTS
from qatkernels.hessian import Estimate, eigs, trace
from qatkernels.trainer.demo_model import ModelConfig

Result = dict[str, Any]


def ours(problem: tools.Problem, samples: int) -> Result:
    """Return our eigenvalue and traces."""
    op = problem.operator()
    top = eigs(op, 1, "largest")
    plus = trace(op, samples, "hutch++")
    return _result(float(top.values[-1]), trace(op, samples)) | {
        "hutch++": plus.to_dict(),
        "residual": float(top.residuals[-1]),
    }


def _result(largest: float, found: Estimate) -> Result:
    return {"lambda_max": largest, "trace": found.to_dict()}


def pyhessian(problem: tools.Problem, samples: int) -> Result:
    """PyHessian's power iteration and Hutchinson estimate."""
    _, computer = tools.pyhessian(problem)
    with tools.sdpa_kernel(tools.SDPBackend.MATH):
        values, _ = computer.eigenvalues(maxIter=500, tol=1e-6)
        found = computer.trace(maxIter=samples, tol=0.0)
    return _result(float(values[0]), Estimate.of(torch.tensor(found, dtype=torch.float64)))


def eigenthings(problem: tools.Problem, samples: int) -> Result:
    """Lanczos and Hutchinson of hessian-eigenthings."""
    from hessian_eigenthings import hutchinson, lanczos

    times, operator = tools.eigenthings(problem)
    operator.matvec = times
    largest = float(lanczos(operator, k=1, max_iter=60, seed=0).eigenvalues.max())
    found = hutchinson(operator, num_samples=samples, seed=0)
    return _result(largest, Estimate(float(found.estimate), float(found.stderr)))


def curvlinops(problem: tools.Problem, samples: int) -> Result:
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
    return _result(largest, Estimate.of(torch.tensor(values, dtype=torch.float64)))


PEERS: dict[str, Callable[[tools.Problem, int], Result]] = {
    "PyHessian": pyhessian, "hessian-eigenthings": eigenthings, "curvlinops": curvlinops,
}  # fmt: skip


def agreement(mine: Result, other: Result) -> Result:
    """Return how far two results are apart, and whether that is close enough."""
    relative = abs(other["lambda_max"] / mine["lambda_max"] - 1)
    difference = abs(other["trace"]["value"] - mine["trace"]["value"])
    sigmas = difference / math.hypot(other["trace"]["error"], mine["trace"]["error"])
    return {"lambda_max_relative": relative, "trace_sigmas": sigmas, "agrees": relative < 1e-3 and sigmas < 3}


def compare(problem: tools.Problem, samples: int) -> dict[str, Result]:
    """Return every tool's result, a peer's with its agreement with ours."""
    results = {"qatkernels": ours(problem, samples)}
    for name, run in PEERS.items():
        try:
            found = run(problem, samples)
        except ImportError as error:
            results[name] = {"missing": reason(error)}
            continue
        results[name] = found | agreement(results["qatkernels"], found)
    return results


def main() -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(prog="python -m studies.hessian_peers", description=__doc__.split("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help="a smaller model")
    parser.add_argument("--samples", type=int, default=100, help="products for each trace (default: 100)")
    parser.add_argument("--out", type=Path, help="JSON file (default: bench/results/hessian-peers-<device>.json)")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    machine = Machine(Settings(device))
    config = ModelConfig(width=64, depth=2, heads=2, context=64) if options.quick else ModelConfig(context=128)
    problem = tools.Problem(config, 4, device=device)
    results = compare(problem, options.samples)
    for name, result in results.items():
        print(f"{name:<20} {result}")
    out = options.out or RESULTS / f"hessian-peers-{machine.slug}.json"
    document = {**machine.describe(), "parameters": problem.n, "tokens": problem.tokens, "results": results}
    out.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n")
    return 1 if any(result.get("agrees") is False for result in results.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
