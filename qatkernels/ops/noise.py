"""Counter-based Gaussian noise: the same seed gives the same bits on every backend and for every launch shape.

Element ``i`` of a stream comes from word ``i % 8 // 2`` of Philox4x32-7 (Salmon et al., 2011; seven rounds are the
fewest that pass their tests of randomness, ten are their default) at the counter
``(low(i // 8), high(i // 8), stream, 0)`` with the key ``(low(seed), high(seed))``. The Box-Muller transform makes two
normals from a word: twenty bits give the radius, ten the angle within a quadrant, two the signs. Logarithm, sine and
cosine are polynomials of float32 fused multiply-adds, and the square root is correctly rounded. So backends agree bit
for bit: a noisy forward and its backward may even run on different backends. No noise is stored.

Over all words, the distribution function differs from the normal one by at most 1e-6. The uniform number under the
logarithm is at least 2**-21, so no sample exceeds 5.4 standard deviations. Up to 5 standard deviations the tails have
the right weight to 5%.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..arguments import check_integers, check_tensors, is_integer, wrong_type
from ._op import define

#: Streams of the noise: one for the weight, one for its scales.
WEIGHT_STREAM, SCALE_STREAM = 0, 1

PHILOX_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
PHILOX_INCREMENTS = (0x9E3779B9, 0xBB67AE85)
_MASK = 0xFFFFFFFF

ROUNDS = 7

#: Coefficients of P, highest power first. (1 / 4 - h * h) * P(h) approximates 2**23 * (log2(1.5 + h) - 0.5 - h) for
#: abs(h) <= 1 / 2, with an error of at most 2**23 * 2.2e-6, and exactly at both ends.
LOG_POLY = (216773.6875, -371393.53125, 644046.875, -1280924.125, 2850889.75)
#: Coefficients of P: P(x^2) = A * cos(pi / 4 * x) and x * P(x^2) = A * sin(pi / 4 * x) for abs(x) <= 1. Sum and
#: difference of the two are a sine and a cosine times sqrt(2) * A. With A = sqrt(ln 2 / 2**23), sqrt(2) * A times
#: sqrt(-2**23 * log2(u)) is the radius sqrt(-2 * ln(u)).
COS_POLY = (-9.166328e-8, 4.5561155e-6, -8.8657667e-5, 2.8745361e-4)
SIN_POLY = (6.976795e-7, -2.320153e-5, 2.2576441e-4)


def philox(seed: Tensor, counter: Tensor, stream: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the four words of Philox4x32-7.

    Args:
        seed: int64 tensor with one element, the 64-bit key.
        counter: int64 counters of any shape.
        stream: third counter word.

    Returns:
        Four int64 tensors like ``counter`` with values in [0, 2**32).
    """
    k0, k1 = seed & _MASK, (seed >> 32) & _MASK
    x0, x1 = counter & _MASK, (counter >> 32) & _MASK
    x2, x3 = torch.full_like(counter, stream), torch.zeros_like(counter)
    for _ in range(ROUNDS):
        product0, product1 = x0 * PHILOX_MULTIPLIERS[0], x2 * PHILOX_MULTIPLIERS[1]
        x0, x1, x2, x3 = (
            ((product1 >> 32) & _MASK) ^ x1 ^ k0,
            product1 & _MASK,
            ((product0 >> 32) & _MASK) ^ x3 ^ k1,
            product0 & _MASK,
        )
        k0, k1 = (k0 + PHILOX_INCREMENTS[0]) & _MASK, (k1 + PHILOX_INCREMENTS[1]) & _MASK
    return x0, x1, x2, x3


