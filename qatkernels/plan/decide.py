"""What follows from a fitted law: tokens that a bad split wastes, parity with full precision, the best bit width."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from .formula import Array, plain, positive
from .law import LossLaw

#: Tokens between which :func:`full_precision_parity` looks.
TOKENS_SEARCHED = (1e3, 1e18)


def wasted_tokens(law: LossLaw, params: ArrayLike, tokens: ArrayLike, bits: ArrayLike, fraction: ArrayLike) -> Any:
    """Return D − D′, the tokens that training with another than the best fraction wastes.

    D′ is the budget with which the best fraction gives the loss that D tokens give at this one:
    min_f L(D′, f) = L(D, fraction).

    Args:
        law: the loss law.
        params: N, parameters; this and the rest broadcast.
        tokens: D, tokens of both phases.
        bits: B, bits of a weight.
        fraction: share of quantized tokens, in (0, 1).

    Returns:
        Tokens in [0, D).

    Raises:
        ValueError: if an argument is out of range.
    """
    loss = np.asarray(law.at_fraction(params, tokens, bits, fraction))
    n, b = positive("params", params), positive("bits", bits)
    high = np.broadcast_to(np.log(positive("tokens", tokens)), loss.shape)
    best = _bisect(lambda x: np.asarray(law.minimum(n, np.exp(x), b)) - loss, high - 60.0, high)
    return plain(np.maximum(np.exp(high) - np.exp(best), 0.0))


def full_precision_parity(
    law: LossLaw, params: float, bits: float, tolerance: float = 0.01
) -> tuple[float, float] | None:
    """Return the range of tokens in which QAT at its best fraction matches full precision with as many tokens.

    By its form the law never puts QAT below full precision, so that matching means a loss at most ``tolerance`` above
    [ours].

    Args:
        law: the loss law.
        params: N, parameters.
        bits: B, bits of a weight.
        tolerance: relative difference of the losses that counts as none.

    Returns:
        Smallest and largest number of tokens (both phases) of the first range in which they match; inf where it has no
        end below 10¹⁸; None if there is none.

    Raises:
        ValueError: if an argument is not positive and finite.
    """
    tolerance = float(positive("tolerance", tolerance))

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
        fraction: f*, share of quantized tokens.
        loss: at that fraction.
    """

    bits: float
    params: float
    tokens: float
    fraction: float
    loss: float


def best_bits_under_memory(
    law: LossLaw, memory: float, compute: float, bits: Sequence[float] = (1, 1.58, 2, 3, 4, 6)
) -> list[BitChoice]:
    """Return bit widths, the best first, where fewer bits buy more parameters and so fewer tokens.

    The weights fill the memory, M = N·B/8, and training takes the compute, C = 6·N·D, at any width; so S is the same
    for all of them.

    Args:
        law: the loss law.
        memory: M, bytes of weights.
        compute: C, floating point operations of the whole training.
        bits: widths to choose from.

    Raises:
        ValueError: if an argument is not positive and finite.
    """
    b = np.atleast_1d(positive("bits", bits))
    n = positive("memory", memory) * 8 / b
    d = positive("compute", compute) / (6 * n)
    fractions, losses = law.optimal_fraction(n, d, b), law.minimum(n, d, b)
    rows = np.stack([b, n, d, fractions, losses], 1)
    return [BitChoice(*row.tolist()) for row in rows[np.argsort(losses, kind="stable")]]


def _bisect(function: Callable[[Array], Array], low: ArrayLike, high: ArrayLike) -> Array:
    """Return where a function, elementwise positive at ``low`` and not at ``high``, stops being positive."""
    a, b = np.asarray(low, dtype=np.float64), np.asarray(high, dtype=np.float64)
    for _ in range(60):
        middle = 0.5 * (a + b)
        above = function(middle) > 0
        a, b = np.where(above, middle, a), np.where(above, b, middle)
    return b
