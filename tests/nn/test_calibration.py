"""Scales of weights from the inputs of their layers."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import qatkernels as qk
from qatkernels.nn import GroupedQuantLinear, QuantConfig, QuantConv1D, calibrate, search_scale

CONFIG = QuantConfig(2, group_size=8, scale_init="activation")


def two_layers(config=CONFIG):
    torch.manual_seed(0)
    return qk.quantize_model(nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8)), config)


def uneven(*shape, seed=0):
    """Inputs with features of very different sizes."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * torch.logspace(-2, 1, shape[-1])


def squares(*inputs):
    """Sums over all tokens of batches, in the order in which calibrate adds them."""
    return torch.stack([x.detach().flatten(0, -2).square().sum(0, dtype=torch.float64) for x in inputs]).sum(0)


def test_scales_are_those_of_the_second_moments():
    """Of all batches and all tokens, in full precision: the second layer sees what the float model would give it."""
    model = two_layers()
    plain = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8))
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if k.endswith(("weight", "bias"))})
    batches = [uneven(3, 5, 16), uneven(7, 16, seed=1)]
    before = model[0].scale.detach().clone()
    report = calibrate(model, batches=batches)
    assert report.layers == ["0", "2"]
    assert report.tokens == {"0": 22, "2": 22}
    assert not report.fallbacks
    for name, inputs in (("0", batches), ("2", [plain[:2](batch) for batch in batches])):
        layer = model.get_submodule(name)
        assert torch.equal(layer.scale, search_scale(layer.weight, layer.grid, 8, moments=squares(*inputs))[0])
        assert not layer.awaits_inputs
        assert not layer.quantizer.bypassed
        assert not layer._forward_pre_hooks
    assert not torch.equal(model[0].scale, before)


@pytest.mark.parametrize("scheme", ["paretoq", "affine"])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_output_error_is_smaller(bits, scheme):
    """Than with scales of "max" and "mse", for independent features, which is what the error neglects."""
    torch.manual_seed(0)
    linear, x = nn.Linear(64, 32, bias=False), uneven(4096, 64)
    errors = {}
    for init in ("max", "mse", "activation"):
        model = qk.quantize_model(copy.deepcopy(linear), QuantConfig(bits, scheme, group_size=16, scale_init=init))
        calibrate(model, x)
        errors[init] = float((model(x) - linear(x)).detach().square().mean())
    assert errors["activation"] < errors["mse"]
    assert errors["activation"] < errors["max"]


def test_one_batch_with_keywords():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(16, 8)

        def forward(self, x, factor=1.0):
            return self.layer(x * factor)

    models = [qk.quantize_model(Named(), CONFIG) for _ in range(4)]
    for model in models[1:]:
        qk.load_weights(model, {"layer.weight": models[0].layer.weight, "layer.bias": models[0].layer.bias})
    x = uneven(9, 16)
    calibrate(models[0], x, factor=2.0)
    calibrate(models[1], batches=[{"x": x, "factor": 2.0}])
    calibrate(models[2], batches=[(x, 2.0)])
    calibrate(models[3], batches=[{"x": x}], factor=2.0)
    for model in models[1:]:
        assert torch.equal(model.layer.scale, models[0].layer.scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_token_without_a_batch_in_any_dtype(dtype):
    layer, x = qk.quantize_model(nn.Linear(16, 8, dtype=dtype), CONFIG), uneven(16).to(dtype)
    assert calibrate(layer, x).tokens == {"the model": 1}
    wide = x if dtype == torch.float64 else x.float()
    assert torch.equal(layer.scale, search_scale(layer.weight, layer.grid, 8, moments=wide.square().double())[0])


def test_a_second_call_changes_nothing():
    model = two_layers()
    calibrate(model, uneven(9, 16))
    held = model[0].scale.detach().clone()
    report = calibrate(model, 100 * torch.randn(9, 16))
    assert report.layers == []
    assert torch.equal(model[0].scale, held)
    model[0].reset_scale()
    assert calibrate(model, uneven(9, 16)).layers == ["0"]
    assert torch.equal(model[0].scale, held)


def test_trained_scales_are_not_overwritten():
    model = two_layers()
    optimizer = torch.optim.AdamW(qk.param_groups(model, lr=1e-3))
    model(uneven(5, 16)).square().mean().backward()
    optimizer.step()
    before = model[0].scale.detach().clone()
    with pytest.raises(
        ValueError, match=r"the scales of 0 have changed .* calibrate before training, or call layer.res"
    ):
        calibrate(model, uneven(5, 16))
    assert torch.equal(model[0].scale, before)
    for layer in model[0], model[2]:
        layer.reset_scale()
    assert calibrate(model.double().float().to(torch.device("cpu")), uneven(5, 16)).layers == ["0", "2"]


def test_together_with_scales_of_activations():
    config = QuantConfig(4, scale_init="activation", act_bits=8, act_scheme="lsq", out_bits=8)
    model = two_layers(config)
    report = calibrate(model, batches=[uneven(9, 16), uneven(9, 16, seed=1)])
    assert report.activations == ["0.act", "0.out_act", "2.act", "2.out_act"]
    assert report.layers == ["0", "2"]
    assert "scales of 4 activations set" in str(report)


def test_conv1d():
    torch.manual_seed(0)
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D(8, 16)
    model = qk.quantize_model(nn.Sequential(conv1d), CONFIG)
    assert isinstance(model[0], QuantConv1D)
    x = uneven(9, 16)
    calibrate(model, x)
    assert torch.equal(model[0].scale, search_scale(model[0].weight, model[0].grid, 8, moments=squares(x))[0])


def test_experts():
    """Each expert for its own tokens; one that none reached gets "mse", and tokens of nobody do not count."""
    torch.manual_seed(0)
    layer = GroupedQuantLinear(4, 16, 8, config=CONFIG)
    x, ends = uneven(20, 16), torch.tensor([5, 5, 12, 17], dtype=torch.int32)
    mse = search_scale(layer.weight, layer.grid, 8)[0]
    report = calibrate(layer, x, offsets=ends)
    assert report.fallbacks == {"the model[1]": "no token reached it"}
    assert report.tokens == {"the model": 17}
    assert "the model[1]: no token reached it, scales by 'mse'" in str(report)
    for e, part in ((0, x[:5]), (2, x[5:12]), (3, x[12:17])):
        wanted = search_scale(layer.weight[e], layer.grid, 8, moments=squares(*part[:, None]))[0]
        torch.testing.assert_close(layer.scale[e].detach(), wanted)
    assert torch.equal(layer.scale[1], mse[1])


def test_layers_that_share_a_weight_are_searched_together():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16))
    model[2].weight = model[0].weight
    qk.quantize_model(model, CONFIG)
    x = uneven(9, 16)
    seen = []
    handle = model[2].register_forward_pre_hook(lambda m, args: seen.append(args[0].detach()))
    report = calibrate(model, x)
    handle.remove()
    assert report.layers == ["0", "2"]
    assert model[0].scale is model[2].scale
    wanted = search_scale(model[0].weight, model[0].grid, 8, moments=squares(x, seen[0]))[0]
    assert torch.equal(model[0].scale, wanted)


