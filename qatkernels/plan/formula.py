"""The best fraction of a training budget to train quantized, by the closed formula of the paper.

In *Compute-Optimal Quantization-Aware Training* the best fraction depends on one number, the tokens per byte of
weights,

    S = D_total / (N · B / 8)          f̂(S) = exp(−a / ln S),  a = 6.7297

The formula was fitted to runs with 2.3 billion to 1.4 trillion tokens at 1 to 6 bits. Outside of that range it is still
computed, with an :class:`ExtrapolationWarning`.
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]

#: The coefficient a of f̂ = exp(−a / ln S) [paper].
FRACTION_COEFFICIENT = 6.7297
#: Ranges of tokens and bits that the formula was fitted to [paper].
TOKENS_RANGE, BITS_RANGE = (2.3e9, 1.4e12), (1.0, 6.0)


class PlanError(ValueError):
    """A plan cannot be made; the message names the argument, its value and what is allowed."""


class ExtrapolationWarning(UserWarning):
    """A formula or law is used outside of the range that it was fitted to."""


def tokens_per_parameter_byte(params: ArrayLike, tokens: ArrayLike, bits: ArrayLike) -> Any:
    """Return S = D / (N · B / 8), the tokens per byte of weights.

    Args:
        params: N, parameters of the model. All arguments are numbers or arrays, which broadcast.
        tokens: D, tokens of the whole training or of one of its phases.
        bits: B, bits of a weight; may be fractional.

    Returns:
        S in tokens per byte, float64; a float if all arguments are numbers.

    Raises:
        PlanError: if an argument is not positive and finite.

    >>> round(tokens_per_parameter_byte(396e6, 100e9, 4), 3)
    505.051
    """
    n, d, b = (as_positive(name, x) for name, x in (("params", params), ("tokens", tokens), ("bits", bits)))
    return scalar_as_float(d / (n * (b / 8)))


def optimal_qat_fraction(params: ArrayLike, tokens: ArrayLike, bits: ArrayLike) -> Any:
    """Return f̂ = exp(−6.7297 / ln S), the fraction of all tokens to train quantized.

    Args:
        params: N, parameters of the model.
        tokens: D_total, tokens of both phases together.
        bits: B, bits of a weight in the quantized phase.

    Returns:
        f̂ in (0, 1), with D_qat = f̂ · D_total; a float if all arguments are numbers.

    Raises:
        PlanError: if an argument is not positive and finite, or S ≤ 1, where the formula is not defined.

    >>> round(optimal_qat_fraction(759e6, 1.4e12, 2), 6)
    0.469722
    """
    s = np.asarray(tokens_per_parameter_byte(params, tokens, bits))
    if (s <= 1).any():
        worst = float(s.min())
        raise PlanError(
            f"S = {worst:.4g} tokens per parameter byte, must be above 1 for the formula; "
            "give more tokens, fewer bits or a smaller model, or choose the fraction yourself"
        )
    _warn_outside("tokens", tokens, TOKENS_RANGE)
    _warn_outside("bits", bits, BITS_RANGE)
    return scalar_as_float(np.exp(-FRACTION_COEFFICIENT / np.log(s)))


def tokens_per_parameter_byte_at(fraction: ArrayLike) -> Any:
    """Return S = exp(−6.7297 / ln f), the inverse of :func:`optimal_qat_fraction`.

    Args:
        fraction: f, in (0, 1).

    Returns:
        S in tokens per byte; inf for f so close to 1 that S exceeds float64.

    Raises:
        PlanError: if a fraction is not in (0, 1).
    """
    f = np.asarray(fraction, dtype=np.float64)
    if not ((f > 0) & (f < 1)).all():
        raise PlanError(f"fraction is {fraction!r}, must be in (0, 1)")
    with np.errstate(over="ignore"):
        return scalar_as_float(np.exp(-FRACTION_COEFFICIENT / np.log(f)))


def as_positive(name: str, value: ArrayLike) -> Array:
    """Return a value as float64.

    Args:
        name: name of the argument, for the message.
        value: a number or an array.

    Raises:
        PlanError: if an element is not positive and finite.
    """
    array = np.asarray(value, dtype=np.float64)
    if not (np.isfinite(array) & (array > 0)).all():
        raise PlanError(f"{name} is {value!r}, must be positive and finite")
    return array


def scalar_as_float(value: Any) -> Any:
    """Return an array without dimensions as a float, and other arrays as they are."""
    return float(value) if np.ndim(value) == 0 else value


def _warn_outside(name: str, value: ArrayLike, limits: tuple[float, float]) -> None:
    array = np.asarray(value, dtype=np.float64)
    outside = array[(array < limits[0]) | (array > limits[1])]
    if outside.size:
        warnings.warn(
            f"{name} is {outside.flat[0]:g}, outside of the {limits[0]:g} to {limits[1]:g} "
            "that the formula for the fraction was fitted to: an extrapolation",
            ExtrapolationWarning,
            stacklevel=3,
        )
