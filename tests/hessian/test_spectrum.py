"""Lanczos, quadrature, eigenpairs and traces against full eigendecompositions."""

import gc
import itertools
import json
import math
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qatkernels.hessian import MatrixMap, NotFiniteError, Spectrum, eigs, spectrum, trace
from qatkernels.hessian._spectrum import probe
from qatkernels.hessian.lanczos import Basis, lanczos

#: Eigenvalues by kind, some two hundred of each.
SPECTRA = {
    "clustered": torch.cat([torch.linspace(0, 1e-3, 150), torch.linspace(0.99, 1.01, 40), torch.linspace(5, 5.1, 10)]),
    "repeated": torch.cat([torch.zeros(100), torch.full((60,), 1.0), torch.full((37,), 2.0), torch.full((3,), -1.0)]),
    "tiny": torch.cat([torch.logspace(-14, -6, 150), torch.linspace(1, 10, 50)]),
    "negative": torch.cat([-torch.logspace(-4, 0.3, 100), torch.logspace(-4, 1, 100)]),
    "far apart": torch.cat([torch.linspace(-1e-3, 1e-3, 197), torch.tensor([-40.0, 3.0, 1000.0])]),
}


def matrix(values, dtype=torch.float64):
    generator = torch.Generator().manual_seed(3)
    q = torch.linalg.qr(torch.randn(len(values), len(values), dtype=torch.float64, generator=generator))[0]
    a = (q * values.double()) @ q.T
    return MatrixMap((0.5 * (a + a.T)).to(dtype))


@pytest.fixture(params=SPECTRA.values(), ids=SPECTRA)
def values(request):
    return request.param.double().sort().values


@pytest.mark.parametrize("block", [1, 3])
def test_moments_and_extremes(values, block):
    """Moments of every probe are those of the probe in the eigenbasis; extreme Ritz values are eigenvalues."""
    op = matrix(values)
    found = spectrum(op, probes=4, steps=60, seed=2, block=block)
    exact, vectors = torch.linalg.eigh(op.matrix)
    size = exact.abs().max().item()
    assert found.lambda_max == pytest.approx(exact[-1].item(), abs=1e-6 * size)
    assert found.lambda_min == pytest.approx(exact[0].item(), abs=1e-6 * size)
    for i, (ritz, weights) in enumerate(zip(found.ritz, found.weights, strict=True)):
        v = probe(op, 2, i)
        measure = (vectors.T @ (v / v.norm())).square()
        assert weights.sum().item() == pytest.approx(1, abs=1e-12)
        for power in (1, 2, 3, 4, 10):
            wanted = (measure * (exact / size) ** power).sum()
            assert (weights * (ritz / size) ** power).sum().item() == pytest.approx(wanted.item(), rel=1e-6, abs=1e-12)


def test_no_ghosts(values):
    """As many steps as there are eigenvalues give each of them once, in place of copies of the extreme ones."""
    distinct = torch.unique((values * 1e9).round()) / 1e9
    op = matrix(values)
    (found,) = lanczos(op, [probe(op, 0, 0)], 200, [Basis(200, op)])
    ritz = found.eigh()[0]
    big = distinct[distinct.abs() > 0.5]
    nearest = (ritz[:, None] - big).abs().min(0)
    assert nearest.values.max() < 1e-6 * values.abs().max()
    for value in big:
        gap = (distinct - value).abs()
        gap = gap[gap > 0].min()
        copies = ((ritz - value).abs() < 0.1 * gap).sum()
        assert copies == 1, f"{copies} Ritz values at {value}"


def test_the_basis_is_orthonormal(values):
    for dtype, tolerance in ((torch.float64, 1e-13), (torch.float32, 1e-5)):
        op = matrix(values, dtype)
        basis = Basis(80, op)
        (found,) = lanczos(op, [probe(op, 0, 0)], 80, [basis])
        q = basis.rows[: len(found.alpha)].double()
        assert (q @ q.T - torch.eye(len(q), dtype=torch.float64)).abs().max() < tolerance


def test_masses_and_error_bars():
    values = SPECTRA["repeated"].double()
    found = spectrum(matrix(values), probes=30, steps=20)
    for estimate, exact in (
        (found.near_zero_mass, 0.5),
        (found.negative_mass, 0.015),
        (found.mass(0.5, 1.5), 0.3),
        (found.trace, values.sum().item()),
        (found.moment(2), values.square().mean().item()),
    ):
        assert abs(estimate.value - exact) < 4 * estimate.error
        assert 0 < estimate.error < 0.2 * abs(estimate.value)
    assert math.isnan(spectrum(matrix(values), probes=1, steps=5).near_zero_mass.error)


