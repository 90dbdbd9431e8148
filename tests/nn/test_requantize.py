"""Another configuration for a layer that is quantized already, and what reparametrizes its weight."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

import qatkernels as qk
from qatkernels.nn import GroupedQuantLinear, QuantConfig, QuantLinear
from qatkernels.nn.quantized import reparametrization
from qatkernels.testing.compare import assert_same_bits


@pytest.mark.parametrize(
    "before",
    [QuantConfig(4, group_size=8), QuantConfig(4, "affine"), QuantConfig(4, per_tensor=True)],
    ids=["lsq4-group", "affine4", "lsq4-tensor"],
)
def test_is_what_a_new_layer_would_be(before, config):
    linear = nn.Linear(16, 12)
    layer = QuantLinear.from_linear(copy.deepcopy(linear), before)
    weight, bias = layer.weight, layer.bias
    layer.requantize(config)
    assert layer.weight is weight
    assert layer.bias is bias
    fresh = QuantLinear.from_linear(linear, config)
    assert layer.state_dict().keys() == fresh.state_dict().keys()
    for name, value in fresh.state_dict().items():
        assert_same_bits(layer.state_dict()[name], value, name)
    assert (layer.config, layer.grid, layer.group_size) == (config, fresh.grid, fresh.group_size)
    assert str(layer) == str(fresh)
    x = torch.randn(3, 16)
    assert_same_bits(layer(x), fresh(x))
    for module in (layer, fresh):
        module(x).square().sum().backward()
    for name, parameter in fresh.named_parameters():  # with the gradient scale of the new grid
        assert_same_bits(layer.get_parameter(name).grad, parameter.grad, name)


def test_of_stacked_experts():
    weight = torch.randn(3, 12, 16)
    layer = GroupedQuantLinear.from_stacked(weight.clone(), config=QuantConfig(8))
    layer.requantize(QuantConfig(2, group_size=4))
    fresh = GroupedQuantLinear.from_stacked(weight, config=QuantConfig(2, group_size=4))
    assert_same_bits(layer.quantized_weight(), fresh.quantized_weight())


def test_takes_the_present_weight():
    layer = QuantLinear(16, 12, config=QuantConfig(4))
    with torch.no_grad():
        layer.weight.mul_(10)
    layer.requantize(QuantConfig(4))
    assert_same_bits(layer.scale, QuantLinear.from_linear(nn_linear(layer), QuantConfig(4)).scale)


def nn_linear(layer):
    linear = nn.Linear(layer.in_features, layer.out_features)
    linear.weight = layer.weight
    return linear


def test_keeps_what_the_quantizer_of_the_input_has_learned_unless_it_changes():
    layer = QuantLinear(16, 12, config=QuantConfig(8, act_bits=8, act_scheme="lsq"))
    layer(torch.randn(3, 16))
    act, scale = layer.act, layer.act.scale.clone()
    layer.requantize(QuantConfig(2, act_bits=8, act_scheme="lsq"))
    assert layer.act is act
    assert_same_bits(layer.act.scale, scale)
    assert layer.eval()(torch.randn(3, 16)).isfinite().all()
    for config, kind in (
        (QuantConfig(2, act_bits=4, act_scheme="lsq"), qk.nn.LearnedActivation),
        (QuantConfig(2, act_bits=4), qk.nn.DynamicActivation),
        (QuantConfig(2), type(None)),
    ):
        layer.requantize(config)
        assert type(layer.act) is kind
        assert layer.act is not act


def test_frozen_scales_stay_frozen_and_a_layer_that_shared_them_is_as_before():
    layer, twin = (QuantLinear(16, 12, config=QuantConfig(4)) for _ in range(2))
    twin.weight, twin.scale = layer.weight, layer.scale
    layer.scale.requires_grad_(False)
    before = twin.quantized_weight().detach().clone()
    layer.requantize(QuantConfig(3))
    assert not layer.scale.requires_grad
    assert layer.weight is twin.weight
    assert_same_bits(twin.quantized_weight(), before)


def test_refused_configurations_change_nothing():
    layer = QuantLinear(16, 12, config=QuantConfig(4, act_bits=4, act_scheme="lsq"))
    before, scale, act = layer.config, layer.scale, layer.act
    with pytest.raises(ValueError, match=r"group_size is 5, must be a positive divisor"):
        layer.requantize(QuantConfig(2, group_size=5))
    with pytest.raises(ValueError, match="config is 2, must be a QuantConfig"):
        layer.requantize(2)
    with pytest.raises(AttributeError, match=r"config cannot be assigned.*call layer\.requantize\(config\)"):
        layer.config = QuantConfig(2)
    assert layer.config is before
    assert layer.scale is scale
    assert layer.act is act


REPARAMETRIZED = {
    "pruned by torch.nn.utils.prune": lambda m: prune.l1_unstructured(m, "weight", 0.5),
    "reparametrized by weight_norm": nn.utils.weight_norm,
    "reparametrized by spectral_norm": nn.utils.spectral_norm,
    "parametrized by weight_norm": parametrizations.weight_norm,
    "parametrized by spectral_norm": parametrizations.spectral_norm,
    "parametrized by orthogonal": parametrizations.orthogonal,
}


@pytest.mark.filterwarnings("ignore:.*(weight_norm|spectral_norm).* is deprecated")
class TestReparametrization:
    @pytest.mark.parametrize("how", REPARAMETRIZED)
    def test_is_found(self, how):
        layer = QuantLinear(16, 16, config=QuantConfig(2))
        assert reparametrization(layer) is None
        REPARAMETRIZED[how](layer)
        assert reparametrization(layer) == how

    def test_of_something_else_is_none(self):
        assert reparametrization(prune.l1_unstructured(QuantLinear(16, 16, config=QuantConfig(2)), "bias", 0.5)) is None
        layer = QuantLinear(16, 16, config=QuantConfig(2))
        layer.register_forward_pre_hook(lambda *_: None)
        assert reparametrization(layer) is None
        del layer.weight
        layer.weight = torch.ones(16, 16)
        assert "without a weight Parameter of its own" in reparametrization(layer)

    @pytest.mark.parametrize("how", REPARAMETRIZED)
    def test_packing_gives_the_present_weight_or_says_what_to_do(self, how):
        model, x = nn.Sequential(QuantLinear(16, 16, config=QuantConfig(4))).eval(), torch.randn(3, 16)
        REPARAMETRIZED[how](model[0])
        model(x)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "weight" in name:
                    parameter.mul_(1.5)
        if how.startswith("parametrized"):
            torch.testing.assert_close(qk.pack_model(copy.deepcopy(model))(x), model(x))
        else:
            with pytest.raises(ValueError, match=f"0 cannot be packed: it is {how}.*make the present one permanent"):
                qk.pack_model(model)
            assert type(model[0]) is QuantLinear
