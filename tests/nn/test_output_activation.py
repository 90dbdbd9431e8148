"""Outputs that layers quantize after the bias, to integers times one learned scale (``out_bits``)."""

import copy

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import qatkernels as qk
from qatkernels.nn import GroupedQuantLinear, LearnedActivation, QuantConfig, QuantLinear, calibrate, quantize_model
from qatkernels.nn.recipe import recipe_of
from qatkernels.testing.compare import assert_same_bits

CONFIGS = {
    "outputs": QuantConfig(4, out_bits=8),
    "inputs and outputs": QuantConfig(2, act_bits=8, act_scheme="lsq", out_bits=4),
    "tokens and outputs": QuantConfig(4, group_size=8, act_bits=8, out_bits=8),
}


@pytest.fixture(params=CONFIGS.values(), ids=CONFIGS.keys())
def config(request):
    return request.param


def as_integers(y, scale, bits):
    """Return what transformers' ``apply_srq`` makes of a tensor, without negative zeros."""
    y, scale = y.detach(), scale.detach()
    return torch.clamp(torch.round(y / scale), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1) * scale + 0.0


def made(config, bias=True):
    """Return a calibrated layer some of whose outputs are beyond the ends, and an input."""
    torch.manual_seed(0)
    layer, x = QuantLinear(16, 12, bias=bias, config=config), torch.randn(9, 16)
    calibrate(layer, x)
    with torch.no_grad():
        layer.out_act.scale.copy_(1.5 * without_output(layer)(x).abs().mean() / layer.out_act.grid.code_max)
    return layer, x


def without_output(layer):
    """Return a copy of a layer that leaves its output alone."""
    other = copy.deepcopy(layer)
    other.out_act = None
    return other


@pytest.mark.parametrize("bias", [True, False])
def test_the_sum_with_the_bias_is_quantized(config, bias):
    layer, x = made(config, bias)
    y = without_output(layer)(x)
    wanted = as_integers(y, layer.out_act.scale, config.out_bits)
    assert 0 < ((wanted - y).abs() > layer.out_act.scale).sum() < y.numel()  # some were clamped
    for mode in (True, False):
        assert_same_bits(layer.train(mode)(x), wanted)
    packed = qk.PackedLinear.from_quantized(layer)
    assert packed.out_act is layer.out_act
    of_packed = copy.deepcopy(packed)
    of_packed.out_act = None
    assert_same_bits(packed(x), as_integers(of_packed(x), layer.out_act.scale, config.out_bits))


def test_the_first_batch_sets_the_scale():
    layer, x = QuantLinear(16, 12, config=CONFIGS["outputs"]), torch.randn(9, 16)
    y = without_output(layer)(x)
    assert isinstance(layer.out_act, LearnedActivation)
    assert not layer.out_act.initialized
    with pytest.raises(RuntimeError, match="an activation scale has not been initialized"):
        layer.eval()(x)
    layer.train()(x)
    assert_same_bits(layer.out_act.scale, (2 * y.abs().mean() / 127**0.5).detach().view(1))
    assert layer.out_act.grad_scale == pytest.approx((12 * 127) ** -0.5)


def test_gradients_are_those_of_the_parts():
    layer, x = made(CONFIGS["inputs and outputs"])
    other = without_output(layer)
    out_act = copy.deepcopy(layer.out_act)
    g = torch.linspace(-1, 1, 9 * 12).view(9, 12)
    layer(x).backward(g)
    out_act(other(x)).backward(g)
    for name, parameter in other.named_parameters():
        assert_same_bits(layer.get_parameter(name).grad, parameter.grad, name)
    assert_same_bits(layer.out_act.scale.grad, out_act.scale.grad)
    assert layer.out_act.scale.grad.abs() > 0


@pytest.mark.parametrize("alone", [True, False], ids=["no_grad", "with a graph"])
def test_forward_mode(config, alone):
    layer, x = made(config)
    other, direction = without_output(layer), torch.linspace(-1, 1, 9 * 16).view(9, 16)
    with torch.set_grad_enabled(not alone), forward_ad.dual_level():
        y, along = forward_ad.unpack_dual(layer(forward_ad.make_dual(x, direction)))
        before, along_before = forward_ad.unpack_dual(other(forward_ad.make_dual(x, direction)))
    scale, bits = layer.out_act.scale.detach(), config.out_bits
    inside = (before / scale >= -(2 ** (bits - 1))) & (before / scale <= 2 ** (bits - 1) - 1)
    assert 0 < inside.sum() < inside.numel()
    assert_same_bits(y, as_integers(before, scale, bits))
    torch.testing.assert_close(along, torch.where(inside, along_before, 0.0))


