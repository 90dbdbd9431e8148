"""Are planted coefficients found again, and do intervals cover them? ``python -m studies.plan_recovery``.

Tables of runs are drawn from a law with known coefficients and noise in the logarithm of the loss, and fitted. Recorded
are how often each interval holds the true value, and how far predicted optimal fractions are from the true ones.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from datetime import datetime, timezone
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from bench.machine import cpu_model, git_state, versions
from qatkernels import files
from qatkernels.plan import LossLaw, fit_loss_law
from qatkernels.plan.law import COEFFICIENTS

#: Coefficients of our own invention whose optima rise from 15% to 40% where the questions are; no fit of anything.
PLANTED = LossLaw(
    alpha=1.4, beta=500, gamma=0.3, zeta=250, eta=0.35, theta=0.35, kappa=0.9, phi=2.0, chi=0.35, psi=0.05, omega=0.3,
    lambda_=40.0, mu=0.35, nu=0.04, xi=0.5, rho=0.06,
)  # fmt: skip
#: N, D and B of the optima that are compared.
QUESTIONS = np.array(list(product((86e6, 759e6), (2.3e9, 1e11, 1.4e12), (1, 2, 4, 6)))).T
DESIGNS: dict[str, dict[str, tuple[float, ...]]] = {
    "small": {
        "params": (86e6, 396e6, 2.2e9), "tokens": (2.3e9, 1e10, 1e11, 1.4e12), "bits": (1, 2, 4, 6),
        "fraction": (0.02, 0.06, 0.15, 0.3, 0.5, 0.75),
    },
    "large": {
        "params": (86e6, 194e6, 396e6, 759e6, 2.2e9), "tokens": (2.3e9, 8e9, 3e10, 1e11, 3e11, 1.4e12),
        "bits": (1, 2, 3, 4, 6), "fraction": (0.01, 0.03, 0.08, 0.15, 0.25, 0.35, 0.5, 0.7, 0.85),
    },
}  # fmt: skip


def table(design: str, noise: float, seed: int, law: LossLaw = PLANTED) -> dict[str, Any]:
    """Return a table of runs, quantized ones and for each size and budget one in full precision.

    Args:
        design: a key of ``DESIGNS``.
        noise: standard deviation of the logarithm of the loss.
        seed: of the noise.
        law: what the losses come from.
    """
    grid = DESIGNS[design]
    rows = [(n, f * d, (1 - f) * d, b)
            for n, d, f, b in product(grid["params"], grid["tokens"], grid["fraction"], grid["bits"])]  # fmt: skip
    rows += [(n, 0.0, d, 16) for n, d in product(grid["params"], grid["tokens"])]
    params, qat, fp, bits = np.array(rows, dtype=np.float64).T
    random = np.random.default_rng(seed).standard_normal(len(params))
    loss = law(params, qat, fp, bits) * np.exp(noise * random)
    return {"params": params, "tokens_qat": qat, "tokens_fp": fp, "bits": bits, "loss": loss}


def study(design: str, repetitions: int, resamples: int, starts: int, noise: float = 0.005) -> dict[str, Any]:
    """Fit tables of different noise and return the coverage of the intervals and the errors of the optima."""
    true = PLANTED.optimal_fraction(*QUESTIONS)
    hits, optimum_hits, errors, runs = np.zeros(16), np.zeros(len(true)), [], 0
    began = time.perf_counter()
    for seed in range(repetitions):
        fit = fit_loss_law(table(design, noise, seed), seed=seed, resamples=resamples, starts=starts)
        runs = fit.runs
        errors.append(np.abs(fit.law.optimal_fraction(*QUESTIONS) - true))
        if resamples:
            limits = np.array([fit.intervals[name] for name in COEFFICIENTS])
            planted = np.array(list(PLANTED.to_dict().values()))
            hits += (limits[:, 0] <= planted) & (planted <= limits[:, 1])
            low, high = fit.interval(lambda law: law.optimal_fraction(*QUESTIONS))
            optimum_hits += (low <= true) & (true <= high)
    off = np.array(errors)
    result: dict[str, Any] = {
        "design": design, "runs": runs, "noise": noise, "repetitions": repetitions, "resamples": resamples,
        "starts": starts, "seconds": round(time.perf_counter() - began, 1),
        "optimum_error": {
            "mean": off.mean(), "p95": float(np.percentile(off, 95)), "max": off.max(),
            "mean_of_worst_question": off.max(1).mean(), "share_within_0.02": float((off <= 0.02).mean()),
        },
    }  # fmt: skip
    if resamples:
        result |= {
            "confidence": 0.9,
            "coverage": dict(zip(COEFFICIENTS, (hits / repetitions).tolist(), strict=True)),
            "coverage_mean": float(hits.mean() / repetitions),
            "optimum_coverage": (optimum_hits / repetitions).tolist(),
            "optimum_coverage_mean": float(optimum_hits.mean() / repetitions),
        }
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Run the study and write its JSON."""
    parser = argparse.ArgumentParser(prog="python -m studies.plan_recovery", description=__doc__)
    parser.add_argument("--repetitions", type=int, default=200)
    parser.add_argument("--resamples", type=int, default=100)
    parser.add_argument("--out", type=Path, default=Path("docs/results/plan-recovery.json"))
    options = parser.parse_args(argv)
    found = {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "cpu": cpu_model(),
        "versions": versions(),
        "git": git_state(),
        "planted": PLANTED.to_dict(),
        "questions": {name: row.tolist() for name, row in zip(("params", "tokens", "bits"), QUESTIONS, strict=True)},
        "true_optima": PLANTED.optimal_fraction(*QUESTIONS).tolist(),
        "studies": [
            study("small", options.repetitions, options.resamples, starts=2),
            study("large", max(options.repetitions // 10, 1), 0, starts=2),
        ],
    }
    files.write_json(options.out, found)
    for one in found["studies"]:
        print({key: value for key, value in one.items() if not isinstance(value, list)})
    return 0


if __name__ == "__main__":
    sys.exit(main())
