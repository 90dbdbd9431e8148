"""Finding the coefficients of the loss law in a table of runs.

The objective is a Huber loss on residuals of the logarithm of the loss, over the logarithms of the coefficients, which
keeps them positive. Given its ten exponents the law is linear in its six amplitudes; starts are therefore random
exponents with the amplitudes that non-negative least squares gives them. Some iteratively reweighted
Levenberg-Marquardt steps improve the best of them, L-BFGS follows the best of those, and more such steps finish. These
are computed for many points, or for many resamples from the fit to all rows, at a time, which is what makes restarts
and a bootstrap affordable.
"""

from __future__ import annotations

import csv
import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from ..extras import missing
from .formula import Array, ExtrapolationWarning, PlanError
from .law import COEFFICIENTS, TERMS, LossLaw, features, jacobian, terms

#: What a table of runs must have: N, D_qat, D_fp (tokens), B and the loss.
COLUMNS = ("params", "tokens_qat", "tokens_fp", "bits", "loss")
#: Limits of the exponents, and of a term's size where the features have their means, as a share of the median loss.
EXPONENT_RANGE, TERM_RANGE = (1e-3, 20.0), (1e-7, 1e2)
_AMPLITUDES = [amplitude for amplitude, _ in TERMS]
_EXPONENTS = [exponent for _, exponents in TERMS for exponent, _ in exponents]
#: Random starts, how many of the best of them are improved before L-BFGS, and resamples that are fitted at a time.
_SCREENED, _IMPROVED, _AT_ONCE = 128, 32, 32


class FitError(PlanError):
    """A table of runs cannot be fitted; the message says what it lacks."""


@dataclass(frozen=True)
class LossFit:
    """A fitted law and what is known about it.

    Attributes:
        law: the fit to all rows.
        intervals: a confidence interval of each coefficient, by name; nan without resamples.
        confidence: the level of the intervals.
        r2: share of the variance of the losses that the law explains.
        optimum_mae: mean absolute difference of predicted and measured optimal fractions, over the groups of runs with
            equal params, bits and total tokens and at least three fractions; nan without such groups.
        optima: the groups: params, tokens, bits, measured, predicted and (whether the best of the measured is the
            smallest or largest fraction tried) edge.
        runs: number of rows.
        ranges: smallest and largest params, tokens (both phases) and bits among the quantized rows.
        undetermined: coefficients that ended at a limit: the table does not say what they are.
        resampled: logarithms of the coefficients of each resample, ``[resamples, 16]``.
    """

    law: LossLaw
    intervals: dict[str, tuple[float, float]]
    confidence: float
    r2: float
    optimum_mae: float
    optima: list[dict[str, float]]
    runs: int
    ranges: dict[str, tuple[float, float]]
    undetermined: tuple[str, ...]
    resampled: Array = field(repr=False)

    def interval(self, quantity: Callable[[LossLaw], ArrayLike]) -> tuple[Any, Any]:
        """Return the limits of the confidence interval of anything that follows from a law, such as an optimum.

        Args:
            quantity: called with the law of each resample.

        Returns:
            Lower and upper limit, in the shape of what ``quantity`` returns.
        """
        values = np.stack([np.asarray(quantity(_law(logs)), dtype=np.float64) for logs in self.resampled])
        return _limits(values, self.confidence)

    def warn_outside(self, params: float, tokens: float, bits: float) -> None:
        """Warn with an :class:`ExtrapolationWarning` if a question is outside of the runs that were fitted."""
        for (name, (low, high)), value in zip(self.ranges.items(), (params, tokens, bits), strict=True):
            if not low * (1 - 1e-9) <= value <= high * (1 + 1e-9):
                warnings.warn(
                    f"{name} is {value:g}, outside of the {low:g} to {high:g} of the fitted runs: an extrapolation",
                    ExtrapolationWarning, stacklevel=2,
                )  # fmt: skip

    def to_dict(self) -> dict[str, Any]:
        """Return everything but the resamples, fit for JSON: None is what is not known."""
        return {
            "coefficients": self.law.to_dict(),
            "intervals": {
                name: None if math.isnan(limits[0]) else list(limits) for name, limits in self.intervals.items()
            },
            "confidence": self.confidence,
            "r2": self.r2,
            "optimum_mae": None if math.isnan(self.optimum_mae) else self.optimum_mae,
            "optima": self.optima,
            "runs": self.runs,
            "ranges": {name: list(limits) for name, limits in self.ranges.items()},
            "undetermined": list(self.undetermined),
        }


