"""Stacked experts against one QuantLinear for each."""

import copy

import pytest
import torch
from torch import nn

import qatkernels as qk
from qatkernels.nn import (
    GroupedPackedLinear,
    GroupedQuantLinear,
    QuantConfig,
    QuantLinear,
    pack_model,
    quantized_weights,
)
from qatkernels.ops.samples import GRIDS
from tests.compare import assert_same_bits

ENDS = (3, 3, 8, 9)
OFFSETS = torch.tensor(ENDS, dtype=torch.int32)
CONFIGS = [
    QuantConfig(bits=grid.bits, scheme=grid.scheme, **granularity)
    for grid in GRIDS
    for granularity in ({}, {"group_size": 8}, {"per_tensor": True})
]


def pair(config, bias=True, features=(16, 6)):
    torch.manual_seed(0)
    linears = [nn.Linear(*features, bias=bias) for _ in ENDS]
    grouped = GroupedQuantLinear.from_linears(linears, config=config)
    return grouped, [QuantLinear.from_linear(copy.deepcopy(linear), config) for linear in linears]


def tokens(count=11, features=16):
    return torch.randn(count, features, generator=torch.Generator().manual_seed(1))


def one_by_one(experts, x):
    parts = [expert(x[s:e]) for expert, s, e in zip(experts, (0, *ENDS), ENDS, strict=False)]
    return torch.cat([*parts, x.new_zeros(len(x) - ENDS[-1], experts[0].out_features)])


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"{c.scheme}{c.bits}-{c.group_size or c.per_tensor}")
def test_equals_the_experts_one_by_one(config):
    grouped, experts = pair(config)
    for e, expert in enumerate(experts):
        assert_same_bits(grouped.quantized_weight()[e], expert.quantized_weight())
        assert_same_bits(grouped.codes()[e], expert.codes())
    ours, theirs = tokens().requires_grad_(), tokens().requires_grad_()
    y, expected = grouped(ours, OFFSETS), one_by_one(experts, theirs)
    torch.testing.assert_close(y, expected)
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(2))
    y.backward(upstream)
    expected.backward(upstream)
    torch.testing.assert_close(ours.grad, theirs.grad)
    for name in ("weight", "scale", "zero_point", "bias"):
        if getattr(grouped, name) is None:
            continue
        grads = [getattr(expert, name).grad for expert in experts]
        for e, grad in enumerate(grads):
            grad = torch.zeros_like(getattr(experts[e], name)) if grad is None else grad
            torch.testing.assert_close(getattr(grouped, name).grad[e].flatten(), grad.flatten(), msg=name)


def test_gradients_of_a_sum_and_of_strided_tokens():
    """An expanded upstream gradient has strides 0."""
    grouped, experts = pair(QuantConfig(bits=2))
    x = tokens(16, 11).T
    grouped(x, OFFSETS).sum().backward()
    one_by_one(experts, x).sum().backward()
    for e, expert in enumerate(experts):
        torch.testing.assert_close(grouped.weight.grad[e], expert.weight.grad if ENDS[e] else grouped.weight.grad[e])


def test_double_backward():
    grouped, experts = pair(QuantConfig(bits=4))
    v = torch.randn(grouped.weight.shape, generator=torch.Generator().manual_seed(3))

    def product(loss, weights, v):
        grads = torch.autograd.grad(loss, weights, create_graph=True)
        return torch.autograd.grad(sum((g * u).sum() for g, u in zip(grads, v, strict=True)), weights)

    (ours,) = product(grouped(tokens(), OFFSETS).square().sum(), [grouped.weight], [v])
    theirs = product(one_by_one(experts, tokens()).square().sum(), [e.weight for e in experts], list(v))
    torch.testing.assert_close(ours, torch.stack(theirs))


@pytest.mark.parametrize("act", [{"act_bits": 8}, {"act_bits": 4, "act_scheme": "lsq"}])
def test_activations(act):
    config = QuantConfig(bits=4, **act)
    grouped, experts = pair(config)
    grouped.eval()
    if grouped.act is not None and hasattr(grouped.act, "scale"):
        grouped.train()
        grouped(tokens(), OFFSETS)
        for expert in experts:
            expert.act = grouped.act
        grouped.eval()
    torch.testing.assert_close(grouped(tokens(), OFFSETS), one_by_one([e.eval() for e in experts], tokens()))


