"""Decisions from a fitted law: tokens that a bad split wastes, parity with full precision, the best bit width."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from .formula import Array, as_positive, scalar_as_float
from .law import LossLaw

#: Range of tokens that :func:`full_precision_parity` searches.
TOKENS_SEARCHED = (1e3, 1e18)


def wasted_tokens(law: LossLaw, params: ArrayLike, tokens: ArrayLike, bits: ArrayLike, fraction: ArrayLike) -> Any:
    """Return D − D′, the tokens that a training with this fraction wastes.

    With the best fraction, D′ tokens are enough for the loss that D tokens give with this fraction:
    min_f L(D′, f) = L(D, fraction).

    Args:
        law: the loss law.
        params: N, parameters; broadcasts with the other arguments.
        tokens: D, tokens of both phases.
        bits: B, bits of a weight.
        fraction: fraction of quantized tokens, in (0, 1).

    Returns:
        Tokens in [0, D).

    Raises:
        ValueError: if an argument is out of range.
    """
    loss = np.asarray(law.at_fraction(params, tokens, bits, fraction))
    n, b = as_positive("params", params), as_positive("bits", bits)
    high = np.broadcast_to(np.log(as_positive("tokens", tokens)), loss.shape)
    best = _bisect(lambda x: np.asarray(law.minimum(n, np.exp(x), b)) - loss, high - 60.0, high)
    return scalar_as_float(np.maximum(np.exp(high) - np.exp(best), 0.0))


def full_precision_parity(
    law: LossLaw, params: float, bits: float, tolerance: float = 0.01
) -> tuple[float, float] | None:
    """Return the range of tokens in which QAT at its best fraction matches full precision with as many tokens.

    In the law, the loss of QAT is never below that of full precision. So QAT matches if its loss is at most
    ``tolerance`` higher (our definition).

    Args:
        law: the loss law.
        params: N, parameters.
        bits: B, bits of a weight.
        tolerance: largest relative difference of losses that counts as a match.

    Returns:
        Smallest and largest number of tokens (both phases) of the first range in which the two match. The largest is
        inf if the range has no end below 10¹⁸. None if they match nowhere.

    Raises:
        ValueError: if an argument is not positive and finite.
    """
    tolerance = float(as_positive("tolerance", tolerance))

    def excess(x: Array) -> Array:
        d = np.exp(x)
        full = np.asarray(law(params, 0.0, d, bits))
        return np.asarray(law.minimum(params, d, bits)) - (1 + tolerance) * full

    grid = np.log(np.geomspace(*TOKENS_SEARCHED, 1000))
    matched = excess(grid) <= 0
    if not matched.any():
        return None
    first = int(matched.argmax())
    last = first + int((~matched[first:]).argmax()) - 1 if not matched[first:].all() else len(grid) - 1
    low, high = TOKENS_SEARCHED[0], np.inf
    if first > 0:
        low = float(np.exp(_bisect(excess, grid[first - 1], grid[first])))
    if last < len(grid) - 1:
        high = float(np.exp(_bisect(lambda x: -excess(x), grid[last], grid[last + 1])))
    return low, high


@dataclass(frozen=True)
class BitChoice:
    """One bit width under a budget of memory and compute.

    Attributes:
        bits: B.
        params: N, parameters that fill the memory at B bits.
        tokens: D, tokens that the compute allows.
        fraction: f*, the best fraction of quantized tokens.
        loss: loss at that fraction.
    """

    bits: float
    params: float
    tokens: float
    fraction: float
    loss: float


def best_bits_under_memory(
    law: LossLaw, memory: float, compute: float, bits: Sequence[float] = (1, 1.58, 2, 3, 4, 6)
) -> list[BitChoice]:
    """Return the bit widths ordered by their loss, for a fixed memory and a fixed compute.

    At every bit width the weights fill the memory, M = N·B/8, and training takes the compute, C = 6·N·D. Fewer bits
    allow more parameters, and more parameters allow fewer tokens. S is the same at all bit widths.

    Args:
        law: the loss law.
        memory: M, bytes of the weights.
        compute: C, floating point operations of the whole training.
        bits: bit widths to choose from.

    Raises:
        ValueError: if an argument is not positive and finite.
    """
    b = np.atleast_1d(as_positive("bits", bits))
    n = as_positive("memory", memory) * 8 / b
    d = as_positive("compute", compute) / (6 * n)
    fractions, losses = law.optimal_fraction(n, d, b), law.minimum(n, d, b)
    rows = np.stack([b, n, d, fractions, losses], 1)
    return [BitChoice(*row.tolist()) for row in rows[np.argsort(losses, kind="stable")]]


def _bisect(function: Callable[[Array], Array], low: ArrayLike, high: ArrayLike) -> Array:
    """Return, for each element, where a function stops being positive: it is positive at ``low``, not at ``high``."""
    a, b = np.asarray(low, dtype=np.float64), np.asarray(high, dtype=np.float64)
    for _ in range(60):
        middle = 0.5 * (a + b)
        above = function(middle) > 0
        a, b = np.where(above, middle, a), np.where(above, b, middle)
    return b