def read_runs(path: str | Path) -> dict[str, list[Any]]:
    """Read a table of runs from a CSV file with at least the columns of ``COLUMNS``; others are kept as text.

    Raises:
        FitError: if the file cannot be read, lacks a column, holds something that is not a number in one, or a row has
            more values than there are columns.
    """
    try:
        with open(path, newline="") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise FitError(f"{path} cannot be read: {error}") from error
    if not rows:
        raise FitError(f"{path} holds no runs")
    for number, row in enumerate(rows, start=1):
        if None in row:
            raise FitError(f"{path} has {len(row[None])} more values in row {number} than columns")
    missing = [name for name in COLUMNS if name not in rows[0]]
    if missing:
        raise FitError(f"{path} lacks the column {missing[0]!r}, must have {', '.join(COLUMNS)}")
    table: dict[str, list[Any]] = {name: [row[name] for row in rows] for name in rows[0]}
    for name in COLUMNS:
        try:
            table[name] = [float(value) for value in table[name]]
        except (TypeError, ValueError) as error:
            raise FitError(f"{path}, column {name}: {error}") from error
    return table


def fit_loss_law(
    runs: Mapping[str, ArrayLike], *, delta: float = 1e-3, starts: int = 8, resamples: int = 200,
    confidence: float = 0.9, seed: int = 0,
) -> LossFit:  # fmt: skip
    """Fit a :class:`LossLaw` to a table of runs.

    Args:
        runs: columns of equal length: ``params``, ``tokens_qat`` (0 in runs without quantization), ``tokens_fp``,
            ``bits`` (not read in those) and ``loss``; others are ignored.
        delta: residual of the logarithm of the loss beyond which the Huber loss is linear.
        starts: how many starting points, the best of 128, L-BFGS follows.
        resamples: bootstrap fits; 0 gives no intervals.
        confidence: level of the intervals.
        seed: of the starting points and of the resampling.

    Returns:
        The law, its intervals, and how well it describes the runs.

    Raises:
        FitError: if a column is missing or of another length, a value is out of range, or the rows are fewer than the
            coefficients or do not vary in what the law depends on.
        PlanError: if an option is out of range.
    """
    if not (delta > 0 and starts >= 1 and resamples >= 0 and 0 < confidence < 1 and seed >= 0):
        raise PlanError(
            f"delta is {delta}, starts {starts}, resamples {resamples}, confidence {confidence}, seed {seed}; "
            "must be positive, at least 1, at least 0, in (0, 1) and at least 0"
        )
    table = _columns(runs)
    problem = _Problem(table, delta)
    random = np.random.default_rng(seed)
    best = problem.solve(random, starts)
    drawn = problem.bootstrap(best, random, resamples)
    law = _law(problem.decode(best))
    resampled = problem.decode(drawn.T).T
    low, high = _limits(resampled, confidence) if resamples else (np.full(16, np.nan), np.full(16, np.nan))
    loss = table["loss"]
    predicted = law(table["params"], table["tokens_qat"], table["tokens_fp"], table["bits"])
    optima = measured_optima(table)
    for group in optima:
        group["predicted"] = law.optimal_fraction(group["params"], group["tokens"], group["bits"])
    errors = [abs(group["predicted"] - group["measured"]) for group in optima]
    at_limit = (best - problem.low < 1e-6) | (problem.high - best < 1e-6)
    return LossFit(
        law=law,
        intervals={n: (math.exp(a), math.exp(b)) for n, a, b in zip(COEFFICIENTS, low, high, strict=True)},
        confidence=confidence,
        r2=float(1 - ((loss - predicted) ** 2).sum() / ((loss - loss.mean()) ** 2).sum()),
        optimum_mae=float(np.mean(errors)) if errors else math.nan,
        optima=optima,
        runs=len(loss),
        ranges=_ranges(table),
        undetermined=tuple(n for n, hit in zip(COEFFICIENTS, at_limit, strict=True) if hit),
        resampled=resampled,
    )