def test_compiles_as_often_as_with_inputs_alone():
    counts = []
    for out_bits in (None, 8):
        torch._dynamo.reset()
        layer = QuantLinear(16, 12, config=QuantConfig(4, act_bits=8, act_scheme="lsq", out_bits=out_bits))
        counter = CompileCounterWithBackend("aot_eager")
        compiled, twin = torch.compile(layer, fullgraph=True, backend=counter), copy.deepcopy(layer)
        for _ in range(4):
            x = torch.randn(3, 16)
            assert_same_bits(compiled(x), twin(x))
        counts.append(counter.frame_count)
    assert counts == [2, 2]


@pytest.mark.parametrize("packs", [False, True], ids=["trained", "packed"])
def test_experts(packs):
    torch.manual_seed(0)
    layer = GroupedQuantLinear(3, 16, 6, bias=True, config=QuantConfig(4, out_bits=8))
    x, offsets = torch.randn(11, 16), torch.tensor([4, 4, 9], dtype=torch.int32)
    calibrate(layer, x, offsets)
    model = nn.ModuleList([layer.eval()])
    layer = (qk.pack_model(model) if packs else model)[0]
    y = layer(x, offsets)
    assert_same_bits(y, as_integers(without_output(layer)(x, offsets), layer.out_act.scale, 8))
    assert not y[9:].any()


def test_requantizing_keeps_what_stays_the_same():
    layer, _ = made(CONFIGS["outputs"])
    out_act = layer.out_act
    layer.requantize(QuantConfig(2, act_bits=8, out_bits=8))
    assert layer.out_act is out_act
    layer.requantize(QuantConfig(2, out_bits=4))
    assert layer.out_act is not out_act
    assert not layer.out_act.initialized
    layer.requantize(QuantConfig(2))
    assert layer.out_act is None
    assert not [name for name in layer.state_dict() if "out_act" in name]


def test_what_layers_say_of_themselves(config, mlp):
    model = quantize_model(mlp, config)
    calibrate(model, torch.randn(3, 16))
    assert f"outputs of {config.out_bits} bits" in str(qk.quantization_report(model))
    assert f"(out_act): LearnedActivation(bits={config.out_bits}, scheme=lsq, offset=False)" in repr(model)
    (trained,) = recipe_of(model)
    (packed,) = recipe_of(qk.pack_model(model))
    assert QuantConfig.from_dict(trained["config"]) == config
    assert QuantConfig.from_dict(packed["config"]) == QuantConfig.from_dict(
        {**config.to_dict(), "scheme": packed["config"]["scheme"]}
    )
    model[0].out_act = nn.ReLU()
    with pytest.raises(ValueError, match="a packed layer has ReLU as out_act, which no configuration describes"):
        recipe_of(model)


def test_files_of_packed_models_name_it_only_where_it_is(tmp_path):
    """Versions before it read files without it, and refuse the others by the tensors that they do not expect."""
    for out_bits in (None, 8):
        layer = QuantLinear(16, 12, config=QuantConfig(4, out_bits=out_bits))
        calibrate(layer, torch.randn(3, 16))
        qk.save_packed(qk.pack_model(nn.Sequential(layer)), tmp_path / "x")
        tensors, header = qk.files.load(tmp_path / "x")
        assert ("out_act" in header["layers"][0]) == ("0.out_act.scale" in tensors) == (out_bits is not None)


def test_trains_to_a_scale_that_fits():
    """From a scale that is far too large, the learned one comes back to where the error is small."""
    torch.manual_seed(0)
    layer, x = QuantLinear(16, 12, config=QuantConfig(8, out_bits=4)), torch.randn(64, 16)
    calibrate(layer, x)
    with torch.no_grad():
        wanted = F.linear(x, layer.weight, layer.bias)
        layer.out_act.scale.mul_(4)
    optimizer = torch.optim.Adam([layer.out_act.scale], lr=0.01)
    losses = []
    for _ in range(250):
        loss = (layer(x) - wanted).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.05 * losses[0]


@pytest.mark.gpu
def test_never_waits_for_the_device():
    layer = QuantLinear(64, 32, config=QuantConfig(4, act_bits=4, act_scheme="lsq", out_bits=8), device="cuda")
    x = torch.randn(8, 64, device="cuda")
    layer(x)
    torch.cuda.set_sync_debug_mode("error")
    try:
        layer(x).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