def test_noise_is_for_training_only():
    grouped, _ = pair(QuantConfig(bits=2))
    clean = grouped.eval()(tokens(), OFFSETS)
    grouped.noise_std = 0.5
    assert_same_bits(grouped(tokens(), OFFSETS), clean)
    assert not torch.equal(grouped.train()(tokens(), OFFSETS), clean)


def test_autocast_and_casts():
    grouped, _ = pair(QuantConfig(bits=2))
    with torch.autocast("cpu", torch.bfloat16):
        y = grouped(tokens(), OFFSETS)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), grouped(tokens(), OFFSETS), rtol=0.02, atol=0.02)
    scale = grouped.scale.detach().clone()
    assert grouped.bfloat16().weight.dtype == torch.bfloat16
    assert_same_bits(grouped.scale, scale)


@pytest.mark.parametrize("config", CONFIGS[::4], ids=lambda c: f"{c.scheme}{c.bits}-{c.group_size or c.per_tensor}")
def test_packs(config):
    grouped, _ = pair(config)
    model = nn.ModuleList([grouped.eval()])
    expected = grouped(tokens(), OFFSETS)
    assert quantized_weights(model) == [grouped.weight]
    pack_model(model)
    assert isinstance(model[0], GroupedPackedLinear)
    torch.testing.assert_close(model[0](tokens(), OFFSETS), expected)


def test_is_found_and_reset_and_saved():
    grouped = GroupedQuantLinear(3, 16, 6, bias=True, config=QuantConfig(bits=2))
    assert list(qk.quantized_modules(nn.ModuleList([grouped]))) == ["0"]
    before = grouped.scale.detach().clone()
    grouped.reset_parameters()
    assert not torch.equal(grouped.scale, before)
    twin = GroupedQuantLinear(3, 16, 6, bias=True, config=QuantConfig(bits=2))
    twin.load_state_dict(grouped.state_dict())
    ends = torch.tensor([2, 5, 5], dtype=torch.int32)
    assert_same_bits(twin(tokens(), ends), grouped(tokens(), ends))
    assert "num_experts=3" in repr(grouped)


def test_stacked_parameters_stay_the_same_objects():
    weight = nn.Parameter(torch.randn(2, 6, 16), requires_grad=False)
    grouped = GroupedQuantLinear.from_stacked(weight, config=QuantConfig(bits=4))
    assert grouped.weight is weight
    assert not grouped.scale.requires_grad


def test_bad_calls():
    config = QuantConfig(bits=2)
    for message, call in {
        "linears have 0 different shapes": lambda: GroupedQuantLinear.from_linears([], config=config),
        "linears have 2 different shapes": lambda: GroupedQuantLinear.from_linears(
            [nn.Linear(4, 4), nn.Linear(4, 5)], config=config
        ),
        r"linears\[0\] is a": lambda: GroupedQuantLinear.from_linears(
            [nn.modules.linear.NonDynamicallyQuantizableLinear(4, 4)], config=config
        ),
        r"weight has shape \(4, 4\)": lambda: GroupedQuantLinear.from_stacked(torch.zeros(4, 4), config=config),
        r"bias has shape \(4,\)": lambda: GroupedQuantLinear.from_stacked(
            torch.zeros(2, 4, 4), torch.zeros(4), config=config
        ),
        "group_size is 3": lambda: GroupedQuantLinear(2, 4, 4, config=QuantConfig(bits=2, group_size=3)),
        "config is None": lambda: GroupedQuantLinear(2, 4, 4, config=None),
        "offsets is .3, 2.": lambda: GroupedQuantLinear(2, 4, 4, config=config)(
            torch.zeros(3, 4), torch.tensor([3, 2], dtype=torch.int32)
        ),
    }.items():
        with pytest.raises(ValueError, match=message):
            call()