def measured_optima(runs: Mapping[str, ArrayLike]) -> list[dict[str, float]]:
    """Return the best fraction of each group of runs with equal params, bits and total tokens.

    Runs of equal fraction (other seeds) are averaged. The optimum is that of the parabola in the logit of the fraction
    through the best of at least three and its neighbours, or the best one itself where that is the first or last.
    """
    table = _columns(runs)
    total = table["tokens_qat"] + table["tokens_fp"]
    quantized = (table["tokens_qat"] > 0) & (table["tokens_fp"] > 0)
    keys = np.stack([table["params"], total, table["bits"]], 1)
    found = []
    for key in np.unique(keys[quantized], axis=0):
        mine = quantized & (keys == key).all(1)
        fractions, which = np.unique(table["tokens_qat"][mine] / total[mine], return_inverse=True)
        if len(fractions) < 3:
            continue
        losses = np.bincount(which, table["loss"][mine]) / np.bincount(which)
        i = int(losses.argmin())
        edge = i in (0, len(losses) - 1)
        best = fractions[i]
        if not edge:
            logits = np.log(fractions[i - 1 : i + 2]) - np.log1p(-fractions[i - 1 : i + 2])
            a, b, _ = np.polyfit(logits - logits[1], losses[i - 1 : i + 2], 2)
            best = 1 / (1 + math.exp(-(logits[1] - b / (2 * a))))
        found.append({"params": key[0], "tokens": key[1], "bits": key[2], "measured": float(best), "edge": edge})
    return found