class Half(nn.Module):
    """Calls one of two layers."""

    def __init__(self):
        super().__init__()
        self.used, self.idle = nn.Linear(16, 8), nn.Linear(16, 8)

    def forward(self, x):
        return self.used(x)


def test_a_layer_that_no_token_reached():
    model = qk.quantize_model(Half(), CONFIG)
    mse = search_scale(model.idle.weight, model.idle.grid, 8)[0]
    report = calibrate(model, uneven(9, 16))
    assert report.layers == ["used"]
    assert report.fallbacks == {"idle": "no token reached it"}
    assert torch.equal(model.idle.scale, mse)
    assert model.idle.awaits_inputs
    model.used = model.idle
    assert calibrate(model, uneven(9, 16)).layers == ["used"]


def test_refusals():
    model = two_layers()
    held = model[0].scale.detach().clone()
    with pytest.raises(ValueError, match="batches is empty"):
        calibrate(model, batches=[])
    with pytest.raises(ValueError, match="batches and positional arguments are given"):
        calibrate(model, torch.randn(2, 16), batches=[torch.randn(2, 16)])
    x = torch.randn(2, 16)
    x[0, 3] = torch.nan
    with pytest.raises(ValueError, match=r"the inputs of 0 have inf or NaN in 1 features.*no scale was changed"):
        calibrate(model, x)
    with pytest.raises(ValueError, match="no token reached any of the 2 layers"):
        calibrate(model, torch.empty(0, 16))
    with pytest.raises(RuntimeError):  # of the model itself
        calibrate(model, torch.randn(2, 15))
    assert torch.equal(model[0].scale, held)
    assert model[0].awaits_inputs
    assert not model[0]._forward_pre_hooks
    assert not model[0].quantizer.bypassed


def test_offloaded_and_sharded_weights():
    model = two_layers()
    model[0].weight = nn.Parameter(model[0].weight.to("meta"))
    model[0]._hf_hook = SimpleNamespace()
    with pytest.raises(ValueError, match=r"0 cannot be calibrated: its weight is offloaded"):
        calibrate(model, torch.randn(2, 16))


def sharded(rank):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = two_layers()
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    with pytest.raises(ValueError, match=r"0 has a sharded weight.*calibrate before fully_shard"):
        calibrate(model, torch.randn(2, 16))
    model = qk.quantize_model(nn.Sequential(nn.Linear(16, 8)), QuantConfig(2, scale_init="mse"))
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    with pytest.raises(ValueError, match="the weight is sharded, so scale_init 'mse' cannot search"):
        model[0].reset_scale()


def test_sharded(pair):
    pair.run(sharded)


def test_check_notes_layers_that_wait():
    model, x = two_layers(), uneven(9, 16)
    assert "were not set from its inputs" in str(qk.check(model, x))
    calibrate(model, x)
    assert "calibrate" not in str(qk.check(model, x))


def test_copies_and_pickles_still_wait(tmp_path):
    model = two_layers()
    torch.save(model, tmp_path / "model.pt")
    for twin in (copy.deepcopy(model), torch.load(tmp_path / "model.pt", weights_only=False)):
        assert calibrate(twin, uneven(9, 16)).layers == ["0", "2"]


def test_a_compiled_model_is_calibrated_eagerly():
    model = two_layers()
    compiled = torch.compile(model, backend="eager")
    assert calibrate(compiled, uneven(9, 16)).layers == ["0", "2"]
