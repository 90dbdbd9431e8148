"""Does the fitter of the loss law find planted coefficients, and do its intervals cover them?

Tables of runs are drawn from a law with known coefficients, with noise in the logarithm of the loss, and fitted.
Recorded are how often each interval holds the true value, and how far predicted optimal fractions are from the true
ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from qatkernels.plan import LossLaw, fit_loss_law
from qatkernels.plan.law import COEFFICIENTS

from .results import Case, Figures, Results
from .runner import Session, Study

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


class Trial(NamedTuple):
    """A design, how many tables are fitted, and how; without resamples there are no intervals."""

    design: str
    repetitions: int
    resamples: int
    starts: int = 2
    noise: float = 0.005


SIZES = {
    "cpu": (Trial("small", 200, 100), Trial("large", 20, 0)),
    "smoke": (Trial("small", 1, 2, starts=1),),
}


def run(design: str, repetitions: int, resamples: int, starts: int, noise: float) -> Figures:
    """Fit tables of different noise, and return the coverage of the intervals and the errors of the optima."""
    true = PLANTED.optimal_fraction(*QUESTIONS)
    hits, optimum_hits, errors, runs = np.zeros(16), np.zeros(len(true)), [], 0
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
    figures: Figures = {
        "runs": runs,
        "optimum_error": {
            "mean": float(off.mean()), "p95": float(np.percentile(off, 95)), "max": float(off.max()),
            "mean_of_worst_question": float(off.max(1).mean()), "share_within_0.02": float((off <= 0.02).mean()),
        },
    }  # fmt: skip
    if resamples:
        figures |= {
            "confidence": 0.9,
            "coverage": dict(zip(COEFFICIENTS, (hits / repetitions).tolist(), strict=True)),
            "coverage_mean": float(hits.mean() / repetitions),
            "optimum_coverage": (optimum_hits / repetitions).tolist(),
            "optimum_coverage_mean": float(optimum_hits.mean() / repetitions),
        }
    return figures


def settings(session: Session) -> dict[str, Any]:
    """Return the planted coefficients, the questions and their true answers."""
    return {
        "planted": PLANTED.to_dict(),
        "questions": {name: row.tolist() for name, row in zip(("params", "tokens", "bits"), QUESTIONS, strict=True)},
        "true_optima": PLANTED.optimal_fraction(*QUESTIONS).tolist(),
    }


def cases(session: Session) -> Iterator[Case]:
    """Yield the designs."""
    for trial in session.size:
        yield Case(trial.design, 0, trial._asdict(), partial(run, *trial))


def report(results: Results, folder: Path) -> str:
    """Return the table."""
    lines = [
        "| design | runs | tables | error of the optimum: mean | within 0.02, % | largest "
        "| coverage of coefficients, % | of optima, % |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in results.rows:
        figures, error = row["figures"], row["figures"]["optimum_error"]
        coverage = [f"{100 * figures[name]:.0f}" if name in figures else "-"
                    for name in ("coverage_mean", "optimum_coverage_mean")]  # fmt: skip
        shown = [row["case"], str(figures["runs"]), str(row["settings"]["repetitions"]), f"{error['mean']:.4f}",
                 f"{100 * error['share_within_0.02']:.1f}", f"{error['max']:.4f}", *coverage]  # fmt: skip
        lines.append(f"| {' | '.join(shown)} |")
    return "\n".join(lines)


STUDY = Study("plan_recovery", SIZES, cases, report, settings)