class _Problem:
    """The runs as a least-squares problem in centred coordinates.

    Those are logarithms of the terms where the features have their means, instead of logarithms of the amplitudes,
    which every change of an exponent would drag along.
    """

    def __init__(self, table: Mapping[str, Array], delta: float) -> None:
        x = features(table["params"], table["tokens_qat"], table["tokens_fp"], table["bits"])
        quantized = x[5] > 0
        self._check(x, quantized)
        if len(np.unique(table["loss"])) < 2:
            raise FitError("the loss of the runs must take at least two values")
        self.centre = np.concatenate([x[:2].mean(1), x[2:5, quantized].mean(1)])
        self.x = np.concatenate([x[:5] - self.centre[:, None], x[5:]])
        self.target, self.delta = np.log(table["loss"]), delta
        self.low, self.high = np.full((2, len(COEFFICIENTS)), np.log(EXPONENT_RANGE)[:, None])
        self.low[_AMPLITUDES], self.high[_AMPLITUDES] = (np.median(self.target) + np.log(TERM_RANGE))[:, None]

    @staticmethod
    def _check(x: Array, quantized: Array) -> None:
        if x.shape[1] < len(COEFFICIENTS) + 1:
            raise FitError(f"there are {x.shape[1]} runs, must be more than the {len(COEFFICIENTS)} coefficients")
        for values, name in ((x[0], "tokens"), (x[1], "params"), (x[2, quantized], "bits of quantized runs"),
                             (x[3, quantized] - x[4, quantized], "fraction of quantized tokens")):  # fmt: skip
            if len(np.unique(np.round(values, 9))) < 2:
                raise FitError(f"the {name} of the runs must take at least two values")

    def decode(self, points: Array) -> Array:
        """Return logarithms of coefficients from centred ones, ``[16, ...]`` both."""
        logs = points.copy()
        for amplitude, exponents in TERMS:
            for exponent, row in exponents:
                logs[amplitude] += np.exp(points[exponent]) * self.centre[row]
        return logs

    def residuals(self, points: Array) -> tuple[Array, Array]:
        """Return the six terms and the residuals of the logarithm at points ``[16, *batch]``."""
        parts = terms(self.x, points)
        return parts, np.log(parts.sum(0)) - self.target

    def huber(self, residuals: Array, weights: Array | float = 1.0) -> Array:
        """Return the objective, summed over the runs."""
        size = np.abs(residuals)
        return (weights * np.where(size <= self.delta, 0.5 * size**2, self.delta * (size - 0.5 * self.delta))).sum(-1)

    def objective(self, point: Array) -> tuple[float, Array]:
        """Return the objective and its gradient, for L-BFGS, in units of δ²."""
        parts, residuals = self.residuals(point)
        slope = np.clip(residuals, -self.delta, self.delta) / parts.sum(0)
        return float(self.huber(residuals)) / self.delta**2, jacobian(self.x, point, parts) @ slope / self.delta**2

    def solve(self, random: np.random.Generator, starts: int) -> Array:
        """Return the best point found from several starts."""
        points = [self._start(random) for _ in range(_SCREENED)]
        improved = self.descend(np.stack(self._best(points, max(_IMPROVED, starts))))
        optimize = _scipy_optimize()
        bounds = optimize.Bounds(self.low, self.high)
        options = {"maxiter": 300, "maxcor": 30}
        found = [
            optimize.minimize(self.objective, point, jac=True, method="L-BFGS-B", bounds=bounds, options=options).x
            for point in self._best(improved, starts)
        ]
        return self._best(self.descend(np.stack(found), steps=200), 1)[0]

    def _best(self, points: Iterable[Array], count: int) -> list[Array]:
        return sorted(points, key=lambda point: self.objective(point)[0])[:count]

    def _start(self, random: np.random.Generator) -> Array:
        """Return random exponents with the best amplitudes for them."""
        point = np.zeros(len(COEFFICIENTS))
        point[_EXPONENTS] = np.log(0.4) + 0.8 * random.standard_normal(len(_EXPONENTS))
        loss = np.exp(self.target)
        amplitudes, _ = _scipy_optimize().nnls(terms(self.x, point).T / loss[:, None], np.ones_like(loss))
        point[_AMPLITUDES] = np.log(np.maximum(amplitudes, 1e-4 * np.median(loss)))
        return np.clip(point, self.low, self.high)

    def bootstrap(self, best: Array, random: np.random.Generator, resamples: int) -> Array:
        """Return the points of fits to resampled runs, ``[resamples, 16]``."""
        count = len(self.target)
        found = [np.empty((0, len(COEFFICIENTS)))]
        for first in range(0, resamples, _AT_ONCE):
            size = min(_AT_ONCE, resamples - first)
            weights = random.multinomial(count, np.full(count, 1 / count), size).astype(np.float64)
            found.append(self.descend(np.repeat(best[None], size, 0), weights))
        return np.concatenate(found)

    def descend(self, points: Array, weights: Array | None = None, steps: int = 40) -> Array:
        """Return where Levenberg-Marquardt steps lead from ``points [R, 16]`` with weights ``[R, runs]`` of the runs.

        The Huber loss is a weighted square of each step's residuals. A problem whose objective no longer falls by a
        millionth is left alone.
        """
        points, damping, active = points.copy(), np.full(len(points), 1e-2), np.arange(len(points))
        weights = np.ones((len(points), len(self.target))) if weights is None else weights
        parts, residuals = self.residuals(points.T)
        values = self.huber(residuals, weights)
        for _ in range(steps):
            slope = jacobian(self.x, points[active].T, parts[:, active]) / parts[:, active].sum(0)
            slope = slope.transpose(1, 0, 2)
            r = residuals[active]
            robust = weights[active] * np.minimum(1, self.delta / np.maximum(np.abs(r), 1e-300))
            weighted = slope * robust[:, None]
            normal, gradient = weighted @ slope.transpose(0, 2, 1), (weighted @ r[..., None])[..., 0]
            diagonal = np.einsum("rii->ri", normal)
            ridge = damping[active, None] * diagonal + 1e-12 * diagonal.max(1, keepdims=True) + 1e-300
            move = np.linalg.solve(normal + ridge[:, :, None] * np.eye(len(COEFFICIENTS)), gradient[..., None])[..., 0]
            tried = np.clip(points[active] - np.clip(move, -1, 1), self.low, self.high)
            new_parts, new_residuals = self.residuals(tried.T)
            new = self.huber(new_residuals, weights[active])
            better = new < values[active]
            gain = values[active] - new
            won = active[better]
            points[won], residuals[won], values[won] = tried[better], new_residuals[better], new[better]
            parts[:, won] = new_parts[:, better]
            damping[active] = np.clip(np.where(better, damping[active] / 5, damping[active] * 4), 1e-8, 1e8)
            small = (gain < 1e-6 * values[active]) & better
            active = active[~small & (damping[active] < 1e7)]
            if not len(active):
                break
        return points


