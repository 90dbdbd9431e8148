"""Counter-based Gaussian noise: the same seed gives the same bits on every backend, whatever the launch shape.

Element ``i`` of a stream takes word ``i % 4`` of Philox4x32-10 (Salmon et al., 2011) at the counter
``(low(i // 4), high(i // 4), stream, 0)`` under the key ``(low(seed), high(seed))``. Words 0, 1 and words 2, 3 each
make a Box-Muller pair. Logarithm, sine and cosine are polynomials in separately rounded float32 multiplications and
additions (the coefficients of Cephes' logf, sinf, cosf), and square root is correctly rounded, so backends agree bit
for bit: a noisy forward and its backward may even run on different ones. Nothing is stored.

The uniform under the logarithm has 24 bits, so no sample exceeds 5.77 standard deviations.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._op import define

#: Streams of the noise: on the weight, and on its scales.
WEIGHT_STREAM, SCALE_STREAM = 0, 1

PHILOX_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
PHILOX_INCREMENTS = (0x9E3779B9, 0xBB67AE85)
_MASK = 0xFFFFFFFF

#: log(1 + t) = t - t^2 / 2 + t^3 * P(t) for sqrt(1/2) - 1 <= t <= sqrt(2) - 1, highest power first.
LOG_POLY = (
    7.0376836292e-2, -1.1514610310e-1, 1.1676998740e-1, -1.2420140846e-1, 1.4249322787e-1,
    -1.6668057665e-1, 2.0000714765e-1, -2.4999993993e-1, 3.3333331174e-1,
)  # fmt: skip
#: ln 2 as a short and a long part.
LN2_HIGH, LN2_LOW = 0.693359375, -2.12194440e-4
#: sin(a) = a + a^3 * P(a^2) and cos(a) = 1 - a^2 / 2 + a^4 * P(a^2) for abs(a) <= pi / 4.
SIN_POLY = (-1.9515295891e-4, 8.3321608736e-3, -1.6666654611e-1)
COS_POLY = (2.443315711809948e-5, -1.388731625493765e-3, 4.166664568298827e-2)
HALF_PI = 1.5707963267948966
SQRT_HALF = 0.70710678118654752


def philox(seed: Tensor, counter: Tensor, stream: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the four words of Philox4x32-10.

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
    for _ in range(10):
        product0, product1 = x0 * PHILOX_MULTIPLIERS[0], x2 * PHILOX_MULTIPLIERS[1]
        x0, x1, x2, x3 = (
            ((product1 >> 32) & _MASK) ^ x1 ^ k0,
            product1 & _MASK,
            ((product0 >> 32) & _MASK) ^ x3 ^ k1,
            product0 & _MASK,
        )
        k0, k1 = (k0 + PHILOX_INCREMENTS[0]) & _MASK, (k1 + PHILOX_INCREMENTS[1]) & _MASK
    return x0, x1, x2, x3


def _horner(x: Tensor, coefficients: tuple[float, ...]) -> Tensor:
    result = torch.full_like(x, coefficients[0])
    for coefficient in coefficients[1:]:
        result = result * x + coefficient
    return result


def _log(u: Tensor) -> Tensor:
    """Natural logarithm of float32 u in (0, 1], separately rounded operations only."""
    bits = u.view(torch.int32)
    exponent = ((bits >> 23) - 126).float()
    mantissa = ((bits & 0x007FFFFF) | 0x3F000000).view(torch.float32)
    small = mantissa < SQRT_HALF
    exponent = torch.where(small, exponent - 1, exponent)
    t = torch.where(small, mantissa + mantissa, mantissa) - 1
    square = t * t
    y = _horner(t, LOG_POLY) * t * square
    y = y + exponent * LN2_LOW
    y = y - square * 0.5
    return (t + y) + exponent * LN2_HIGH


def box_muller(word0: Tensor, word1: Tensor) -> tuple[Tensor, Tensor]:
    """Return two independent float32 standard normals from two 32-bit words."""
    u = ((word0 >> 8) + 1).float() * 2.0**-24
    # By way of float64, because torch's own float32 square root (MKL's) is not correctly rounded.
    radius = torch.sqrt((_log(u) * -2.0).double()).float()
    turn = (word1 >> 8).float() * 2.0**-22
    quadrant = torch.floor(turn + 0.5)
    angle = (turn - quadrant) * HALF_PI
    quadrant = quadrant.int()
    square = angle * angle
    sine = _horner(square, SIN_POLY) * square * angle + angle
    cosine = (_horner(square, COS_POLY) * square * square - square * 0.5) + 1.0
    odd = (quadrant & 1) == 1
    sine, cosine = torch.where(odd, cosine, sine), torch.where(odd, sine, cosine)
    sine = torch.where((quadrant & 2) == 2, -sine, sine)
    cosine = torch.where(((quadrant + 1) & 2) == 2, -cosine, cosine)
    return radius * cosine, radius * sine


def _reference(seed: Tensor, numel: int, stream: int) -> Tensor:
    counter = torch.arange((numel + 3) // 4, dtype=torch.int64, device=seed.device)
    x0, x1, x2, x3 = philox(seed, counter, stream)
    return torch.stack((*box_muller(x0, x1), *box_muller(x2, x3)), dim=-1).reshape(-1)[:numel]


def _fake(seed: Tensor, numel: int, stream: int) -> Tensor:
    torch._check(
        seed.dtype == torch.int64 and seed.numel() == 1, lambda: "seed must be an int64 tensor with one element"
    )
    torch._check(numel >= 0, lambda: f"numel is {numel}, must not be negative")
    return seed.new_empty((numel,), dtype=torch.float32)


NORMAL = define("normal", "Tensor seed, int numel, int stream", ("out",), reference=_reference, fake=_fake)


def normal(seed: Tensor, numel: int, stream: int = WEIGHT_STREAM) -> Tensor:
    """Return the standard normals that the noisy kernels draw.

    Args:
        seed: int64 tensor with one element; its device is the device of the result.
        numel: how many.
        stream: ``WEIGHT_STREAM`` or ``SCALE_STREAM``.

    Returns:
        float32 tensor of shape ``[numel]``.
    """
    out: Tensor = torch.ops.qatkernels.normal(seed, numel, stream)
    return out


def make_seed(seed: int | Tensor | None, device: torch.device) -> Tensor:
    """Return a seed as the int64 tensor that kernels take, drawn from torch's default generator if None.

    Raises:
        ValueError: if a tensor seed is not int64 with one element.
    """
    if seed is None:
        return torch.randint(2**63 - 1, (), dtype=torch.int64, device=device)
    if isinstance(seed, int):
        return torch.full((), seed, dtype=torch.int64, device=device)
    if seed.dtype != torch.int64 or seed.numel() != 1:
        raise ValueError(f"seed is {seed.dtype} of shape {tuple(seed.shape)}, must be an int64 tensor with one element")
    return seed.to(device)
