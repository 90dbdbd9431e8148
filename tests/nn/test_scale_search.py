"""Scales by search: never worse than those of a formula, near the best there are, and used wherever scales are set."""

import itertools

import pytest
import torch
from torch import nn

import qatkernels as qk
from qatkernels.grids import MIN_SCALE, affine, binary, lsq, seq, ternary
from qatkernels.nn import GroupedQuantLinear, QuantConfig, QuantLinear, search_scale
from qatkernels.nn.quantizer import initial_scale, stored_scale
from qatkernels.nn.replay import check_calibrated
from qatkernels.ops import quantization_error
from qatkernels.testing.samples import GRIDS

SMALL = (binary(), ternary(), seq(2), lsq(2), lsq(3), lsq(4), affine(2), affine(3))
NAME = {"ids": lambda grid: f"{grid.scheme}{grid.bits}"}


def weights(*shape, seed=0):
    """Rows that are normal, heavy-tailed, shifted, sparse, tiny, constant and zero, in turn."""
    draw = torch.Generator().manual_seed(seed)
    w = torch.randn(shape, generator=draw)
    rows = w.view(-1, shape[-1])
    rows[1::7] = rows[1::7] ** 5
    rows[2::7] += 1.5
    rows[3::7] *= torch.rand(rows[3::7].shape, generator=draw) < 0.2
    rows[4::7] *= 1e-7
    rows[5::7] = rows[5::7, :1]
    rows[6::7] = 0
    return w


def error_of(w, scale, zero_point, grid, group_size=None, moments=None):
    return quantization_error(w, scale, grid, group_size=group_size, zero_point=zero_point, moments=moments)


