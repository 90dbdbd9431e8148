"""Zero points that are used as other runtimes store them: integers within the codes."""

import copy
import json
import math

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch import nn

import qatkernels as qk
from qatkernels.formats.integers import IntegerWeight, UnfitError
from qatkernels.methods import SQuAT, WinQ
from qatkernels.methods.stats import GridStats
from qatkernels.nn import GroupedQuantLinear, QuantConfig, QuantEmbedding, QuantLinear, calibrate, to_plain
from qatkernels.ops.quant_linear import LEAST, joins
from qatkernels.testing.compare import assert_same_bits

SETTINGS = {
    "rows": {}, "groups": {"group_size": 16}, "tensor": {"per_tensor": True}, "float16": {"scale_dtype": torch.float16},
}  # fmt: skip
X = torch.linspace(-1, 1, 5 * 64).sin().view(5, 64)


@torch.no_grad()
def moved(module):
    """Move zero points where training may: off the integers, halfway between two, and beyond the codes."""
    zero_point, high = module.zero_point, module.grid.code_max
    values = torch.linspace(-2.3, high + 2.7, zero_point.numel())
    values[len(values) // 2] = high // 2 + 0.5
    zero_point.copy_(values.view_as(zero_point))
    return module


def layer(bits=4, domain="int", **settings):
    torch.manual_seed(0)
    return moved(QuantLinear(64, 8, config=QuantConfig(bits, "affine", zero_point_domain=domain, **settings)))


def twin(module, **settings):
    """Return the same layer with zero points of any kind, which are those that the layer should use."""
    config = QuantConfig(module.grid.bits, "affine", **settings)
    other = copy.deepcopy(module)
    other.quantizer.configure(config, module.weight.numel())
    with torch.no_grad():
        used = [min(max(round(z), 0), module.grid.code_max) for z in module.zero_point.flatten().tolist()]
        other.zero_point.copy_(torch.tensor(used).view_as(other.zero_point))
    assert not torch.equal(other.zero_point, module.zero_point)
    return other


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_forward_uses_the_nearest_code(bits, settings):
    """Values, codes and gradients are those of the integer, also beyond the codes; the parameter keeps its value."""
    module = layer(bits, **settings)
    other, before = twin(module, **settings), module.zero_point.detach().clone()
    assert_same_bits(module.quantized_weight(), other.quantized_weight())
    assert_same_bits(module.codes(), other.codes())
    for m in (module, other):
        m(X).square().sum().backward()
    for (name, mine), theirs in zip(module.named_parameters(), other.parameters(), strict=True):
        assert_same_bits(mine.grad, theirs.grad, name)
    assert bool(module.zero_point.grad.any())
    assert_same_bits(module.zero_point.detach(), before)


def test_forward_mode():
    module = layer(group_size=16)
    other = twin(module, group_size=16)
    tangents = {name: torch.randn_like(p) for name, p in module.named_parameters()}

    def transformed(m):
        call = lambda state: torch.func.functional_call(m, state, (X,))  # noqa: E731
        return torch.func.jvp(call, (dict(m.named_parameters()),), (tangents,))

    def pushed(m):
        with torch.no_grad(), forward_ad.dual_level():
            state = {name: forward_ad.make_dual(p.detach(), tangents[name]) for name, p in m.named_parameters()}
            return forward_ad.unpack_dual(torch.func.functional_call(m, state, (X,)))

    for way in (transformed, pushed):
        for mine, theirs in zip(way(module), way(other), strict=True):
            assert_same_bits(mine, theirs)


def test_the_joined_backward_of_a_large_weight():
    torch.manual_seed(0)
    module = moved(QuantLinear(64, LEAST // 64, config=QuantConfig(4, "affine", zero_point_domain="int")))
    assert joins(X, module.bias, module.weight, None)
    gradients = [torch.autograd.grad(m(X).square().sum(), list(m.parameters())) for m in (module, twin(module))]
    for mine, theirs in zip(*gradients, strict=True):
        assert_same_bits(mine, theirs)


def test_embeddings_and_experts():
    config = QuantConfig(4, "affine", 8, zero_point_domain="int")
    torch.manual_seed(0)
    embedding = moved(QuantEmbedding(20, 16, config=config))
    tokens = torch.tensor([[3, 0, 19], [3, 7, 11]])
    assert_same_bits(embedding(tokens), twin(embedding, group_size=8)(tokens))
    assert_same_bits(embedding(tokens), embedding.quantized_weight()[tokens])
    experts = moved(GroupedQuantLinear(3, 16, 6, config=config))
    offsets = torch.tensor([2, 2, 5], dtype=torch.int32)
    assert_same_bits(experts(X[:, :16], offsets), twin(experts, group_size=8)(X[:, :16], offsets))
    assert_same_bits(qk.GroupedPackedLinear.from_quantized(experts).weight.dequantize(), experts.quantized_weight())


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_packed_plain_and_exported_weights_are_those_of_the_forward(settings):
    model = nn.Sequential(layer(**settings))
    wanted = model[0].quantized_weight().detach()
    weight = IntegerWeight.of(model[0])
    assert_same_bits(weight.dequantize(), wanted)
    assert -15 <= int(weight.low.min()) <= int(weight.low.max()) <= 0  # minus the zero point
    packed = qk.pack_model(copy.deepcopy(model))
    assert_same_bits(packed[0].weight.dequantize(), wanted)
    assert_same_bits(IntegerWeight.of(packed[0]).integers, weight.integers)
    assert_same_bits(to_plain(copy.deepcopy(model))[0].weight.detach(), wanted)
    with pytest.raises(UnfitError, match=r"zero points are no integers .*zero_point_domain='int'"):
        IntegerWeight.of(layer(domain="float", **settings))


@pytest.mark.parametrize("reset_weight", [0.5, 1.0])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_resets_change_no_quantized_value(settings, reset_weight):
    model = nn.Sequential(layer(**settings))
    wanted, before = model[0].quantized_weight().detach(), model[0].weight.detach().clone()
    winq = WinQ(model, reset_every=1, reset_weight=reset_weight, noise_std=0.0)
    assert_same_bits(winq.stats.codes()["0"], model[0].codes())
    distance = winq.stats.distance()
    winq.reset()
    assert not torch.equal(model[0].weight, before)
    assert_same_bits(model[0].quantized_weight().detach(), wanted)
    assert winq.stats.distance() == pytest.approx((1 - reset_weight) * distance, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("target", ["quantized", "latent"])
def test_squat(target):
    """Its steps are those of the integers, and its statistics count the codes of the forward."""
    model = nn.Sequential(layer())
    other = nn.Sequential(twin(model[0]))
    squats = [SQuAT(m, torch.optim.SGD(m.parameters(), lr=1e-3), target=target) for m in (model, other)]
    for m, squat in zip((model, other), squats, strict=True):
        squat.step(lambda m=m, squat=squat: backward(m, squat.optimizer))
    assert_same_bits(model[0].weight.detach(), other[0].weight.detach())
    assert_same_bits(GridStats(model).codes()["0"], model[0].codes())


def backward(model, optimizer):
    optimizer.zero_grad()
    loss = model(X).square().mean()
    loss.backward()
    return loss


@pytest.mark.parametrize("scale_init", [None, "range", "max", "mse", "activation"])
def test_initial_zero_points_are_used_as_they_are(scale_init):
    """So what a search found is the error of the forward."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 8))
    nn.init.uniform_(model[0].weight, 0.5, 2)  # all positive: where the range would begin is beyond the codes
    config = QuantConfig(3, "affine", group_size=16, scale_init=scale_init, zero_point_domain="int")
    qk.quantize_model(model, config)
    calibrate(model, X)
    zero_point = model[0].zero_point
    assert_same_bits(model[0].quantizer.stored(model[0].scale, zero_point)[1], zero_point)
    assert qk.check(model, X).ok


def test_a_zero_point_comes_back():
    """It left the codes, and its gradient still reaches it."""
    model = nn.Sequential(layer())
    with torch.no_grad():
        model[0].zero_point.fill_(-3)
        target = nn.functional.linear(X, model[0].weight, model[0].bias)
    optimizer = torch.optim.Adam([model[0].zero_point], lr=0.3)
    for _ in range(40):
        optimizer.zero_grad()
        loss = (model(X) - target).square().mean()
        loss.backward()
        optimizer.step()
    assert bool((model[0].zero_point > 0.5).all())


def test_under_compile():
    module = layer(group_size=16)
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    assert_same_bits(compiled(X), module(X))
    found, wanted = (torch.autograd.grad(m(X).square().sum(), list(module.parameters())) for m in (compiled, module))
    for mine, theirs in zip(found, wanted, strict=True):
        assert_same_bits(mine, theirs)


def test_configuration():
    config = QuantConfig(4, "affine", zero_point_domain="int")
    values = config.to_dict()
    assert QuantConfig.from_dict(json.loads(json.dumps(values))) == config
    assert "integer zero points" in str(config)
    del values["zero_point_domain"]  # written by an earlier version
    assert QuantConfig.from_dict(values) == QuantConfig(4, "affine")
    with pytest.raises(ValueError, match=r"zero_point_domain is 'INT', must be one of \('float', 'int'\)"):
        QuantConfig(4, "affine", zero_point_domain="INT")
    with pytest.raises(ValueError, match="zero_point_domain is 'int' with scheme 'lsq', it is for scheme 'affine'"):
        QuantConfig(4, zero_point_domain="int")


def test_state_dicts():
    """One of an earlier version has no domain in its layout: it is of float zero points."""
    old, new = layer(domain="float"), layer()
    layout = bytes(old.state_dict()["_extra_state"].tolist()).decode()
    assert layout == "bits=4, scheme=affine"
    new.load_state_dict(copy.deepcopy(new).state_dict())
    with pytest.raises(RuntimeError, match="zero_point_domain=int"):
        new.load_state_dict(old.state_dict())


def test_values_that_are_not_finite_are_seen():
    model = nn.Sequential(layer())
    with torch.no_grad():
        model[0].zero_point[0] = math.nan
    assert not bool(model(X)[:, 0].isfinite().any())
    assert not qk.check(model, X).ok
