"""The noise: Philox by its published answers, the distribution over every word there is."""

import math

import pytest
import torch

from qatkernels.ops.noise import box_muller, fused, philox

RADII, ANGLES, SIGNS = 1 << 20, 1 << 10, (0x80000000, 0x400)


def test_philox_known_answer():
    """Of seven rounds with counter and key zero, from the vectors that Random123 publishes."""
    words = philox(torch.tensor(0), torch.tensor([0]), 0)
    assert [int(word) for word in words] == [0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48]


def every_radius():
    """The first normal of every radius at one angle, divided by that angle's cosine."""
    normals, _ = box_muller(torch.arange(RADII) << 11)
    return normals.double() / math.cos(math.pi / 4 / ANGLES)


def test_every_radius():
    radius = every_radius()
    u = (2 * torch.arange(RADII).double() + 1) / (2 * RADII)
    assert radius.min() > 0
    exact = (-2 * u.log()).sqrt()
    torch.testing.assert_close(radius.square(), exact.square(), rtol=1e-6, atol=5e-6)


@pytest.mark.parametrize("radius", [1, 777_777])
def test_every_angle(radius):
    first, second, angle = torch.meshgrid(torch.arange(2), torch.arange(2), torch.arange(ANGLES), indexing="ij")
    word = first << 31 | radius << 11 | second << 10 | angle
    r = every_radius()[radius]
    turn = (angle + 0.5) * (math.pi / 2 / ANGLES)
    for normal, exact, bit in zip(box_muller(word), (turn.cos(), turn.sin()), SIGNS, strict=True):
        sign = 1 - 2 * ((word & bit) != 0).double()
        torch.testing.assert_close(normal.double() / r, exact * sign, rtol=0, atol=2e-6)


def test_rounding_twice_is_rounding_once():
    """Computing in float64 equals a fused multiply-add.

    It is tested for all radii and all angles separately, as no sum has both.
    """
    sums = []

    def checked(a, b, c):
        product, c64 = a.double() * b.double(), c.double()
        total = product + c64
        # Knuth's two-sum: what the sum's rounding lost
        part = total - product
        lost = (product - (total - part)) + (c64 - part)
        half_way = (total.view(torch.int64) & 0x1FFFFFFF) == 0x10000000
        assert not (half_way & (lost != 0)).any()
        assert (total == 0).logical_or(total.abs() >= torch.finfo(torch.float32).tiny).all()
        sums.append(total)
        return fused(a, b, c)

    box_muller(torch.arange(RADII) << 11, checked)
    box_muller(torch.arange(ANGLES), checked)
    assert len(sums) == 2 * 13


def test_the_distribution_over_every_word():
    """Radius and angle are separate bits, so the whole distribution function is a sum over their products."""
    radius = every_radius().sort().values
    cosine = ((torch.arange(ANGLES).double() + 0.5) * (math.pi / 2 / ANGLES)).cos()
    for x in torch.linspace(0.01, 5.3, 60).tolist():
        beyond = RADII - torch.searchsorted(radius, x / cosine, right=True)
        tail = beyond.double().mean().item() / RADII / 2
        exact = math.erfc(x / math.sqrt(2)) / 2
        assert abs(tail - exact) < 1e-6
        assert x > 5 or abs(tail / exact - 1) < 0.05, x
