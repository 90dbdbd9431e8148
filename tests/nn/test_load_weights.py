"""State dicts of quantized models: their layout, and loading weights into a model with another quantization."""

import copy
import warnings
from collections import OrderedDict

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict

import qatkernels as qk
from qatkernels.nn import QuantConfig, calibrate
from qatkernels.testing.compare import assert_same_bits


class Model(nn.Module):
    """Tied and shared layers, and a head that stays in full precision."""

    def __init__(self, factor=1.0):
        super().__init__()
        self.first, self.second, self.tied = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16)
        self.tied.weight = self.second.weight
        self.again = self.first
        self.lm_head = nn.Linear(16, 4)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.mul_(factor)

    def forward(self, x):
        return self.lm_head(self.tied(self.second(self.again(self.first(x)).relu())))


X = torch.linspace(-1, 1, 80).view(5, 16)

#: Pairs of configurations whose scales and zero points have the same shapes.
OTHERS = {
    "bits": (QuantConfig(8), QuantConfig(4)),
    "scheme": (QuantConfig(2), QuantConfig(2, "lsq")),
    "1 and 2 bits": (QuantConfig(1), QuantConfig(2)),
    "rows of one": (QuantConfig(4), QuantConfig(4, group_size=16)),
    "dynamic activations": (QuantConfig(4, act_bits=8), QuantConfig(4, act_bits=4)),
    "activations": (QuantConfig(4, act_bits=8), QuantConfig(4)),
    "learned": (QuantConfig(4, act_bits=8, act_scheme="lsq"), QuantConfig(4, act_bits=4, act_scheme="lsq")),
    "unsigned": (
        QuantConfig(4, act_bits=8, act_scheme="lsq"),
        QuantConfig(4, act_bits=8, act_scheme="lsq", act_signed=False),
    ),
}


def quantized(config, factor=1.0):
    model = qk.quantize_model(Model(factor), config)
    calibrate(model, X)
    return model


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("forwards", [True, False])
def test_a_state_of_another_configuration_is_refused(name, forwards):
    config, other = OTHERS[name] if forwards else reversed(OTHERS[name])
    state, model = quantized(config).state_dict(), quantized(other)
    before = {name: t.clone() for name, t in model.first.state_dict().items()}
    layer, others = quantized(config).first, quantized(other).first
    if layer.layout != others.layout:
        message = f"first.scale is of {layer.layout}, must be of {others.layout}; load_weights"
    else:
        message = f"first.act.scale is of {layer.act.layout}, must be of {others.act.layout}; load_weights"
    for assign in (False, True):
        with pytest.raises(RuntimeError, match=message):
            model.load_state_dict(state, assign=assign)
    if layer.layout != others.layout:
        for name, tensor in model.first.state_dict().items():
            if not name.startswith("act."):
                assert_same_bits(tensor, before[name], name)


ACTIVATIONS = {
    "input": ("act", QuantConfig(4, act_bits=8, act_scheme="lsq")),
    "output": ("out_act", QuantConfig(4, out_bits=8)),
}


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("what", ACTIVATIONS)
def test_a_learned_quantizer_of_activations_too_many_or_missing_is_refused(what, strict):
    (act, config), plain = ACTIVATIONS[what], QuantConfig(4)
    learned, none = getattr(quantized(config).first, act).layout, f"no learned quantizer of the {what}"
    for of, into, message in (
        (config, plain, f"first.{act}.scale is of {learned}, must be of {none}; load_weights"),
        (plain, config, f"first.{act}.scale is of {none}, must be of {learned}; load_weights"),
    ):
        model = quantized(into)
        with pytest.raises(RuntimeError, match=message):
            model.load_state_dict(quantized(of).state_dict(), strict=strict)
        qk.load_weights(model, quantized(of).state_dict())
        calibrate(model, X)
        assert model(X).isfinite().all()
    partial = {name: t for name, t in quantized(config).state_dict().items() if f".{act}." in name}
    quantized(config).load_state_dict(partial, strict=False)


def test_its_own_configuration_is_loaded(config, tmp_path):
    trained, fresh = quantized(config), quantized(config, factor=3)
    save_file({n: t.clone() for n, t in trained.state_dict().items()}, tmp_path / "model.safetensors")
    fresh.load_state_dict(load_file(tmp_path / "model.safetensors"))
    assert_same_bits(fresh(X), trained(X))


@pytest.mark.parametrize("config", [QuantConfig(4), QuantConfig(4, act_bits=8, act_scheme="lsq+")], ids=["w4", "w4a8"])
def test_a_state_of_an_earlier_version_is_loaded_and_its_shapes_are_checked(config):
    trained, fresh = quantized(config), quantized(config, factor=3)
    state = {n: t for n, t in trained.state_dict().items() if not n.endswith("_extra_state")}
    assert len(state) < len(trained.state_dict())
    found = fresh.load_state_dict(state)
    assert not found.missing_keys
    assert_same_bits(fresh(X), trained(X))
    other = quantized(QuantConfig(4, group_size=8))
    with pytest.raises(RuntimeError, match=r"size mismatch for first\.scale"):
        other.load_state_dict(state)


