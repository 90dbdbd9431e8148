"""Fits the coefficients of the loss law to a table of runs.

The objective is the Huber loss of the residuals of ln(loss). The variables are the logarithms of the coefficients,
which keeps coefficients positive. For given exponents (ten) the law is linear in its amplitudes (six). So a start has
random exponents, and the amplitudes that non-negative least squares finds for them.

1. Make random starts, and improve the best ones by iteratively reweighted Levenberg-Marquardt steps.
2. Run L-BFGS from the best of these points.
3. Improve its results by more Levenberg-Marquardt steps, and take the best.

Levenberg-Marquardt steps are vectorised over points, and in the bootstrap over resamples, which start from the fit to
all rows. That makes many starts and a bootstrap affordable.
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

#: Columns that a table of runs must have: N, D_qat, D_fp (tokens), B and the loss.
COLUMNS = ("params", "tokens_qat", "tokens_fp", "bits", "loss")
#: Limits of the exponents; and limits of a term at the mean features, as a fraction of the median loss.
EXPONENT_RANGE, TERM_RANGE = (1e-3, 20.0), (1e-7, 1e2)
_AMPLITUDES = [amplitude for amplitude, _ in TERMS]
_EXPONENTS = [exponent for _, exponents in TERMS for exponent, _ in exponents]
#: Number of random starts; how many of the best starts are improved before L-BFGS; resamples that are fitted together.
_RANDOM_STARTS, _IMPROVED_STARTS, _RESAMPLES_TOGETHER = 128, 32, 32


class FitError(PlanError):
    """A law cannot be fitted to a table of runs; the message says what is missing or wrong."""


@dataclass(frozen=True)
class LossFit:
    """A fitted law, its confidence intervals, and how well it describes the runs.

    Attributes:
        law: the law fitted to all rows.
        intervals: confidence interval of each coefficient, by name; nan without resamples.
        confidence: confidence level of the intervals.
        r2: fraction of the variance of the losses that the law explains.
        optimum_mae: mean absolute difference of predicted and measured optimal fractions. The mean is over the groups
            of runs that have equal params, bits and total tokens and at least three fractions; nan if there is none.
        optima: these groups, with the keys params, tokens, bits, measured, predicted, and edge: whether the best
            measured fraction is the smallest or largest one in the group.
        runs: number of rows.
        ranges: smallest and largest params, tokens (both phases) and bits in the quantized rows.
        undetermined: names of the coefficients that ended at a limit. The table does not determine them.
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
        """Return the confidence interval of a quantity that is computed from a law, such as an optimum.

        Args:
            quantity: computes the quantity from a law; called once per resample.

        Returns:
            Lower and upper limit, each in the shape of the quantity.
        """
        values = np.stack([np.asarray(quantity(_law(logs)), dtype=np.float64) for logs in self.resampled])
        return _limits(values, self.confidence)

    def warn_outside(self, params: float, tokens: float, bits: float) -> None:
        """Give an :class:`ExtrapolationWarning` if an argument is outside of the range of the fitted runs."""
        for (name, (low, high)), value in zip(self.ranges.items(), (params, tokens, bits), strict=True):
            if not low * (1 - 1e-9) <= value <= high * (1 + 1e-9):
                warnings.warn(
                    f"{name} is {value:g}, outside of the {low:g} to {high:g} of the fitted runs: an extrapolation",
                    ExtrapolationWarning, stacklevel=2,
                )  # fmt: skip

    def to_dict(self) -> dict[str, Any]:
        """Return everything except the resamples as JSON-able values; None for what is not known."""
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
    """Read a table of runs from a CSV file with the columns of ``COLUMNS``. Other columns are kept as text.

    Raises:
        FitError: if the file cannot be read, lacks a column, has a value in one of these columns that is not a number,
            or a row has more values than there are columns.
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
    lacking = [name for name in COLUMNS if name not in rows[0]]
    if lacking:
        raise FitError(f"{path} lacks the column {lacking[0]!r}, must have {', '.join(COLUMNS)}")
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
            ``bits`` (ignored in runs without quantization) and ``loss``. Other columns are ignored.
        delta: residual of ln(loss) above which the Huber loss is linear.
        starts: number of starting points of L-BFGS; they are the best of 128.
        resamples: number of bootstrap fits; 0 gives no intervals.
        confidence: confidence level of the intervals.
        seed: seed of the starting points and of the resampling.

    Returns:
        The law, its intervals, and how well it describes the runs.

    Raises:
        FitError: if a column is missing or has another length, a value is out of range, there are not more rows than
            coefficients, or a variable of the law has the same value in all rows.
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
    resampled_points = problem.bootstrap(best, random, resamples)
    law = _law(problem.decode(best))
    resampled = problem.decode(resampled_points.T).T
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
        undetermined=tuple(n for n, limited in zip(COEFFICIENTS, at_limit, strict=True) if limited),
        resampled=resampled,
    )


def measured_optima(runs: Mapping[str, ArrayLike]) -> list[dict[str, float]]:
    """Return the best fraction of each group of runs with equal params, bits and total tokens.

    Runs with the same fraction (other seeds) are averaged. Groups with fewer than three fractions are left out. The
    optimum is the minimum of a parabola through the best fraction and its two neighbours, over the logit of the
    fraction. If the best fraction is the smallest or largest one, it is the optimum itself.
    """
    table = _columns(runs)
    total = table["tokens_qat"] + table["tokens_fp"]
    quantized = (table["tokens_qat"] > 0) & (table["tokens_fp"] > 0)
    keys = np.stack([table["params"], total, table["bits"]], 1)
    optima = []
    for key in np.unique(keys[quantized], axis=0):
        in_group = quantized & (keys == key).all(1)
        fractions, which = np.unique(table["tokens_qat"][in_group] / total[in_group], return_inverse=True)
        if len(fractions) < 3:
            continue
        losses = np.bincount(which, table["loss"][in_group]) / np.bincount(which)
        i = int(losses.argmin())
        edge = i in (0, len(losses) - 1)
        best = fractions[i]
        if not edge:
            logits = np.log(fractions[i - 1 : i + 2]) - np.log1p(-fractions[i - 1 : i + 2])
            a, b, _ = np.polyfit(logits - logits[1], losses[i - 1 : i + 2], 2)
            best = 1 / (1 + math.exp(-(logits[1] - b / (2 * a))))
        optima.append({"params": key[0], "tokens": key[1], "bits": key[2], "measured": float(best), "edge": edge})
    return optima


class _Problem:
    """The runs as a least-squares problem in centred coordinates.

    The coordinates of a point are the logarithms of the exponents, and the logarithms of the terms at the mean
    features. The latter replace the logarithms of the amplitudes, which depend strongly on the exponents.
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
        """Return logarithms of coefficients ``[16, ...]`` from centred coordinates ``[16, ...]``."""
        logs = points.copy()
        for amplitude, exponents in TERMS:
            for exponent, row in exponents:
                logs[amplitude] += np.exp(points[exponent]) * self.centre[row]
        return logs

    def residuals(self, points: Array) -> tuple[Array, Array]:
        """Return the six terms, and the residuals of ln(loss), at points ``[16, *batch]``."""
        parts = terms(self.x, points)
        return parts, np.log(parts.sum(0)) - self.target

    def huber(self, residuals: Array, weights: Array | float = 1.0) -> Array:
        """Return the objective, summed over the runs."""
        size = np.abs(residuals)
        return (weights * np.where(size <= self.delta, 0.5 * size**2, self.delta * (size - 0.5 * self.delta))).sum(-1)

    def objective(self, point: Array) -> tuple[float, Array]:
        """Return the objective and its gradient for L-BFGS, both divided by δ²."""
        parts, residuals = self.residuals(point)
        slope = np.clip(residuals, -self.delta, self.delta) / parts.sum(0)
        return float(self.huber(residuals)) / self.delta**2, jacobian(self.x, point, parts) @ slope / self.delta**2

    def solve(self, random: np.random.Generator, starts: int) -> Array:
        """Return the best point from several starts."""
        points = [self._start(random) for _ in range(_RANDOM_STARTS)]
        improved = self.descend(np.stack(self._best(points, max(_IMPROVED_STARTS, starts))))
        optimize = _scipy_optimize()
        bounds = optimize.Bounds(self.low, self.high)
        options = {"maxiter": 300, "maxcor": 30}
        minima = [
            optimize.minimize(self.objective, point, jac=True, method="L-BFGS-B", bounds=bounds, options=options).x
            for point in self._best(improved, starts)
        ]
        return self._best(self.descend(np.stack(minima), steps=200), 1)[0]

    def _best(self, points: Iterable[Array], count: int) -> list[Array]:
        return sorted(points, key=lambda point: self.objective(point)[0])[:count]

    def _start(self, random: np.random.Generator) -> Array:
        """Return a point with random exponents, and the best amplitudes for them."""
        point = np.zeros(len(COEFFICIENTS))
        point[_EXPONENTS] = np.log(0.4) + 0.8 * random.standard_normal(len(_EXPONENTS))
        loss = np.exp(self.target)
        amplitudes, _ = _scipy_optimize().nnls(terms(self.x, point).T / loss[:, None], np.ones_like(loss))
        point[_AMPLITUDES] = np.log(np.maximum(amplitudes, 1e-4 * np.median(loss)))
        return np.clip(point, self.low, self.high)

    def bootstrap(self, best: Array, random: np.random.Generator, resamples: int) -> Array:
        """Return the points ``[resamples, 16]`` that fit resampled runs best."""
        count = len(self.target)
        fits = [np.empty((0, len(COEFFICIENTS)))]
        for first in range(0, resamples, _RESAMPLES_TOGETHER):
            size = min(_RESAMPLES_TOGETHER, resamples - first)
            weights = random.multinomial(count, np.full(count, 1 / count), size).astype(np.float64)
            fits.append(self.descend(np.repeat(best[None], size, 0), weights))
        return np.concatenate(fits)

    def descend(self, points: Array, weights: Array | None = None, steps: int = 40) -> Array:
        """Return the points that Levenberg-Marquardt steps lead to.

        Each step replaces the Huber loss by weighted squares of the residuals (iterative reweighting). A point stops
        when a step lowers its objective by less than a millionth.

        Args:
            points: starting points ``[R, 16]``.
            weights: weights of the runs ``[R, runs]``; 1 if None.
            steps: largest number of steps.
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
            new_points = np.clip(points[active] - np.clip(move, -1, 1), self.low, self.high)
            new_parts, new_residuals = self.residuals(new_points.T)
            new = self.huber(new_residuals, weights[active])
            better = new < values[active]
            gain = values[active] - new
            improved = active[better]
            points[improved], residuals[improved] = new_points[better], new_residuals[better]
            values[improved], parts[:, improved] = new[better], new_parts[:, better]
            damping[active] = np.clip(np.where(better, damping[active] / 5, damping[active] * 4), 1e-8, 1e8)
            small = (gain < 1e-6 * values[active]) & better
            active = active[~small & (damping[active] < 1e7)]
            if not len(active):
                break
        return points


def _columns(runs: Mapping[str, ArrayLike]) -> dict[str, Array]:
    """Return the columns as arrays of equal length.

    Raises:
        FitError: if a column is missing, has another length, or holds a value that is out of range.
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
            allowed = "finite and at least 0" if name == "tokens_qat" else "finite and positive"
            raise FitError(
                f"column {name} holds {table[name][bad][0]} in row {int(bad.argmax()) + 1}, must be {allowed}"
            )
    return table


