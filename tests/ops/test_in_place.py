"""Ops that change weights in place: WinQ's reset and the perturbation of sharpness-aware minimization."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.library import opcheck

import qatkernels as qk
from qatkernels.backends import IMPLS
from qatkernels.ops import perturb_, perturb_swap_, perturbation_norms, reset_
from qatkernels.ops._op import define
from qatkernels.ops.contract import FLOATS
from qatkernels.testing.compare import (
    assert_same_bits,
    assert_within,
    check_in_place,
    check_norms,
    run_out,
    special_calls,
)
from qatkernels.testing.samples import GRIDS, make, perturbations, weights
from tests.implementations import implementations, moved, samples_on

SAMPLES = samples_on(torch.device("cpu"))


def quantized(sample, w):
    extra = {"group_size": sample.group_size, "zero_point": sample.zero_point}
    return (
        qk.quantize(w, sample.scale, sample.grid, **extra),
        qk.fake_quantize(w, sample.scale, sample.grid, **extra),
    )


def reset(sample, w, quantized_weight):
    extra = {"group_size": sample.group_size, "zero_point": sample.zero_point}
    return reset_(w.clone(), sample.scale, sample.grid, quantized_weight, **extra)


class TestReset:
    @pytest.mark.backends
    @pytest.mark.parametrize("sample", SAMPLES, ids=lambda s: s.name)
    def test_backends(self, sample):
        for _, impl, device in implementations("reset_"):
            check_in_place("reset_", impl, moved(sample.args("reset_"), device), sample.name)

    @pytest.mark.backends
    @pytest.mark.parametrize("dtype", FLOATS)
    @pytest.mark.parametrize("grid", GRIDS, ids=lambda g: f"{g.scheme}{g.bits}")
    def test_special_values(self, grid, dtype):
        w, scale, zero_point, constants, *_ = special_calls(grid, dtype)["quantize"]
        for _, impl, device in implementations("reset_"):
            for weight in (0.0, 0.4, 1.0):
                check_in_place("reset_", impl, moved((w, scale, zero_point, constants, weight), device))

    @pytest.mark.backends
    def test_float64_and_rows_in_pieces(self):
        for grid in (qk.grids.binary(), qk.grids.seq(2), qk.grids.affine(4)):
            for sample in (make(grid, (3, 40), torch.float64, 8), make(grid, (2, 40000)), make(grid, (3000, 5))):
                for _, impl, device in implementations("reset_"):
                    check_in_place("reset_", impl, moved(sample.args("reset_"), device), sample.name)

    def test_is_the_formula(self):
        w, scale = weights((16, 64), torch.float64), torch.rand(16, dtype=torch.float64) * 0.05 + 0.01
        before = w.clone()
        assert reset_(w, scale, qk.grids.lsq(3), 0.3) is w
        expected = 0.7 * before + 0.3 * qk.fake_quantize(before, scale, qk.grids.lsq(3))
        torch.testing.assert_close(w, expected, rtol=1e-14, atol=0)

    def test_the_ends(self):
        for sample in SAMPLES:
            assert_same_bits(reset(sample, sample.w, 0.0), sample.w, sample.name)
            assert_same_bits(reset(sample, sample.w, 1.0), quantized(sample, sample.w)[1].to(sample.w.dtype))

    @pytest.mark.parametrize("grid", GRIDS, ids=lambda g: f"{g.scheme}{g.bits}")
    @settings(max_examples=60, deadline=None)
    @given(data=st.data())
    def test_changes_no_code(self, grid, data):
        """Whatever the weights, scales, zero points and dtype: codes and quantized values are the same bits."""
        dtype = data.draw(st.sampled_from(FLOATS))
        quantized_weight = data.draw(st.floats(0, 1))
        seed = data.draw(st.integers(0, 2**32 - 1))
        generator = torch.Generator().manual_seed(seed)
        scale = 10.0 ** (torch.rand(4, generator=generator) * 8 - 6)
        zero_point = None
        if grid.has_zero_point:
            zero_point = torch.rand(4, generator=generator) * grid.code_max
            zero_point = data.draw(st.sampled_from([zero_point, zero_point.round(), zero_point * 100]))
        # Ties of every level and what is a few units in the last place around them, then anything at all.
        ties = torch.arange(grid.code_min - 1, grid.code_max + 2) + 0.5
        pick = ties[torch.randint(len(ties), (4, 64), generator=generator)] + grid.offset
        near = (pick / grid.steps * scale.view(-1, 1)).view(torch.int32)
        near = (near + torch.randint(-3, 4, near.shape, generator=generator).int()).view(torch.float32).nan_to_num()
        spread = 4 * scale.view(-1, 1) * max(abs(v) for v in grid.values)
        w = torch.cat([near, torch.randn(4, 64, generator=generator) * spread], 1).to(dtype)
        codes = qk.quantize(w, scale, grid, zero_point=zero_point)
        values = qk.fake_quantize(w, scale, grid, zero_point=zero_point)
        after = reset_(w.clone(), scale, grid, quantized_weight, zero_point=zero_point)
        assert torch.equal(qk.quantize(after, scale, grid, zero_point=zero_point), codes)
        assert_same_bits(qk.fake_quantize(after, scale, grid, zero_point=zero_point), values)
        rounding = torch.finfo(dtype).eps * w.abs()
        nearer = (after - values).abs() <= (w - values).abs() + rounding
        assert bool((nearer | ~values.isfinite() | ~w.isfinite()).all()), "a weight moved away from the grid"

    def test_where_the_formula_alone_would_change_codes(self):
        """Eight bits with a zero point in bfloat16: quantized values are rounded to where they are other codes."""
        grid, generator = qk.grids.affine(8), torch.Generator().manual_seed(0)
        scale, zero_point = torch.linspace(0.01, 0.02, 64), torch.arange(64.0)
        ties = torch.randint(256, (64, 512), generator=generator) + 0.5 - zero_point.view(-1, 1)
        w = (ties * scale.view(-1, 1)).bfloat16()
        plain = qk.fake_quantize(w.float(), scale, grid, zero_point=zero_point).bfloat16()
        codes = qk.quantize(w, scale, grid, zero_point=zero_point)
        same = qk.quantize(plain, scale, grid, zero_point=zero_point) == codes
        after = reset_(w.clone(), scale, grid, 1.0, zero_point=zero_point)
        assert not same.all()
        assert torch.equal(qk.quantize(after, scale, grid, zero_point=zero_point), codes)
        assert_same_bits(after, torch.where(same, plain, w))

    def test_non_finite_weights_stay(self):
        w = torch.tensor([[torch.nan, torch.inf, -torch.inf, 0.3]])
        after = reset_(w.clone(), torch.tensor([0.25]), qk.grids.lsq(4), 1.0)
        assert_same_bits(after, torch.tensor([[torch.nan, torch.inf, -torch.inf, 0.25]]))
        assert_same_bits(reset_(w.clone(), torch.tensor([torch.nan]), qk.grids.lsq(4), 0.5), w)

    def test_in_place_on_parameters_and_views(self):
        weight = torch.nn.Parameter(torch.randn(8, 16))
        expected = reset_(weight.detach().clone(), torch.full((8,), 0.1), qk.grids.lsq(4), 0.5)
        version = weight._version
        reset_(weight, torch.full((8,), 0.1), qk.grids.lsq(4), 0.5)
        assert_same_bits(weight.detach(), expected)
        assert weight._version > version
        base = torch.randn(16, 8)
        expected = reset_(base.t().contiguous(), torch.full((8,), 0.1), qk.grids.lsq(4), 0.5)
        reset_(base.t(), torch.full((8,), 0.1), qk.grids.lsq(4), 0.5)
        assert_same_bits(base.t().contiguous(), expected)

    def test_opcheck(self):
        sample = make(qk.grids.affine(4), (4, 24))
        opcheck(torch.ops.qatkernels.reset_.default, sample.args("reset_"))

    def test_errors(self):
        w, scale = torch.randn(4, 12), torch.ones(4)
        for bad in (-0.1, 1.1, torch.nan):
            with pytest.raises(ValueError, match=r"quantized_weight is .*\[0, 1\]"):
                reset_(w, scale, qk.grids.lsq(4), bad)
        with pytest.raises(ValueError, match="scale has shape"):
            reset_(w, torch.ones(3), qk.grids.lsq(4), 0.5)
        with pytest.raises(RuntimeError, match="contiguous"):
            torch.ops.qatkernels.reset_(w.t(), torch.ones(12), None, list(qk.grids.lsq(4).constants), 0.5)


class TestPerturb:
    @pytest.mark.backends
    @pytest.mark.parametrize("op", ["perturb_", "perturb_swap_"])
    def test_backends(self, op):
        for _, impl, device in implementations(op):
            for args in perturbations(op, device):
                check_in_place(op, impl, args, f"{args[0].dtype} {tuple(args[0].shape)}")

    @pytest.mark.backends
    def test_norms(self):
        for _, impl, device in implementations("perturbation_norms"):
            for g, w, eta in perturbations("perturbation_norms", device):
                check_norms(impl, g, w, eta)

    def test_norms_do_not_depend_on_threads(self):
        g = weights((333, 1001), torch.float32)
        threads = torch.get_num_threads()
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(run_out("perturbation_norms", IMPLS["perturbation_norms_out"]["cpp"], (g, g, 0.1))[0])
        torch.set_num_threads(threads)
        assert_same_bits(results[1], results[0])
        assert_same_bits(results[2], results[0])

    def test_norms_against_torch(self):
        w, g = torch.randn(50, 60), torch.randn(50, 60)
        torch.testing.assert_close(perturbation_norms(g)[0].sqrt().float(), g.norm())
        size = w.abs() + 0.01
        once, twice = perturbation_norms(g, w, 0.01).sqrt().float()
        torch.testing.assert_close(once, (size * g).norm())
        torch.testing.assert_close(twice, (size * size * g).norm())

    @pytest.mark.parametrize("eta", [None, 0.01])
    def test_is_the_formula(self, eta):
        w, g = weights((9, 33), torch.float64), weights((9, 33), torch.float64, seed=1)
        size = 1 if eta is None else (w.abs() + eta).square()
        expected = w + 2 * size * g
        for function in (perturb_, perturb_swap_):
            changed = w.clone()
            assert function(changed, g.clone(), torch.tensor(2.0), eta) is changed
            torch.testing.assert_close(changed, expected, rtol=1e-14, atol=1e-300)

    @pytest.mark.parametrize("dtype", FLOATS)
    def test_swap_restores_every_bit(self, dtype):
        w, g = weights((9, 333), dtype), weights((9, 333), dtype, seed=1) * 1e4
        w[0, 0], w[1, 1], g[2, 2], g[3, 3] = torch.nan, -0.0, torch.nan, torch.inf
        changed, kept = w.clone(), g.clone()
        perturb_swap_(changed, kept, torch.tensor(0.3))
        assert not torch.equal(changed, w)
        assert_same_bits(kept, w)
        assert_same_bits(changed.copy_(kept), w)

    def test_autograd_sees_versions_but_no_change(self):
        y = torch.randn(4, requires_grad=True) * 1
        version = y._version
        perturb_(y, torch.ones(4), torch.tensor(1.0))
        assert y._version > version
        assert y.grad_fn is not None

    def test_opcheck(self):
        w, g, factor = torch.randn(3, 8), torch.randn(3, 8), torch.tensor(0.1)
        opcheck(torch.ops.qatkernels.perturb_.default, (w, g, factor, 0.01))
        opcheck(torch.ops.qatkernels.perturb_swap_.default, (w, g, factor, None))
        opcheck(torch.ops.qatkernels.perturbation_norms.default, (g, w, 0.01))

    def test_errors(self):
        w, g, factor = torch.randn(4, 4), torch.randn(4, 4), torch.tensor(1.0)
        for bad, words in (
            ((w, g[:2], factor), "w has shape .*must be"),
            ((w.double(), g, factor), "w is torch.float64"),
            ((w.t(), g, factor), "strides"),
            ((w, g.int(), factor), "g is torch.int32"),
            ((w, g, factor.double()), "factor is torch.float64"),
            ((w, g, torch.ones(2)), "factor has shape .2,., must have one element"),
            ((w, g, factor, -1.0), "eta is -1"),
        ):
            for function in (perturb_, perturb_swap_):
                with pytest.raises(RuntimeError, match=words):
                    function(*bad)
        with pytest.raises(RuntimeError, match=r"w is torch\.bfloat16"):
            perturb_swap_(w.bfloat16(), g, factor)
        with pytest.raises(RuntimeError, match=r"w has shape \(2, 4\), must be \(4, 4\)"):
            perturbation_norms(g, w[:2])


def test_the_bound_of_the_norms_is_tight_enough_to_notice_one_element():
    g = torch.ones(1000)
    expected = torch.tensor([1000.0], dtype=torch.float64)
    with pytest.raises(AssertionError):
        assert_within(perturbation_norms(g[:-1])[:1], expected, 136 * torch.finfo(torch.float32).eps * expected)


def test_names_of_ops_in_place():
    for name, contract in (("makes_", "x: float\n-> out: like(x) []"), ("changes", "x: float [K]")):
        with pytest.raises(ValueError, match=name):
            define(name, "Tensor x", contract, reference=lambda x: x)