@pytest.mark.filterwarnings("ignore:.*torch.distributed is disabled")
def test_torchs_distributed_state_dicts_and_checkpoints_keep_it(tmp_path):
    trained, fresh = quantized(QuantConfig(4)), quantized(QuantConfig(4), factor=3)
    state = get_model_state_dict(trained)
    assert "first._extra_state" in state
    set_model_state_dict(fresh, state)
    assert_same_bits(fresh(X), trained(X))
    with pytest.raises(RuntimeError, match=r"first\.scale is of bits=4, scheme=lsq, must be of bits=8"):
        set_model_state_dict(quantized(QuantConfig(8)), state)

    dcp.save(trained.state_dict(), checkpoint_id=tmp_path)
    fresh = quantized(QuantConfig(4), factor=3)
    read = fresh.state_dict()
    dcp.load(read, checkpoint_id=tmp_path)
    fresh.load_state_dict(read)
    assert_same_bits(fresh(X), trained(X))
    read = quantized(QuantConfig(8)).state_dict()
    dcp.load(read, checkpoint_id=tmp_path)
    with pytest.raises(RuntimeError, match=r"first\.scale is of bits=4, scheme=lsq, must be of bits=8"):
        quantized(QuantConfig(8)).load_state_dict(read)


def test_it_is_on_the_device_of_the_scales():
    model = quantized(QuantConfig(4)).to("meta")
    assert all(t.is_meta for t in model.state_dict().values())
    quantized(QuantConfig(8)).load_state_dict(  # nothing can be read of such a state
        {n: t for n, t in model.state_dict().items() if n.endswith("_extra_state")}, strict=False
    )


def test_a_full_precision_state_says_what_to_do():
    model = quantized(QuantConfig(4))
    with (
        pytest.warns(UserWarning, match=r"without their scales.*call load_weights\(model, state_dict\)"),
        pytest.raises(RuntimeError, match=r'"first.scale \(load_weights\(model, state_dict\) sets scales'),
    ):
        model.load_state_dict(Model().state_dict())
    with pytest.warns(UserWarning, match=r"without their scales"):
        missing = model.load_state_dict(Model().state_dict(), strict=False).missing_keys
    assert set(missing) == {f"{n}.scale" for n in ("first", "second", "tied", "again")}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.load_state_dict({"lm_head.bias": torch.zeros(4)}, strict=False)
        model.load_state_dict({"first.bias": torch.zeros(16)}, strict=False)


class TestLoadWeights:
    def equal(self, model, wanted):
        assert model.state_dict().keys() == wanted.state_dict().keys()
        for name, value in wanted.state_dict().items():
            assert_same_bits(model.state_dict()[name], value, name)
        assert model.second.scale is model.tied.scale
        assert model.again is model.first

    def test_from_full_precision(self, config):
        source = Model(10)
        model = quantized(config)
        parameters = dict(model.named_parameters())
        assert not any(qk.load_weights(model, source.state_dict()))
        assert dict(model.named_parameters()) == parameters  # the same objects
        self.equal(model, qk.quantize_model(copy.deepcopy(source), config))

    @pytest.mark.parametrize("name", OTHERS)
    @pytest.mark.parametrize("forwards", [True, False])
    def test_from_another_configuration(self, name, forwards):
        config, other = OTHERS[name] if forwards else reversed(OTHERS[name])
        source = quantized(config, factor=10)
        with torch.no_grad():
            source.first.scale.mul_(2)
        model = quantized(other)
        assert not any(qk.load_weights(model, source.state_dict()))
        wanted = Model()
        wanted.load_state_dict(
            {n: t for n, t in source.state_dict().items() if "scale" not in n and "act" not in n and "_extra" not in n}
        )
        self.equal(model, qk.quantize_model(wanted, other))
        if other.act_grid is not None:
            assert not model.first.act.ready
            model(X)
            assert model.first.act.ready

    def test_keeps_a_learned_quantizer_of_the_input_that_is_the_same(self):
        source = quantized(QuantConfig(8, act_bits=8, act_scheme="lsq+"), factor=10)
        model = quantized(QuantConfig(2, act_bits=8, act_scheme="lsq+"))
        qk.load_weights(model, source.state_dict())
        for name in ("scale", "zero_point"):
            assert_same_bits(getattr(model.first.act, name), getattr(source.first.act, name))
        assert model.eval()(X).isfinite().all()

    def test_is_strict_as_load_state_dict_is(self):
        model, state = quantized(QuantConfig(4)), Model().state_dict()
        del state["lm_head.bias"]
        with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "lm_head.bias"'):
            qk.load_weights(model, state)
        state["more"] = torch.zeros(1)
        found = qk.load_weights(model, state, strict=False)
        assert found.missing_keys == ["lm_head.bias"]
        assert found.unexpected_keys == ["more"]
        state["first.weight"] = torch.zeros(16, 8)
        with pytest.raises(RuntimeError, match=r"size mismatch for first\.weight"):
            qk.load_weights(model, state, strict=False)

    def test_leaves_the_state_dict_alone(self):
        source = quantized(QuantConfig(8))
        for kind in (OrderedDict, dict):
            state = kind(source.state_dict())
            names = list(state)
            qk.load_weights(quantized(QuantConfig(2)), state)
            assert list(state) == names
            assert_same_bits(state["first.scale"], source.first.scale)

    def test_of_a_layer_alone(self):
        linear = nn.Linear(16, 12)
        layer = qk.quantize_model(nn.Linear(16, 12), QuantConfig(3))
        qk.load_weights(layer, linear.state_dict())
        assert_same_bits(layer.scale, qk.quantize_model(linear, QuantConfig(3)).scale)

    def test_errors(self):
        with pytest.raises(ValueError, match="the model has no quantized layer, quantize_model makes them"):
            qk.load_weights(Model(), Model().state_dict())
