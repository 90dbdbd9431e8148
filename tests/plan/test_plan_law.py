"""The loss law: its values, its gradient, its minimum, and the three facts about its optimum."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qatkernels.plan import LossLaw, best_bits_under_memory, full_precision_parity, wasted_tokens
from qatkernels.plan.law import COEFFICIENTS

LAW = LossLaw(
    alpha=1.4, beta=500, gamma=0.3, zeta=250, eta=0.35, theta=0.35, kappa=0.9, phi=2.0, chi=0.35, psi=0.05, omega=0.3,
    lambda_=40.0, mu=0.3, nu=0.04, xi=0.5, rho=0.06,
)  # fmt: skip

AMPLITUDES = ("alpha", "beta", "zeta", "theta", "phi", "lambda_")
exponent = st.floats(0.02, 1.5)
laws = st.builds(
    LossLaw,
    **(dict.fromkeys(COEFFICIENTS, exponent) | dict.fromkeys(AMPLITUDES, st.floats(1e-3, 1e3))),
)
sizes, widths = st.floats(1e6, 1e11), st.floats(1, 8)


def by_hand(law: LossLaw, n: float, qat: float, fp: float, b: float) -> float:
    """The formula as it is written."""
    s_qat, s_fp = qat / (n * b / 8), fp / (n * b / 8)
    return (
        law.alpha + law.beta / (qat + fp) ** law.gamma + law.zeta / n**law.eta + law.theta * 2 ** (-law.kappa * b)
        + law.phi * 2 ** (-law.chi * b) / (n**law.psi * s_qat**law.omega)
        + law.lambda_ * 2 ** (-law.mu * b) / (n**law.nu * s_fp**law.xi * s_qat**law.rho)
    )  # fmt: skip


@given(laws, sizes, st.floats(1e6, 1e13), st.floats(1e6, 1e13), widths)
def test_value(law: LossLaw, n: float, qat: float, fp: float, b: float) -> None:
    assert law(n, qat, fp, b) == pytest.approx(by_hand(law, n, qat, fp, b), rel=1e-10)


def test_full_precision_has_three_terms() -> None:
    assert LAW(1e9, 0, 1e11, 4) == pytest.approx(1.4 + 500 / 1e11**0.3 + 250 / 1e9**0.35, rel=1e-12)
    assert LAW(1e9, 0, 1e11, math.nan) == LAW(1e9, 0, 1e11, 32)
    mixed = LAW(1e9, [0, 1e10], [1e11, 9e10], 4)
    assert mixed[0] == LAW(1e9, 0, 1e11, 4)
    assert mixed[1] == LAW(1e9, 1e10, 9e10, 4)


@pytest.mark.parametrize("run", [(1e9, 1e10, 9e10, 2), (2e8, 5e11, 1e9, 6), (1e9, 0, 1e11, 1)])
def test_gradient(run: tuple[float, ...]) -> None:
    """Against central differences of each coefficient."""
    gradient = LAW.gradient(*run)
    assert gradient.shape == (16,)
    for name, got in zip(COEFFICIENTS, gradient, strict=True):
        value = getattr(LAW, name)
        up, down = (replace(LAW, **{name: value * (1 + s)})(*run) for s in (1e-5, -1e-5))
        assert got == pytest.approx((up - down) / (2e-5 * value), rel=1e-5, abs=1e-12), name
    assert LAW.gradient(*(np.full((3, 2), x) for x in run)).shape == (3, 2, 16)


@given(laws, sizes, st.floats(0.1, 1e5), widths)
def test_the_minimum_is_one(law: LossLaw, n: float, s: float, b: float) -> None:
    """No fraction of a fine grid does better than the one that is called best."""
    tokens = s * n * b / 8
    best = law.optimal_fraction(n, tokens, b)
    assert 0 < best <= 1
    grid = 1 / (1 + np.exp(-np.linspace(-30, 30, 2001)))
    assert law.at_fraction(n, tokens, b, grid).min() >= law.minimum(n, tokens, b) * (1 - 1e-12)


def test_minimum_against_a_search() -> None:
    fractions = np.linspace(0.001, 0.999, 99_999)
    for n, d, b in ((86e6, 1e10, 2), (2e9, 1e12, 1), (4e8, 5e9, 6)):
        searched = fractions[LAW.at_fraction(n, d, b, fractions).argmin()]
        assert LAW.optimal_fraction(n, d, b) == pytest.approx(searched, abs=2e-5)
    many = LAW.optimal_fraction([[86e6], [2e9]], [1e10, 1e12], 2)
    assert many.shape == (2, 2)
    assert many[1, 0] == LAW.optimal_fraction(2e9, 1e10, 2)


@given(laws, sizes, st.floats(0.1, 1e5), widths)
def test_the_optimum_is_above_rho_over_rho_plus_xi(law: LossLaw, n: float, s: float, b: float) -> None:
    best = law.optimal_fraction(n, s * n * b / 8, b)
    limit = law.rho / (law.rho + law.xi)
    assert best >= limit
    if best < limit * (1 + 1e-9):  # rounding: so far on the other term's side that they are the same number
        ratio = law.phi * law.omega / law.lambda_ * s ** (law.xi + law.rho - law.omega)
        assert ratio * n ** (law.nu - law.psi) * 2 ** ((law.mu - law.chi) * b) < 1e-6


@pytest.mark.parametrize(("rho", "xi"), [(0.08, 0.04), (1.22, 1.37), (1.23, 0.02), (0.06, 0.2), (1.03, 0.98)])
def test_the_optimum_is_not_rounded_below_its_limit(rho: float, xi: float) -> None:
    """Exponents whose limit, computed by way of its logit, is an ulp too small."""
    law = replace(LAW, phi=1e-3, chi=1.5, psi=1.5, omega=0.02, lambda_=1e3, mu=0.02, nu=0.02, xi=xi, rho=rho)
    assert 1 / (1 + math.exp(math.log(xi) - math.log(rho))) < rho / (rho + xi)
    assert law.optimal_fraction(1e11, 1e5 * 1e11, 8) >= rho / (rho + xi)


@given(laws, sizes, st.floats(0.1, 1e4), widths, st.floats(1.5, 10))
def test_the_optimum_rises_with_s_when_xi_and_rho_exceed_omega(
    law: LossLaw, n: float, s: float, b: float, more: float
) -> None:
    before, after = law.optimal_fraction(n, np.array([s, more * s]) * n * b / 8, b)
    rise = law.xi + law.rho - law.omega
    if abs(rise) < 1e-6:
        return
    assert (after - before) * rise >= 0
    inside = law.rho / (law.rho + law.xi) * (1 + 1e-4) < before < 1 - 1e-4
    if inside and abs(rise) > 1e-2:
        assert (after - before) * rise > 0


@given(laws, sizes, sizes, st.floats(0.1, 1e4), widths, widths)
def test_the_optimum_depends_on_s_alone_if_psi_is_nu_and_chi_is_mu(
    law: LossLaw, n: float, m: float, s: float, b: float, c: float
) -> None:
    same = replace(law, psi=law.nu, chi=law.mu)
    one, other = same.optimal_fraction(np.array([n, m]), s * np.array([n * b, m * c]) / 8, [b, c])
    assert one == pytest.approx(other, rel=1e-6)


@pytest.mark.parametrize("change", [{"psi": 0.09}, {"chi": 0.6}])
def test_the_optimum_depends_on_more_only_if_they_differ(change: dict[str, float]) -> None:
    law = replace(LAW, **{"psi": LAW.nu, "chi": LAW.mu, **change})
    n, b = np.array([1e8, 4e9]), np.array([1, 4])
    one, other = law.optimal_fraction(n, 100 * n * b / 8, b)
    assert abs(one - other) > 1e-3


def test_wasted_tokens_are_zero_at_the_optimum_and_grow_away_from_it() -> None:
    n, d, b = 1e9, 1e11, 2
    best = LAW.optimal_fraction(n, d, b)
    assert wasted_tokens(LAW, n, d, b, best) == pytest.approx(0, abs=1e-5 * d)
    fractions = np.array([0.9, 0.6, best, 0.1, 0.01])
    waste = wasted_tokens(LAW, n, d, b, fractions)
    assert waste[0] > waste[1] > waste[2] < waste[3] < waste[4]
    assert LAW.minimum(n, d - waste, b) == pytest.approx(LAW.at_fraction(n, d, b, fractions), rel=1e-9)
    assert isinstance(wasted_tokens(LAW, n, d, b, 0.1), float)


def test_parity() -> None:
    low, high = full_precision_parity(LAW, 1e9, 6, tolerance=0.02)
    assert high == math.inf

    def excess(tokens: float) -> float:
        return LAW.minimum(1e9, tokens, 6) / LAW(1e9, 0, tokens, 6) - 1

    assert excess(low) == pytest.approx(0.02, rel=1e-6)
    assert excess(0.9 * low) > 0.02 > excess(1.1 * low)
    assert full_precision_parity(LAW, 1e9, 1) is None
    wide = full_precision_parity(LAW, 1e9, 4, tolerance=0.5)
    assert wide[0] < full_precision_parity(LAW, 1e9, 4, tolerance=0.1)[0]


def test_parity_that_ends() -> None:
    """If full precision keeps improving while the loss from rounding stays, the range has an end."""
    law = replace(LAW, alpha=1e-3, zeta=1e-3, theta=0.02, kappa=0.01, beta=50, gamma=0.2, phi=1e-6, lambda_=1e-6)
    low, high = full_precision_parity(law, 1e9, 4, tolerance=0.05)
    assert low < high < 1e18
    assert law.minimum(1e9, high, 4) / law(1e9, 0, high, 4) == pytest.approx(1.05, rel=1e-6)


def test_best_bits() -> None:
    memory, compute = 3e8, 6 * 1.2e9 * 1e11
    found = best_bits_under_memory(LAW, memory, compute)
    assert [c.loss for c in found] == sorted(c.loss for c in found)
    assert {c.bits for c in found} == {1, 1.58, 2, 3, 4, 6}
    for choice in found:
        assert choice.params * choice.bits / 8 == pytest.approx(memory)
        assert 6 * choice.params * choice.tokens == pytest.approx(compute)
        assert choice.loss == pytest.approx(LAW.minimum(choice.params, choice.tokens, choice.bits))
    assert best_bits_under_memory(replace(LAW, theta=50.0), memory, compute)[0].bits == 6
    assert best_bits_under_memory(replace(LAW, theta=1e-9, phi=1e-9, lambda_=1e-9), memory, 1e25)[0].bits == 1


def test_as_a_dictionary() -> None:
    assert LossLaw.from_dict(LAW.to_dict()) == LAW
    with pytest.raises(ValueError, match="coefficients are"):
        LossLaw.from_dict({"alpha": 1.0})


@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan, math.inf])
def test_bad_coefficients(bad: float) -> None:
    with pytest.raises(ValueError, match=r"xi is .*, must be positive and finite"):
        replace(LAW, xi=bad)


@pytest.mark.parametrize(
    ("run", "message"),
    [
        ((0, 1, 1, 4), "params is 0"),
        ((1e9, -1, 1e9, 4), "tokens_qat is -1"),
        ((1e9, 1e9, 0, 4), "tokens_fp is 0"),
        ((1e9, 1e9, 1e9, 0), "bits is"),
        ((1e9, math.inf, 1e9, 4), "tokens_qat is inf"),
    ],
)
def test_bad_runs(run: tuple[float, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LAW(*run)


def test_bad_fraction() -> None:
    with pytest.raises(ValueError, match=r"fraction is 1.0, must be in \(0, 1\)"):
        LAW.at_fraction(1e9, 1e11, 4, 1.0)
