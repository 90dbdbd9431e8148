import re

import pytest
import torch
from torch import nn

from qatkernels.grid import affine, lsq
from qatkernels.nn import LearnedActivation, QuantConfig, QuantLinear, calibrate, quantize_model
from tests.compare import assert_same_bits


def test_lsq_starts_from_the_mean_magnitude_of_the_first_batch():
    act, x = LearnedActivation(16, lsq(4)), torch.randn(3, 5, 16)
    act(x)
    torch.testing.assert_close(act.scale.detach(), (2 * x.abs().mean() / 7**0.5).view(1))
    assert act.initialized
    before = act.scale.clone()
    act(10 * x)
    assert_same_bits(act.scale, before)


def test_offset_starts_from_the_range_of_the_first_batch():
    act, x = LearnedActivation(16, affine(4), offset=True), torch.randn(3, 5, 16).clamp_min(-0.2)
    y = act(x)
    scale = (x.max() - x.min()) / 15
    torch.testing.assert_close(act.scale.detach(), scale.view(1))
    torch.testing.assert_close(act.zero_point.detach(), (-x.min() / scale).round().view(1))
    assert (y - x).abs().max() <= 1.01 * scale


@pytest.mark.parametrize("kind", ["signed", "unsigned", "offset"])
def test_gradients_equal_the_formula(kind):
    grid, features = (lsq(3) if kind == "signed" else affine(3)), 16
    act = LearnedActivation(features, grid, offset=kind == "offset")
    x = torch.randn(4, features)
    act(x)
    with torch.no_grad():
        act.scale.mul_(0.5)
        if kind == "offset":
            act.zero_point.add_(0.3)  # learned, so not integral
    x.requires_grad_()
    g = torch.linspace(-1, 1, x.numel()).view(x.shape)
    y = act(x)
    (y * g).sum().backward()

    low, high = (-4.0, 3.0) if kind == "signed" else (0.0, 7.0)
    s = act.scale.detach()
    z = act.zero_point.detach() if kind == "offset" else torch.zeros(1)
    r = x.detach() / s
    k = (r + z).clamp(low, high).round()
    inside = (r + z >= low) & (r + z <= high)
    gamma = 1 / (features * high) ** 0.5
    torch.testing.assert_close(y.detach(), (k - z) * s)
    torch.testing.assert_close(x.grad, torch.where(inside, g, 0.0))
    ds = torch.where(inside, k - z - r, (r + z).clamp(low, high) - z)
    torch.testing.assert_close(act.scale.grad, (g * ds).sum().view(1) * gamma)
    if kind == "offset":
        torch.testing.assert_close(act.zero_point.grad, (g * torch.where(inside, 0.0, -s)).sum().view(1) * gamma)
    assert 0 < inside.sum() < inside.numel()


def test_follows_autocast_and_keeps_float32_scales():
    act, x = LearnedActivation(16, lsq(8)), torch.randn(2, 16)
    wide = act(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert_same_bits(act(x), wide.bfloat16())
    before = act.scale.clone()
    assert_same_bits(act.bfloat16().scale, before)
    assert act(x.bfloat16()).dtype == torch.bfloat16


def test_eval_before_any_batch_is_an_error():
    layer = QuantLinear(16, 12, config=QuantConfig(4, act_bits=4, act_scheme="lsq")).eval()
    with pytest.raises(RuntimeError, match="has not been initialized: run a batch in training mode, call calibrate"):
        layer(torch.randn(2, 16))
    calibrate(layer, torch.randn(2, 16))
    assert layer(torch.randn(2, 16)).isfinite().all()


def test_state_dict_says_whether_the_scale_is_initialized():
    config = QuantConfig(4, act_bits=4, act_scheme="lsq")
    trained, fresh = QuantLinear(16, 12, config=config), QuantLinear(16, 12, config=config)
    trained.load_state_dict(fresh.state_dict())
    assert not trained.act.ready
    trained(torch.randn(2, 16))
    fresh.load_state_dict(trained.state_dict())
    assert fresh.eval()(torch.randn(2, 16)).isfinite().all()


def test_calibrate_initializes_once_and_says_what_it_missed(mlp):
    model = quantize_model(mlp, QuantConfig(4, act_bits=4, act_scheme="lsq")).eval()
    calibrate(model, torch.randn(3, 16))
    before = [model[i].act.scale.clone() for i in (0, 2)]
    calibrate(model, 10 * torch.randn(3, 16))
    assert [model[i].act.scale.item() for i in (0, 2)] == [b.item() for b in before]

    class Half(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = (QuantLinear(16, 4, config=model[0].config) for _ in range(2))

        def forward(self, x):
            return self.used(x)

    with pytest.raises(RuntimeError, match=re.escape("the batch did not reach 1 of 2 activation quantizers")):
        calibrate(Half(), torch.randn(3, 16))


def test_several_processes_may_not_each_use_their_own_batch(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    layer = QuantLinear(16, 12, config=QuantConfig(4, act_bits=4, act_scheme="lsq"))
    with pytest.raises(RuntimeError, match="call calibrate\\(model, batch\\) with the same batch in each"):
        layer(torch.randn(2, 16))
    calibrate(layer, torch.randn(2, 16))
    assert layer(torch.randn(2, 16)).isfinite().all()


def test_offset_needs_an_affine_grid():
    with pytest.raises(ValueError, match="offset is True with scheme 'lsq', only 'affine' has a zero point"):
        LearnedActivation(16, lsq(4), offset=True)


@pytest.mark.gpu
@pytest.mark.parametrize("scheme", ["dynamic", "lsq", "lsq+"])
def test_never_waits_for_the_device(scheme):
    layer = QuantLinear(64, 32, config=QuantConfig(4, act_bits=4, act_scheme=scheme), device="cuda")
    layer.noise_std = 0.001
    x = torch.randn(8, 64, device="cuda")
    layer(x)
    torch.cuda.set_sync_debug_mode("error")
    try:
        layer(x).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