def _ranges(table: Mapping[str, Array]) -> dict[str, tuple[float, float]]:
    """Return the smallest and largest params, tokens and bits in the quantized rows."""
    quantized = table["tokens_qat"] > 0
    columns = {"params": table["params"], "tokens": table["tokens_qat"] + table["tokens_fp"], "bits": table["bits"]}
    return {name: (float(values[quantized].min()), float(values[quantized].max())) for name, values in columns.items()}


def _law(logs: Array) -> LossLaw:
    """Return the law with these logarithms of coefficients."""
    return LossLaw(*np.exp(logs).tolist())


def _limits(values: Array, confidence: float) -> tuple[Any, Any]:
    """Return the lower and upper limit of the central ``confidence`` of values, along the first dimension."""
    tail = 50 * (1 - confidence)
    return np.percentile(values, tail, axis=0), np.percentile(values, 100 - tail, axis=0)


def select(runs: Mapping[str, Sequence[Any]], /, **values: Any) -> dict[str, list[Any]]:
    """Return the rows of a table in which each named column has the given value. Values are compared as text."""
    count = len(next(iter(runs.values())))
    rows = [i for i in range(count) if all(str(runs[name][i]) == str(value) for name, value in values.items())]
    return {name: [column[i] for i in rows] for name, column in runs.items()}


def _scipy_optimize() -> Any:
    """Return ``scipy.optimize``. It is imported here because formula and schedules work without scipy."""
    try:
        from scipy import optimize
    except ImportError as error:
        raise missing("fitting a law", "plan", error) from error
    return optimize
