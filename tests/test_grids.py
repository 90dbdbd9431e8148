"""The table of schemes, and how scales start."""

import math

import pytest
import torch

import qatkernels as qk
from qatkernels import grids
from qatkernels.grids import MIN_SCALE, SCHEMES, GridConstants
from qatkernels.testing.samples import GRIDS


@pytest.mark.parametrize(
    ("grid", "values"),
    [
        (grids.binary(), (-1, 1)),
        (grids.ternary(), (-2 / 3, 0, 2 / 3)),
        (grids.seq(2), (-0.75, -0.25, 0.25, 0.75)),
        (grids.lsq(2), (-2, -1, 0, 1)),
        (grids.lsq(3), (-4, -3, -2, -1, 0, 1, 2, 3)),
        (grids.affine(2), (0, 1, 2, 3)),
    ],
    ids=lambda g: getattr(g, "scheme", ""),
)
def test_values(grid, values):
    assert grid.values == pytest.approx(values)
    w = torch.linspace(-5, 5, 1001)
    reached = qk.fake_quantize(w, torch.tensor(1.0), grid).unique()
    torch.testing.assert_close(reached, torch.tensor(values, dtype=torch.float32))


@pytest.mark.parametrize("grid", GRIDS, ids=lambda g: f"{g.scheme}{g.bits}")
def test_codes_fit_their_bits(grid):
    assert grid.levels <= 2**grid.storage_bits < 2 * grid.levels
    info = torch.iinfo(grid.code_dtype)
    assert info.min <= grid.code_min < grid.code_max <= info.max
    assert len(grid.constants) == len(GridConstants._fields)
    assert all(isinstance(c, float) for c in grid.constants)
    codes = qk.quantize(torch.linspace(-300, 300, 10001), torch.tensor(1.0), grid)
    assert codes.min() == grid.code_min
    assert codes.max() == grid.code_max


@pytest.mark.parametrize(
    ("bits", "scheme", "levels"),
    [(1, "binary", 2), (1.58, "ternary", 3), (2, "seq", 4)] + [(b, "lsq", 2**b) for b in (3, 4, 5, 6, 8)],
)
def test_paretoq(bits, scheme, levels):
    grid = grids.paretoq(bits)
    assert (grid.scheme, grid.bits, grid.levels) == (scheme, bits, levels)
    assert grids.make_grid("paretoq", bits) == grid
    assert grids.make_grid(scheme, bits) == grid
    assert hash(grid) == hash(grids.paretoq(bits))


@pytest.mark.parametrize(
    ("make", "bits"),
    [
        (grids.paretoq, 7), (grids.lsq, 1), (grids.lsq, 9), (grids.seq, 2.5), (grids.affine, 0), (grids.binary, 2),
        (grids.ternary, 2),
    ],
)  # fmt: skip
def test_wrong_bits(make, bits):
    with pytest.raises(ValueError, match="bits is"):
        make(bits)


def test_unknown_scheme():
    with pytest.raises(ValueError, match=r"scheme is 'int4'.*affine"):
        grids.make_grid("int4", 4)


def test_grad_scale():
    for bits, qmax in ((1, 1), (1.58, 1), (2, 1), (3, 3), (4, 7), (8, 127)):
        assert grids.paretoq(bits).grad_scale(100) == pytest.approx(1 / math.sqrt(100 * qmax))
    assert grids.affine(4).grad_scale(100) == pytest.approx(1 / math.sqrt(1500))


W = torch.tensor([[0.5, -1.0, 0.25, 0.25], [2.0, 1.0, -6.0, 3.0]])


def test_init_scale():
    torch.testing.assert_close(grids.binary().init_scale(W), torch.tensor([0.5, 3.0]))
    torch.testing.assert_close(grids.ternary().init_scale(W), torch.tensor([1.0, 6.0]))
    torch.testing.assert_close(grids.seq(2).init_scale(W), torch.tensor([1.0, 6.0]))
    torch.testing.assert_close(grids.lsq(4).init_scale(W), torch.tensor([1.0, 6.0]) / 7)
    torch.testing.assert_close(grids.lsq(4).init_scale(W, per_tensor=True), torch.tensor(6 / 7))
    torch.testing.assert_close(grids.lsq(4).init_scale(W, 2), torch.tensor([[1.0, 0.25], [2.0, 6.0]]) / 7)
    torch.testing.assert_close(grids.lsq(4).init_scale(W, method="lsq"), 2 * torch.tensor([0.5, 3.0]) / math.sqrt(7))
    torch.testing.assert_close(grids.affine(4).init_scale(W), torch.tensor([1.5, 9.0]) / 15)
    assert grids.lsq(4).init_scale(torch.zeros(2, 3)).tolist() == pytest.approx([MIN_SCALE] * 2)
    assert grids.lsq(4).init_scale(W.bfloat16()).dtype == torch.float32


def test_affine_covers_the_weights():
    grid = grids.affine(8)
    w = torch.randn(16, 64) + 0.3
    scale = grid.init_scale(w, 16)
    zero = grid.init_zero_point(w, scale, 16)
    assert torch.equal(zero, zero.round())
    y = qk.fake_quantize(w, scale, grid, group_size=16, zero_point=zero)
    assert ((y - w).abs() <= scale.repeat_interleave(16, 1) * 1.01).all()
    assert torch.equal(
        qk.fake_quantize(torch.zeros(16, 64), scale, grid, group_size=16, zero_point=zero), torch.zeros(16, 64)
    )


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: grids.lsq(4).init_scale(W, 3), "group_size is 3.*4"),
        (lambda: grids.lsq(4).init_scale(W, 2, per_tensor=True), "per_tensor"),
        (lambda: grids.lsq(4).init_scale(W, method="best"), "method is 'best'"),
        (lambda: grids.lsq(4).init_scale(W.int()), "w is torch.int32"),
        (lambda: grids.lsq(4).init_scale(torch.empty(0, 3)), r"w is.*\(0, 3\)"),
        (lambda: grids.lsq(4).init_zero_point(W, W[:, 0]), "no zero point"),
    ],
)
def test_init_errors(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_schemes_are_named_as_they_are_built():
    for name, build in SCHEMES.items():
        assert build({"binary": 1, "ternary": 1.58}.get(name, 4)).scheme == name