@pytest.mark.parametrize("edges", [(-1e-3, 1e-3), (-math.inf, -0.05), (0.4, 1.7), (-3.0, 7.0), (5.0, math.inf)])
def test_bounds_hold_what_is_there(values, edges):
    """The measure of every probe lies between the bounds, and more steps make the bounds tighter."""
    op = matrix(values)
    exact, vectors = torch.linalg.eigh(op.matrix)
    v = probe(op, 0, 0)
    measure = (vectors.T @ (v / v.norm())).square()
    low, high = edges
    inside = measure[(exact >= low) & (exact < high)].sum().item()
    widths = []
    for steps in (1, 2, 3, 7, 20, 60, 200):
        found = spectrum(op, probes=1, steps=steps)
        least, most = found.bounds(low, high)
        assert least - 1e-9 <= inside <= most + 1e-9
        assert least - 1e-9 <= found.mass(low, high).value <= most + 1e-9
        widths.append(most - least)
    assert all(b <= a + 1e-9 for a, b in itertools.pairwise(widths))
    assert widths[-1] < 1e-6


def test_bounds_are_the_sharpest():
    """They differ by the Christoffel number at the edge, one over the sum of squared orthonormal polynomials there."""
    torch.manual_seed(0)
    values = torch.randn(500).double()
    op = matrix(values)
    for steps in (1, 5, 12):
        found = spectrum(op, probes=1, steps=steps)
        (process,) = lanczos(op, [probe(op, 0, 0)], steps, [Basis(steps, op)])
        for x in (-0.7, 0.01, 1.3):
            before, now, total, below = 0.0, 1.0, 1.0, 0.0
            for k in range(steps):
                after = process.beta[k].item() if k + 1 < steps else process.residual
                following = ((x - process.alpha[k].item()) * now - below * before) / after
                before, now, below = now, following, after
                total += now**2
            least, most = found.bounds(-math.inf, x)
            assert most - least == pytest.approx(1 / total, rel=1e-6)


def test_a_threshold_that_the_steps_do_not_resolve():
    """The node of a narrow bulk falls inside the threshold or outside, and only the bounds know."""
    torch.manual_seed(0)
    op = matrix(torch.cat([torch.randn(1500).abs() * 0.05, torch.rand(100) * 10]))
    found = spectrum(op, probes=5, steps=40, near_zero=1.5e-3)
    least, most = found.near_zero_bounds
    assert least == 0
    assert most > 0.05
    least, most = spectrum(op, probes=5, steps=40, near_zero=0.5).near_zero_bounds
    assert most - least < 0.05


def test_residuals_bound_the_distance_to_an_eigenvalue(values):
    op = matrix(values)
    found = spectrum(op, probes=2, steps=12)
    for ritz, residuals in zip(found.ritz, found.residuals, strict=True):
        distance = (ritz[:, None] - values).abs().min(1).values
        assert bool((distance <= residuals + 1e-12 * values.abs().max()).all())


def test_density_integrates_to_one(values):
    found = spectrum(matrix(values), probes=5, steps=40)
    for sigma in (None, 0.01 * values.abs().max().item()):
        points, density, error = found.density(sigma=sigma)
        assert torch.trapezoid(density, points).item() == pytest.approx(1, abs=2e-3)
        assert density.shape == error.shape == points.shape
        assert (error >= 0).all()
    with pytest.raises(ValueError, match="sigma is -1"):
        found.density(sigma=-1)


def test_an_invariant_subspace_ends_the_process():
    """Three distinct eigenvalues take three steps, and the quadrature is then exact."""
    op = matrix(torch.cat([torch.full((50,), -1.0), torch.full((100,), 0.5), torch.full((50,), 4.0)]))
    found = spectrum(op, probes=3, steps=40)
    for ritz, residuals in zip(found.ritz, found.residuals, strict=True):
        torch.testing.assert_close(ritz, torch.tensor([-1.0, 0.5, 4.0], dtype=torch.float64))
        assert torch.equal(residuals, torch.zeros(3, dtype=torch.float64))
    zero = MatrixMap(torch.zeros(7, 7))
    assert [len(t) for t in spectrum(zero, 2, 5).ritz] == [1, 1]
    assert spectrum(zero, 2, 5).near_zero_mass.value == pytest.approx(1)
    one = MatrixMap(torch.tensor([[2.0]]))
    assert spectrum(one, 2, 5).lambda_max == pytest.approx(2)
    assert torch.isfinite(spectrum(zero, 2, 5).density()[1]).all()


