"""Scales that are used as they will be stored."""

import json

import pytest
import torch
from torch import nn

import qatkernels as qk
from qatkernels.formats.integers import IntegerWeight
from qatkernels.grids import MIN_SCALE
from qatkernels.methods import WinQ
from qatkernels.methods.stats import GridStats
from qatkernels.nn.quantizer import WeightQuantizer

DTYPES = (torch.float16, torch.bfloat16)
CASES = [(1, "paretoq"), (1.58, "paretoq"), (2, "seq"), (3, "lsq"), (4, "affine"), (8, "lsq")]


def layer(bits=2, scheme="paretoq", dtype=torch.float16, **settings):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 8))
    qk.quantize_model(model, qk.QuantConfig(bits, scheme, scale_dtype=dtype, **settings))
    return model[0]


def rounded(layer, dtype):
    """Return the scale whose spacing of codes is a number of the dtype."""
    return ((layer.scale.detach() / layer.grid.steps).to(dtype).double() * layer.grid.steps).float()


@pytest.mark.parametrize("settings", [{}, {"group_size": 16}, {"per_tensor": True}], ids=["rows", "groups", "tensor"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("bits", "scheme"), CASES)
def test_a_forward_uses_the_rounded_scale(bits, scheme, dtype, settings):
    """Values, codes and gradients are those of the rounded scale; the parameter keeps its value."""
    module, x = layer(bits, scheme, dtype, **settings), torch.randn(5, 64)
    twin = layer(bits, scheme, torch.float32, **settings)
    with torch.no_grad():
        twin.scale.copy_(rounded(module, dtype))
    assert not torch.equal(module.scale, twin.scale)
    spacing = module.quantizer.stored(module.scale, None)[0].detach() / module.grid.steps
    assert torch.equal(spacing.to(dtype).float(), spacing)
    assert torch.equal(module.quantized_weight(), twin.quantized_weight())
    assert torch.equal(module.codes(), twin.codes())
    for m in (module, twin):
        m(x).square().sum().backward()
    for (name, mine), theirs in zip(module.named_parameters(), twin.parameters(), strict=True):
        assert torch.equal(mine.grad, theirs.grad), name


def test_forward_mode_is_that_of_the_rounded_scale():
    module, x = layer(3), torch.randn(5, 64)
    twin = layer(3, dtype=torch.float32)
    with torch.no_grad():
        twin.scale.copy_(rounded(module, torch.float16))
    tangents = {name: torch.randn_like(p) for name, p in module.named_parameters()}

    def pushed(m):
        call = lambda state: torch.func.functional_call(m, state, (x,))  # noqa: E731
        return torch.func.jvp(call, (dict(m.named_parameters()),), (tangents,))

    for mine, theirs in zip(pushed(module), pushed(twin), strict=True):
        assert torch.equal(mine, theirs)


def test_packing_keeps_the_values():
    model = nn.Sequential(layer(1.58))
    x, wanted = torch.randn(3, 64), model[0].quantized_weight().detach()
    y = model(x)
    packed = qk.pack_model(model)
    assert torch.equal(packed[0].weight.dequantize(), wanted)
    torch.testing.assert_close(packed(x), y)


def test_winq_and_statistics_see_the_rounded_scale():
    model = nn.Sequential(layer(2))
    assert torch.equal(GridStats(model).codes()["0"], model[0].codes())
    wanted = 0.5 * (model[0].weight + model[0].quantized_weight()).detach()
    winq = WinQ(model, reset_every=1, reset_weight=0.5, noise_std=0.0)
    winq.reset()
    torch.testing.assert_close(model[0].weight.detach(), wanted, rtol=0, atol=1e-7)


def test_extreme_scales():
    quantizer = WeightQuantizer()
    quantizer.configure(qk.QuantConfig(4, scale_dtype=torch.float16), 64)
    found, _ = quantizer.stored(torch.tensor([1e6, 1e-5, 1e-9]), None)
    assert found.isfinite().all()
    assert found[0] == 65504 * quantizer.grid.steps
    quantizer.configure(qk.QuantConfig(2, "seq", scale_dtype=torch.float16), 64)  # of which half the distance is stored
    assert quantizer.stored(torch.tensor([1e6]), None)[0] == 65504 * quantizer.grid.steps


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("bits", "scheme"), CASES)
def test_scales_at_the_floor_are_numbers_of_the_dtype(bits, scheme, dtype):
    """Training can drive a scale below the smallest one, or below zero. A file still holds what forwards use."""
    module = layer(bits, scheme, dtype)
    with torch.no_grad():
        module.scale.copy_(torch.linspace(-2e-5, 5e-5, 8).view_as(module.scale))
    used, _ = module.quantizer.stored(module.scale, None)
    assert used.min() >= torch.tensor(MIN_SCALE)
    steps = IntegerWeight.of(module).steps  # half the distance of values for binary and seq
    assert torch.equal(steps.to(dtype).to(torch.float32), steps)
    below = torch.nextafter(steps.min().to(dtype), torch.zeros((), dtype=dtype)).float()
    assert below * (used.detach().min() / steps.min()) < MIN_SCALE  # the smallest that kernels do not raise
    (gradient,) = torch.autograd.grad(used.sum(), module.scale)
    assert torch.equal(gradient, torch.ones_like(module.scale))
    wanted = module.quantized_weight().detach()
    packed = qk.PackedLinear.from_quantized(module)
    assert torch.equal(packed.weight.dequantize(), wanted)


def test_configuration():
    config = qk.QuantConfig(2, scale_dtype="float16")
    assert config.scale_dtype is torch.float16
    assert qk.QuantConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert "float16 scales" in str(config)
    with pytest.raises(ValueError, match="scale_dtype is 'int8', must be one of"):
        qk.QuantConfig(2, scale_dtype="int8")
    state = nn.Sequential(layer(2)).state_dict()
    with pytest.raises(RuntimeError, match="scale_dtype=float16"):
        nn.Sequential(layer(2, dtype=torch.float32)).load_state_dict(state)


def test_under_compile():
    module, x = layer(2, group_size=16), torch.randn(5, 64)
    torch._dynamo.reset()
    assert torch.equal(torch.compile(module, fullgraph=True, backend="aot_eager")(x), module(x))