def _columns(runs: Mapping[str, ArrayLike]) -> dict[str, Array]:
    """Return the columns as arrays of equal length.

    Raises:
        FitError: if one is missing, of another length, or out of range.
    """
    table: dict[str, Array] = {}
    for name in COLUMNS:
        if name not in runs:
            raise FitError(f"the runs lack the column {name!r}, must have {', '.join(COLUMNS)}")
        try:
            table[name] = np.asarray(runs[name], dtype=np.float64)
        except (TypeError, ValueError) as error:
            raise FitError(f"column {name}: {error}") from error
        if table[name].ndim != 1 or len(table[name]) != len(table["params"]):
            raise FitError(f"column {name} has shape {table[name].shape}, must be [{len(table['params'])}]")
        bad = ~np.isfinite(table[name]) | (table[name] < 0) | ((table[name] == 0) & (name != "tokens_qat"))
        if bad.any():
            raise FitError(f"column {name} holds {table[name][bad][0]} in row {int(bad.argmax()) + 1}")
    return table


def _ranges(table: Mapping[str, Array]) -> dict[str, tuple[float, float]]:
    mine = table["tokens_qat"] > 0
    known = {"params": table["params"], "tokens": table["tokens_qat"] + table["tokens_fp"], "bits": table["bits"]}
    return {name: (float(values[mine].min()), float(values[mine].max())) for name, values in known.items()}


def _law(logs: Array) -> LossLaw:
    return LossLaw(*np.exp(logs).tolist())


def _limits(values: Array, confidence: float) -> tuple[Any, Any]:
    """Return the central percentiles over the first dimension."""
    tail = 50 * (1 - confidence)
    return np.percentile(values, tail, axis=0), np.percentile(values, 100 - tail, axis=0)


def select(runs: Mapping[str, Sequence[Any]], **wanted: Any) -> dict[str, list[Any]]:
    """Return the rows of a table whose columns have the given values, compared as text."""
    count = len(next(iter(runs.values())))
    kept = [i for i in range(count) if all(str(runs[name][i]) == str(value) for name, value in wanted.items())]
    return {name: [column[i] for i in kept] for name, column in runs.items()}


def _scipy_optimize() -> Any:
    """Return scipy's optimizers. Imported here, since formula and schedules are of use without them."""
    try:
        from scipy import optimize
    except ImportError as error:
        raise missing("fitting a law", "plan", error) from error
    return optimize