@pytest.mark.parametrize("options", [{"basis_dtype": torch.bfloat16}, {"basis_device": "cpu"}], ids=str)
def test_a_smaller_basis(options):
    """A basis of 16 bits still keeps ghosts away, and costs its rounding only."""
    torch.manual_seed(0)
    values = torch.cat([torch.randn(1990).abs() * 1e-3, torch.tensor([1, 2, 3, 4, 5, 6, 7, 8, 9.0, -2])]).double()
    op = matrix(values, torch.float32)
    full, small = spectrum(op, 3, 60), spectrum(op, 3, 60, **options)
    assert small.lambda_max == pytest.approx(full.lambda_max, rel=1e-5)
    assert small.lambda_min == pytest.approx(full.lambda_min, rel=1e-5)
    for i in range(3):
        assert ((full.ritz[i] - 9).abs() < 0.1).sum() == ((small.ritz[i] - 9).abs() < 0.1).sum() == 1
    assert small.near_zero_mass.value == pytest.approx(full.near_zero_mass.value, abs=1e-3)
    size = 2 if "basis_dtype" in options else 4
    assert small.settings["basis_bytes"] == 60 * 2000 * size


@pytest.mark.parametrize("basis_dtype", [None, torch.bfloat16])
def test_nothing_else_grows_with_parameters_times_steps(basis_dtype):
    """Memory during the last step: the basis, and a few vectors that do not depend on the number of steps."""
    n = 5003

    class Diagonal:
        def __init__(self):
            self.n, self.dtype, self.device = n, torch.float32, torch.device("cpu")
            self.values = torch.linspace(-1, 2, n)

        def products(self, vectors):
            return [self.values * v for v in vectors]

    def alive(_):
        calls.append(1)
        if len(calls) not in (1, 2 * steps + 1):  # before the first step, and after the last one
            return
        tensors = [x for x in gc.get_objects() if type(x) is torch.Tensor and x.numel() >= n]
        held.append(sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values()))

    extra = []
    for steps in (5, 25):
        held, calls = [], []
        alive(None)
        found = spectrum(Diagonal(), 2, steps, basis_dtype=basis_dtype, advance=alive)
        extra.append(max(held) - held[0] - found.settings["basis_bytes"])
        assert found.settings["basis_bytes"] == steps * n * (2 if basis_dtype else 4)
    assert extra[0] == extra[1] <= 6 * 4 * n


def test_json_round_trip():
    found = spectrum(matrix(SPECTRA["negative"]), 3, 10)
    again = Spectrum.from_dict(json.loads(json.dumps(found.to_dict(), allow_nan=False)))
    assert again.to_dict() == found.to_dict()
    assert json.loads(json.dumps(spectrum(matrix(SPECTRA["negative"]), 1, 10).to_dict(), allow_nan=False))


def test_progress_counts_products():
    calls = []
    spectrum(matrix(SPECTRA["negative"]), 5, 7, block=2, advance=calls.append)
    assert sum(calls) == 35
    calls.clear()
    trace(matrix(SPECTRA["negative"]), 12, "hutch++", advance=calls.append)
    assert sum(calls) == 12


@pytest.mark.parametrize("which", ["both", "largest", "smallest"])
@pytest.mark.parametrize("k", [1, 3])
def test_eigs(values, which, k):
    op = matrix(values)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = eigs(op, k, which, max_products=6000)
    exact = torch.linalg.eigvalsh(op.matrix)
    wanted = torch.cat(
        [exact[:k] if which != "largest" else exact[:0], exact[-k:] if which != "smallest" else exact[:0]]
    )
    size = exact.abs().max().item()
    assert (found.values - wanted).abs().max() < 1e-6 * size
    y = found.vectors
    torch.testing.assert_close(y @ y.T, torch.eye(len(y), dtype=torch.float64), atol=1e-10, rtol=0)
    residuals = (y @ op.matrix - found.values[:, None] * y).norm(dim=1)
    assert residuals.max() < 1.01e-6 * size
    assert found.converged
    assert found.products <= 6000 + 2 * k
    torch.testing.assert_close(found.residuals, residuals, atol=1e-10, rtol=1e-6)