def fused(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """Return a * b + c of float32 tensors, rounded once.

    It computes in float64, where the product is exact and the sum is rounded, and rounds the sum to float32. This
    second rounding matters only if the float64 sum is exactly half way between two float32 numbers. In `box_muller`
    that never happens: a word has so few bits that a test tries them all.
    """
    return (a.double() * b.double() + c.double()).float()


def _horner(x: Tensor, coefficients: tuple[float, ...], fma: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tensor:
    result = torch.full_like(x, coefficients[0])
    for coefficient in coefficients[1:]:
        result = fma(result, x, torch.full_like(x, coefficient))
    return result


def box_muller(word: Tensor, fma: Callable[[Tensor, Tensor, Tensor], Tensor] = fused) -> tuple[Tensor, Tensor]:
    """Return two independent float32 standard normals from a 32-bit word. ``fma`` is the fused multiply-add to use."""
    # 2**31 * u is an odd multiple of 2**10. The bits of a float32, divided by 2**23, are 127 + its base-2 logarithm,
    # where the logarithm is interpolated linearly between powers of two. The polynomial corrects the interpolation.
    # All values are scaled by 2**23.
    bits = ((word & 0x7FFFF800) | 0x400).float().view(torch.int32)
    h = ((bits & 0x007FFFFF) | 0x3F800000).view(torch.float32) - 1.5
    q = fma(h, h, torch.full_like(h, -0.25))
    minus_log2 = fma(q, _horner(h, LOG_POLY, fma), (0x4F000000 - bits).float())
    # In float64, because torch's float32 square root (from MKL) is not correctly rounded.
    radius = torch.sqrt(minus_log2.double()).float()
    x = (word & 0x3FF).float() * 2.0**-9 + (2.0**-10 - 1.0)
    square = x * x
    even, odd = _horner(square, COS_POLY, fma), _horner(square, SIN_POLY, fma)
    cosine, sine = radius * fma(odd, -x, even), radius * fma(odd, x, even)
    return torch.where((word & 0x80000000) != 0, -cosine, cosine), torch.where((word & 0x400) != 0, -sine, sine)


def _reference(seed: Tensor, numel: int, stream: int) -> Tensor:
    counter = torch.arange((numel + 7) // 8, dtype=torch.int64, device=seed.device)
    pairs = [normal for word in philox(seed, counter, stream) for normal in box_muller(word)]
    return torch.stack(pairs, dim=-1).reshape(-1)[:numel]


NORMAL = define(
    "normal", "Tensor seed, int numel, int stream",
    """
    seed: int64 one
    require numel >= 0; numel is {numel}, must not be negative
    require 0 <= stream < 2 ** 32; stream is {stream}, must be 0 to 2**32 - 1
    -> out: float32 [numel]
    """,
    reference=_reference,
)  # fmt: skip


def normal(seed: Tensor, numel: int, stream: int = WEIGHT_STREAM) -> Tensor:
    """Return the standard normal numbers that kernels with noise draw.

    Args:
        seed: int64 tensor with one element; the result is on its device.
        numel: how many numbers.
        stream: ``WEIGHT_STREAM`` or ``SCALE_STREAM``.

    Returns:
        float32 tensor of shape ``[numel]``.

    Raises:
        TypeError: if an argument is of another type, naming it.
        RuntimeError: if ``seed`` is not int64 with one element, or ``numel`` is negative.
    """
    check_tensors(seed=seed)
    check_integers(numel=numel, stream=stream)
    out: Tensor = torch.ops.qatkernels.normal(seed, numel, stream)
    return out


def check_seed(seed: int | Tensor | None) -> None:
    """Raise TypeError unless this can be a seed."""
    if not (seed is None or isinstance(seed, Tensor) or is_integer(seed)):
        raise wrong_type("seed", seed, "an int, an int64 tensor with one element, or None")


def make_seed(seed: int | Tensor | None, device: torch.device) -> Tensor:
    """Return a seed as the int64 tensor that kernels need. If None, it is drawn from torch's default generator.

    An int is taken modulo 2**64, because the key of the generator has 64 bits; -1 is the key 2**64 - 1.

    Raises:
        TypeError: if ``seed`` is neither an int nor a tensor nor None.
        ValueError: if a tensor seed is not int64 with one element.
    """
    check_seed(seed)
    if seed is None:
        return torch.randint(2**63 - 1, (), dtype=torch.int64, device=device)
    if not isinstance(seed, Tensor):
        if not -(2**63) <= seed < 2**63:
            seed = (seed + 2**63) % 2**64 - 2**63
        return torch.full((), seed, dtype=torch.int64, device=device)
    if seed.dtype != torch.int64 or seed.numel() != 1:
        raise ValueError(f"seed is {seed.dtype} of shape {tuple(seed.shape)}, must be an int64 tensor with one element")
    return seed.to(device)
