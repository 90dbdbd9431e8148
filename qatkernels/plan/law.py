"""The loss as a function of parameters, tokens in each phase and bit width, and its minimum over the QAT fraction."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from .formula import Array, PlanError, as_positive, scalar_as_float, tokens_per_parameter_byte

_LN2 = math.log(2.0)


@dataclass(frozen=True)
class LossLaw:
    """L = α + β/D^γ + ζ/N^η + θ·2^(−κB) + φ·2^(−χB)/(N^ψ·S_qat^ω) + λ·2^(−μB)/(N^ν·S_fp^ξ·S_qat^ρ).

    N are parameters, D = D_qat + D_fp tokens, B bits, and S_x = D_x / (N·B/8) tokens per byte of weights. The last
    three terms have the form of *Compute-Optimal Quantization-Aware Training*. The first three are Chinchilla's (our
    choice), and only they remain without a quantized phase (D_qat = 0). The unit of the loss is that of the fitted
    runs. The paper's own coefficients are not public, so there are no defaults: `fit_loss_law` finds the coefficients.

    Attributes:
        alpha: α, irreducible loss.
        beta: β, amplitude of the term that falls with tokens; loss · tokens^γ.
        gamma: γ, exponent of the tokens.
        zeta: ζ, amplitude of the term that falls with parameters; loss · parameters^η.
        eta: η, exponent of the parameters.
        theta: θ, amplitude of the loss from quantization that no training removes; its value at B = 0.
        kappa: κ, its halvings per bit.
        phi: φ, amplitude of the loss from a short quantized phase.
        chi: χ, its halvings per bit.
        psi: ψ, its exponent of the parameters.
        omega: ω, its exponent of S_qat.
        lambda_: λ, amplitude of the interaction of both phases.
        mu: μ, its halvings per bit.
        nu: ν, its exponent of the parameters.
        xi: ξ, its exponent of S_fp.
        rho: ρ, its exponent of S_qat.

    Raises:
        PlanError: if a coefficient is not positive and finite.
    """

    alpha: float
    beta: float
    gamma: float
    zeta: float
    eta: float
    theta: float
    kappa: float
    phi: float
    chi: float
    psi: float
    omega: float
    lambda_: float
    mu: float
    nu: float
    xi: float
    rho: float

    def __post_init__(self) -> None:
        for name in COEFFICIENTS:
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise PlanError(f"{name} is {value}, must be positive and finite")

    def __call__(self, params: ArrayLike, tokens_qat: ArrayLike, tokens_fp: ArrayLike, bits: ArrayLike) -> Any:
        """Return the loss.

        Args:
            params: N, parameters; all arguments broadcast.
            tokens_qat: D_qat, quantized tokens; 0 for training in full precision only.
            tokens_fp: D_fp, tokens in full precision before them.
            bits: B, bits of a weight; ignored where ``tokens_qat`` is 0.

        Returns:
            The loss; a float if all arguments are numbers.

        Raises:
            PlanError: if an argument is negative or not finite, or ``tokens_fp`` is 0.
        """
        return scalar_as_float(terms(features(params, tokens_qat, tokens_fp, bits), self.log_coefficients()).sum(0))

    def gradient(self, params: ArrayLike, tokens_qat: ArrayLike, tokens_fp: ArrayLike, bits: ArrayLike) -> Array:
        """Return the derivative of the loss with respect to each coefficient, ``[..., 16]``, as in ``COEFFICIENTS``."""
        x, logs = features(params, tokens_qat, tokens_fp, bits), self.log_coefficients()
        return np.moveaxis(jacobian(x, logs, terms(x, logs)), 0, -1) / np.exp(logs)

    def log_coefficients(self) -> Array:
        """Return the natural logarithms of the coefficients, ``[16]``."""
        return np.log([getattr(self, name) for name in COEFFICIENTS])

    def at_fraction(self, params: ArrayLike, tokens: ArrayLike, bits: ArrayLike, fraction: ArrayLike) -> Any:
        """Return the loss of a training with ``tokens`` (D, both phases), of which ``fraction`` are quantized."""
        f = np.asarray(fraction, dtype=np.float64)
        if not ((f > 0) & (f < 1)).all():
            raise PlanError(f"fraction is {fraction!r}, must be in (0, 1)")
        d = as_positive("tokens", tokens)
        return self(params, f * d, (1 - f) * d, bits)

    def optimal_fraction(self, params: ArrayLike, tokens: ArrayLike, bits: ArrayLike) -> Any:
        """Return f*, the fraction of quantized tokens with the smallest loss.

        f* minimises A·f^(−ω) + C·(1−f)^(−ξ)·f^(−ρ), where A and C are the values of the last two terms with D tokens in
        each phase. There is one minimum, above ρ/(ρ+ξ). Bisection finds it to machine precision.

        Args:
            params: N, parameters.
            tokens: D, tokens of both phases.
            bits: B, bits of a weight.

        Returns:
            f* in (0, 1); a float if all arguments are numbers.

        Raises:
            PlanError: if an argument is not positive and finite.
        """
        n, b = as_positive("params", params), as_positive("bits", bits)
        ln_s = np.log(tokens_per_parameter_byte(n, tokens, b))
        log_ratio = math.log(self.phi) - math.log(self.lambda_) + math.log(self.omega) - np.asarray(
            (self.chi - self.mu) * b * _LN2 + (self.psi - self.nu) * np.log(n)
            + (self.omega - self.xi - self.rho) * ln_s
        )  # fmt: skip
        # log_ratio is ln(A·ω/C). Bisect the logit of f, from that of ρ/(ρ+ξ) up.
        low = np.full(np.shape(log_ratio), math.log(self.rho) - math.log(self.xi))
        high = np.maximum(low, 0) + np.abs(log_ratio) + 60.0
        for _ in range(80):
            middle = 0.5 * (low + high)
            loss_falls = log_ratio > _log_ratio_of_optimum(middle, self.omega, self.xi, self.rho)
            low, high = np.where(loss_falls, middle, low), np.where(loss_falls, high, middle)
        # f* is above ρ/(ρ+ξ). Rounding may put it below, and then ρ/(ρ+ξ) is the nearest float64 that is not.
        return scalar_as_float(np.maximum(1 / (1 + np.exp(-0.5 * (low + high))), self.rho / (self.rho + self.xi)))

    def minimum(self, params: ArrayLike, tokens: ArrayLike, bits: ArrayLike) -> Any:
        """Return the loss at the best fraction."""
        f = np.minimum(self.optimal_fraction(params, tokens, bits), 1 - 1e-16)
        return self.at_fraction(params, tokens, bits, f)

    def to_dict(self) -> dict[str, float]:
        """Return the coefficients by name."""
        return {name: getattr(self, name) for name in COEFFICIENTS}

    @classmethod
    def from_dict(cls, values: Mapping[str, float]) -> LossLaw:
        """Return the law that :meth:`to_dict` was called on.

        Raises:
            PlanError: if a coefficient is missing, unknown or not positive.
        """
        if set(values) != set(COEFFICIENTS):
            raise PlanError(f"coefficients are {sorted(values)}, must be {sorted(COEFFICIENTS)}")
        return cls(**{name: float(value) for name, value in values.items()})


#: Names of the coefficients, in the order of arrays of coefficients.
COEFFICIENTS = tuple(entry.name for entry in fields(LossLaw))
(_ALPHA, _BETA, _GAMMA, _ZETA, _ETA, _THETA, _KAPPA, _PHI, _CHI, _PSI, _OMEGA, _LAMBDA, _MU, _NU, _XI, _RHO) = range(16)

#: For each term: the index of its amplitude; and for each of its exponents, the index of the exponent and the row of
#: the features that it multiplies.
TERMS: tuple[tuple[int, tuple[tuple[int, int], ...]], ...] = (
    (_ALPHA, ()),
    (_BETA, ((_GAMMA, 0),)),
    (_ZETA, ((_ETA, 1),)),
    (_THETA, ((_KAPPA, 2),)),
    (_PHI, ((_CHI, 2), (_PSI, 1), (_OMEGA, 3))),
    (_LAMBDA, ((_MU, 2), (_NU, 1), (_XI, 4), (_RHO, 3))),
)


def features(params: ArrayLike, tokens_qat: ArrayLike, tokens_fp: ArrayLike, bits: ArrayLike) -> Array:
    """Return ln D, ln N, B·ln 2, ln S_qat, ln S_fp and whether a run is quantized, ``[6, ...]``.

    Raises:
        PlanError: if an argument is out of range.
    """
    n, fp = as_positive("params", params), as_positive("tokens_fp", tokens_fp)
    qat = np.asarray(tokens_qat, dtype=np.float64)
    if not (np.isfinite(qat) & (qat >= 0)).all():
        raise PlanError(f"tokens_qat is {tokens_qat!r}, must be finite and at least 0")
    quantized = qat > 0
    b = as_positive("bits", np.where(quantized, bits, 1.0))
    n, qat, fp, b, quantized = np.broadcast_arrays(n, qat, fp, b, quantized)
    size = np.log(n * (b / 8))
    s_qat = np.where(quantized, np.log(np.where(quantized, qat, 1.0)) - size, 0.0)
    return np.stack([np.log(qat + fp), np.log(n), b * _LN2, s_qat, np.log(fp) - size, quantized.astype(np.float64)])


def terms(x: Array, logs: Array) -> Array:
    """Return the six terms of the law, ``[6, *batch, ...]``.

    Args:
        x: :func:`features` ``[6, ...]``.
        logs: logarithms of the coefficients, ``[16, *batch]``.
    """
    broadcastable = logs.reshape(logs.shape + (1,) * (x.ndim - 1))
    values = np.exp(broadcastable)
    result = np.empty((len(TERMS), *logs.shape[1:], *x.shape[1:]))
    for i, (amplitude, exponents) in enumerate(TERMS):
        result[i] = broadcastable[amplitude]
        for exponent, row in exponents:
            result[i] -= values[exponent] * x[row]
    np.exp(result, out=result)
    result[3:] *= x[5]
    return result


def jacobian(x: Array, logs: Array, parts: Array) -> Array:
    """Return the derivative of the loss with respect to the logarithm of each coefficient, ``[16, *batch, ...]``.

    Args:
        x: :func:`features`.
        logs: logarithms of the coefficients.
        parts: the result of :func:`terms` for ``x`` and ``logs``.
    """
    values = np.exp(logs.reshape(logs.shape + (1,) * (x.ndim - 1)))
    result = np.empty((len(COEFFICIENTS), *parts.shape[1:]))
    for part, (amplitude, exponents) in zip(parts, TERMS, strict=True):
        result[amplitude] = part
        for exponent, row in exponents:
            result[exponent] = part * (values[exponent] * -x[row])
    return result


def _log_ratio_of_optimum(logit: Array, omega: float, xi: float, rho: float) -> Array:
    """Return the ln(A·ω/C) for which f = sigmoid(logit) is the optimum. It rises from −∞ at f = ρ/(ρ+ξ) to ∞."""
    ln_f, ln_rest = -np.logaddexp(0, -logit), -np.logaddexp(0, logit)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        # ξ f/(1−f) − ρ, in logarithms because f/(1−f) may be huge
        gain = logit + math.log(xi) + np.log(-np.expm1(math.log(rho) - math.log(xi) - logit))
    return np.where(np.isnan(gain), -np.inf, gain - xi * ln_rest + (omega - rho) * ln_f)