@pytest.mark.parametrize("weighted", [False, True], ids=["mse", "activation"])
@pytest.mark.parametrize("granularity", ["row", "tensor", 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("grid", GRIDS, **NAME)
def test_no_scale_is_worse_than_that_of_a_formula(grid, dtype, granularity, weighted):
    w = weights(14, 32).to(dtype)
    moments = torch.rand(32, dtype=torch.float64) ** 3 if weighted else None
    group_size, per_tensor = (8, False) if granularity == 8 else (None, granularity == "tensor")
    scale, zero_point = search_scale(w, grid, group_size, per_tensor=per_tensor, moments=moments)
    assert scale.dtype == torch.float32
    assert scale.shape == {"row": (14,), "tensor": (1,), 8: (14, 4)}[granularity]
    assert bool((scale >= MIN_SCALE).all())
    if zero_point is not None:
        assert torch.equal(zero_point, zero_point.round().clamp(grid.code_min, grid.code_max))
    found = error_of(w, scale, zero_point, grid, group_size, moments)
    for method in ("max", "mean", "lsq", *(["range"] if grid.has_zero_point else [])):
        other = grid.init_scale(w, group_size, per_tensor=per_tensor, method=method).float()
        its_zero = grid.init_zero_point(w, other, group_size).float() if grid.has_zero_point else None
        assert bool((found <= error_of(w, other, its_zero, grid, group_size, moments)).all()), method


@pytest.mark.parametrize("weighted", [False, True], ids=["mse", "activation"])
@pytest.mark.parametrize("grid", SMALL, **NAME)
def test_is_near_the_best_of_many(grid, weighted):
    """Brute force tries 2,000 scales with every zero point. A search may settle in another minimum, hardly worse."""
    w = torch.randn(24, 16, generator=torch.Generator().manual_seed(1))
    moments = torch.rand(16, generator=torch.Generator().manual_seed(2), dtype=torch.float64) if weighted else None
    found = error_of(w, *search_scale(w, grid, moments=moments), grid, moments=moments)
    largest = 4 * w.abs().amax(-1) / (max(grid.values) - min(0, *grid.values)) * (1 + grid.has_zero_point)
    best = torch.full_like(found, torch.inf)
    steps = 2000 // (grid.levels if grid.has_zero_point else 1)
    for step, z in itertools.product(range(1, steps), range(grid.levels) if grid.has_zero_point else (None,)):
        scale = largest * (step / steps)
        zero_point = None if z is None else torch.full_like(scale, z)
        best = torch.minimum(best, error_of(w, scale, zero_point, grid, moments=moments))
    assert float(found.sum() / best.sum()) < 1.02
    assert float((found / best).max()) < 1.35


def test_binary_is_the_weighted_mean_of_magnitudes():
    """The best scale of a sign is known."""
    w, moments = torch.randn(6, 40), torch.rand(40, dtype=torch.float64)
    torch.testing.assert_close(search_scale(w, binary())[0], w.abs().mean(-1))
    wanted = (w.abs() * moments).sum(-1) / moments.sum()
    scale, _ = search_scale(w, binary(), moments=moments)
    torch.testing.assert_close(scale.double(), wanted, rtol=2e-3, atol=0)


def test_weights_on_the_grid_are_kept():
    """But for the distance of the last candidates, below 0.1%: its square is the relative error."""
    for grid in (ternary(), seq(2), lsq(3), lsq(4)):
        values = torch.tensor(grid.values, dtype=torch.float32)
        w = values[torch.arange(64) % len(values)].view(4, 16)
        scale, _ = search_scale(w, grid)
        assert bool((error_of(w, scale, None, grid) <= 1e-6 * w.double().square().sum(-1)).all()), grid.scheme


def test_features_without_moments_count_all_alike():
    """A group whose inputs were all zero gets the scale of "mse"; the factor of all moments is of no matter."""
    w, moments = torch.randn(5, 16), torch.rand(16, dtype=torch.float64)
    moments[:8] = 0
    scale, _ = search_scale(w, lsq(3), 8, moments=moments)
    plain, _ = search_scale(w, lsq(3), 8)
    assert torch.equal(scale[:, 0], plain[:, 0])
    assert not torch.equal(scale[:, 1], plain[:, 1])
    assert torch.equal(search_scale(w, lsq(3), 8, moments=moments * 2.0**20)[0], scale)


def test_a_stack_is_its_experts():
    w, moments = torch.randn(3, 6, 16), torch.rand(3, 16, dtype=torch.float64)
    for settings in ({}, {"group_size": 4}, {"per_tensor": True}):
        for grid in (seq(2), affine(4)):
            together = search_scale(w, grid, moments=moments, **settings)
            for e in range(3):
                alone = search_scale(w[e], grid, moments=moments[e], **settings)
                for one, all_of_them in zip(alone, together, strict=True):
                    assert one is all_of_them is None or torch.equal(one.view(all_of_them[e].shape), all_of_them[e])


def test_errors_are_those_of_the_scale_as_it_is_stored():
    """Stored as a power of two, there are few scales to try: the best one is found."""
    w = torch.randn(64, 32)

    def stored(scale):
        return scale.log2().round().exp2()

    errors = torch.stack([error_of(w, torch.full((64,), 2.0**n), None, lsq(3)) for n in range(-10, 5)])
    found = error_of(w, stored(search_scale(w, lsq(3), stored=stored)[0]), None, lsq(3))
    assert torch.equal(found, errors.amin(0))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_scale_dtype(dtype):
    """No scale is worse than that of a formula once both are stored."""
    w, config = torch.randn(64, 32), QuantConfig(3, group_size=8, scale_init="mse", scale_dtype=dtype)
    found, other = (
        error_of(w, stored_scale(initial_scale(w, c)[0], config.scale_dtype, config.grid), None, config.grid, 8)
        for c in (config, QuantConfig(3, group_size=8))
    )
    assert bool((found <= other).all())


def test_refusals():
    w = torch.randn(4, 8)
    with pytest.raises(ValueError, match="group_size is 3"):
        search_scale(w, lsq(4), 3)
    with pytest.raises(ValueError, match=r"moments has shape \(4,\), must be \(8,\)"):
        search_scale(w, lsq(4), moments=torch.ones(4))


@pytest.mark.parametrize("init", ["mse", "activation"])
def test_wherever_scales_are_set(init):
    """Quantizing, resetting, loading weights and requantizing search; a state dict brings its own scales.

    "activation" waits for inputs, so it does not search yet.
    """
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 16))
    config = QuantConfig(2, group_size=8, scale_init=init)
    weight = model[0].weight.detach()

    def set_from(weight):
        return search_scale(weight, config.grid, 8)[0] if init == "mse" else config.grid.init_scale(weight, 8)

    wanted = set_from(weight)
    qk.quantize_model(model, config)
    assert torch.equal(model[0].scale, wanted)
    with torch.no_grad():
        model[0].scale.fill_(1)
    model[0].reset_scale()
    assert torch.equal(model[0].scale, wanted)
    other = torch.randn(16, 32)
    qk.load_weights(model, {"0.weight": other, "0.bias": torch.zeros(16)})
    assert torch.equal(model[0].scale, set_from(other))
    state = {name: value.clone() for name, value in model.state_dict().items()}
    qk.quantize_model(model, QuantConfig(4, scale_init="mse"), requantize=True)
    assert torch.equal(model[0].scale, search_scale(other, lsq(4))[0])
    qk.quantize_model(model, config, requantize=True)
    assert model[0].awaits_inputs == (init == "activation")
    with torch.no_grad():
        state["0.scale"].mul_(2)
    model.load_state_dict(state)
    assert torch.equal(model[0].scale, state["0.scale"])
    assert not model[0].awaits_inputs


def test_on_the_meta_device():
    """Nothing is searched there, and shapes are right; the weights come later."""
    for settings in ({}, {"group_size": 8}, {"per_tensor": True}):
        for scheme in ("paretoq", "affine"):
            config = QuantConfig(4, scheme, scale_init="mse", **settings)
            layer = QuantLinear(32, 16, config=config, device="meta")
            here = QuantLinear(32, 16, config=config)
            assert layer.scale.is_meta
            assert layer.scale.shape == here.scale.shape
            layer.to_empty(device="cpu")
            layer.reset_parameters()
            assert torch.equal(layer.scale, search_scale(layer.weight, config.grid, **settings)[0])
    stack = GroupedQuantLinear(2, 32, 16, config=QuantConfig(2, scale_init="mse"), device="meta")
    assert stack.scale.shape == (2, 16)


def test_tied_layers_keep_one_scale():
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    model[1].weight = model[0].weight
    qk.quantize_model(model, QuantConfig(2, scale_init="mse"))
    assert model[0].scale is model[1].scale
    check_calibrated(model)  # no scale of an activation waits


def test_training_and_packing():
    """The scale is a Parameter as any other."""
    model = nn.Sequential(nn.Linear(32, 16))
    qk.quantize_model(model, QuantConfig(3, group_size=8, scale_init="mse"))
    x = torch.randn(4, 32)
    model(x).square().sum().backward()
    assert bool(model[0].scale.grad.any())
    y = model.eval()(x)
    torch.testing.assert_close(qk.pack_model(model)(x), y, rtol=1e-4, atol=1e-5)
