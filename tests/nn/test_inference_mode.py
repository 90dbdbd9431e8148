"""Layers that are made or changed under torch.inference_mode work like those made outside."""

import copy

import pytest
import torch
from torch import nn

import qatkernels as qk
from qatkernels.nn import GroupedQuantLinear, QuantConfig, calibrate
from qatkernels.testing.compare import assert_same_bits

CONFIGS = {
    "w4": QuantConfig(4),
    "affine": QuantConfig(4, "affine", group_size=8),
    "lsq+": QuantConfig(4, act_bits=8, act_scheme="lsq+", out_bits=8),
}


@pytest.fixture(params=CONFIGS.values(), ids=CONFIGS.keys())
def config(request):
    return request.param


X = torch.linspace(-1, 1, 48).view(3, 16)


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))


def take_a_step(model):
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    model.train()(X).square().mean().backward()
    optimizer.step()
    return model


def same(model, wanted):
    for name, value in wanted.state_dict().items():
        assert_same_bits(model.state_dict()[name], value, name)


def test_quantizing_calibrating_and_changing_scales(config):
    wanted = qk.quantize_model(mlp(), QuantConfig(8))
    wanted[0].requantize(config)
    wanted[2].requantize(config)
    calibrate(wanted, X)
    y = wanted.eval()(X).detach()
    take_a_step(wanted)

    model, source = mlp(), mlp().state_dict()
    with torch.inference_mode():
        qk.quantize_model(model, QuantConfig(8))
        model[0].requantize(config)
        model[2].requantize(config)
        qk.load_weights(model, source)
        model[0].reset_scale()
        calibrate(model, X)
        assert_same_bits(model.eval()(X), y)
    same(take_a_step(model), wanted)


def test_packing(config):
    model = qk.quantize_model(mlp(), config)
    calibrate(model, X)
    wanted = qk.pack_model(copy.deepcopy(model).eval())
    with torch.inference_mode():
        packed = qk.pack_model(model.eval())
        assert_same_bits(packed(X), wanted(X))
    packed.load_state_dict(wanted.state_dict())
    x = X.clone().requires_grad_()
    packed(x).sum().backward()
    assert x.grad.abs().sum() > 0
    with torch.inference_mode():
        assert_same_bits(copy.deepcopy(packed)(X), wanted(X))


def test_stacking_experts():
    linears = [nn.Linear(16, 4) for _ in range(2)]
    offsets = torch.tensor([1, 3], dtype=torch.int32)
    with torch.inference_mode():
        layer = GroupedQuantLinear.from_linears(linears, config=QuantConfig(4))
        layer(X, offsets)
    layer(X, offsets).sum().backward()
    assert layer.weight.grad.abs().sum() > 0