def test_eigs_finds_every_copy():
    values = torch.cat([torch.linspace(-1, 1, 100), torch.full((4,), 3.0), torch.full((2,), -2.0)])
    found = eigs(matrix(values), 5)
    wanted = torch.tensor([-2, -2, -1, -1 + 2 / 99, -1 + 4 / 99, 1, 3, 3, 3, 3], dtype=torch.float64)
    torch.testing.assert_close(found.values, wanted, atol=1e-7, rtol=0)
    assert eigs(MatrixMap(torch.eye(6)), 3).values.tolist() == pytest.approx([1] * 6)
    assert eigs(MatrixMap(torch.zeros(6, 6)), 2).values.tolist() == [0] * 4


def test_eigs_says_when_it_has_not_converged():
    with pytest.warns(UserWarning, match="after 60 products the largest residual is"):
        found = eigs(matrix(SPECTRA["tiny"]), 4, tol=1e-12, max_products=10)
    assert not found.converged
    assert found.residuals.max() > 1e-11


@pytest.mark.parametrize("method", ["hutchinson", "hutch++"])
def test_trace_within_its_error_bars(values, method):
    op = matrix(values)
    inside = 0
    for seed in range(10):
        found = trace(op, 90, method, seed=seed)
        inside += abs(found.value - values.sum().item()) <= 2 * found.error
        assert found.error >= 0
    # Two standard errors cover 95%; with 30 and 60 samples slightly less.
    assert inside >= 8


def test_hutch_plus_plus_is_better_where_eigenvalues_decay():
    op = matrix(torch.logspace(-20, 3, 200))
    plain, better = trace(op, 60), trace(op, 60, "hutch++")
    assert better.error < 0.1 * plain.error
    assert trace(matrix(torch.arange(8.0)), 60, "hutch++").value == pytest.approx(28)


@given(seed=st.integers(0, 1000), n=st.integers(1, 30), steps=st.integers(1, 40))
@settings(max_examples=40, deadline=None)
def test_any_symmetric_matrix(seed, n, steps):
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(n, n, dtype=torch.float64, generator=generator)
    op = MatrixMap(a + a.T)
    exact = torch.linalg.eigvalsh(op.matrix)
    found = spectrum(op, 2, steps, seed=seed)
    slack = 1e-9 * exact.abs().max()
    assert exact[0] - slack <= found.lambda_min <= found.lambda_max <= exact[-1] + slack
    if steps >= n:
        assert found.lambda_max == pytest.approx(exact[-1].item(), abs=1e-6)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda op: spectrum(op, probes=0), "probes is 0"),
        (lambda op: spectrum(op, steps=0), "steps is 0"),
        (lambda op: spectrum(op, block=0), "block is 0"),
        (lambda op: spectrum(op, basis_dtype=torch.float16), "basis dtype is torch.float16"),
        (lambda op: trace(op, 10, "exact"), "method is 'exact'"),
        (lambda op: trace(op, 1), "products is 1, must be at least 2"),
        (lambda op: trace(op, 5, "hutch++"), "products is 5, must be at least 6"),
        (lambda op: eigs(op, 0), "k is 0"),
        (lambda op: eigs(op, 3), "k is 3, must be at least 1 and at most 2"),
        (lambda op: eigs(op, 1, "lowest"), "which is 'lowest'"),
        (lambda op: eigs(MatrixMap(torch.eye(90)), 3, basis=4), "basis is 4, must be at least 8"),
    ],
)
def test_errors(call, words):
    with pytest.raises(ValueError, match=words):
        call(MatrixMap(torch.eye(4)))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_products_that_are_not_finite(bad):
    a = torch.eye(20)
    a[3, 4] = a[4, 3] = bad
    for call in (spectrum, eigs, trace, lambda op: trace(op, 9, "hutch++")):
        with pytest.raises(NotFiniteError, match="NaN or infinity"):
            call(MatrixMap(a))


def test_zero_start_vectors_are_refused():
    op = MatrixMap(torch.eye(3))
    with pytest.raises(ValueError, match="start vector is zero"):
        lanczos(op, [torch.zeros(3)], 2, [Basis(2, op)])
