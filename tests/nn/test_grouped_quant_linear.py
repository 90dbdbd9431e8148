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
from qatkernels.testing.compare import assert_same_bits
from qatkernels.testing.samples import GRIDS

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


def one_by_one(experts, x, ends=ENDS):
    parts = [expert(x[s:e]) for expert, s, e in zip(experts, (0, *ends), ends, strict=False)]
    return torch.cat([*parts, x.new_zeros(len(x) - ends[-1], experts[0].out_features)])


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
    """An expanded upstream gradient has strides 0; an expert without tokens has a gradient, and it is 0."""
    grouped, experts = pair(QuantConfig(bits=2))
    x = tokens(16, 11).T
    grouped(x, OFFSETS).sum().backward()
    one_by_one(experts, x).sum().backward()
    assert ENDS[0] == ENDS[1]
    for name in ("weight", "scale", "bias"):
        grads = getattr(grouped, name).grad
        assert_same_bits(grads[1], torch.zeros_like(grads[1]))
        for e, expert in enumerate(experts):
            torch.testing.assert_close(grads[e], getattr(expert, name).grad, msg=f"{name} {e}")
            assert e == 1 or grads[e].abs().sum() > 0


@pytest.mark.parametrize("ends", [(0, 0, 0, 0), (0, 0, 11, 11), (11,), (4,)], ids=str)
@pytest.mark.parametrize("count", [11, 0])
def test_one_expert_all_tokens_to_one_and_none(ends, count):
    ends = tuple(min(end, count) for end in ends)
    torch.manual_seed(0)
    linears = [nn.Linear(16, 6) for _ in ends]
    grouped = GroupedQuantLinear.from_linears(linears, config=QuantConfig(bits=4, group_size=8))
    experts = [QuantLinear.from_linear(linear, grouped.config) for linear in linears]
    ours, theirs = tokens()[:count].requires_grad_(), tokens()[:count].requires_grad_()
    y, expected = grouped(ours, torch.tensor(ends, dtype=torch.int32)), one_by_one(experts, theirs, ends)
    torch.testing.assert_close(y, expected)
    y.square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad)
    for name in ("weight", "scale", "bias"):
        for e, expert in enumerate(experts):
            torch.testing.assert_close(getattr(grouped, name).grad[e], getattr(expert, name).grad, msg=f"{name} {e}")


def test_compiles_without_a_break():
    grouped, _ = pair(QuantConfig(bits=2, act_bits=8))
    x, leaves = tokens().requires_grad_(), list(grouped.parameters())
    eager = torch.autograd.grad(grouped(x, OFFSETS).square().sum(), [x, *leaves])
    y = torch.compile(grouped, fullgraph=True, backend="aot_eager")(x, OFFSETS)
    torch.testing.assert_close(y, grouped(x, OFFSETS))
    for compiled, expected in zip(torch.autograd.grad(y.square().sum(), [x, *leaves]), eager, strict=True):
        torch.testing.assert_close(compiled, expected)


def test_forward_mode():
    """The transpose of the backward, and the tangents of the experts one by one."""
    grouped, experts = pair(QuantConfig(bits=3, group_size=8))
    values = {name: p.detach() for name, p in grouped.named_parameters()}
    generator = torch.Generator().manual_seed(4)
    x, along_x = tokens(), torch.randn(11, 16, generator=generator)
    along = {name: torch.randn(p.shape, generator=generator) for name, p in values.items()}

    def call(x, values):
        return torch.func.functional_call(grouped, values, (x, OFFSETS))

    y, pushed = torch.func.jvp(call, (x, values), (along_x, along))
    torch.testing.assert_close(y, grouped(x, OFFSETS))
    parts = []
    for e, (start, end) in enumerate(zip((0, *ENDS), ENDS, strict=False)):
        own, moves = ({name: t[e] for name, t in these.items()} for these in (values, along))
        parts.append(
            torch.func.jvp(
                lambda x, v, e=e: torch.func.functional_call(experts[e], v, (x,)),
                (x[start:end], own), (along_x[start:end], moves),
            )[1]
        )  # fmt: skip
    torch.testing.assert_close(pushed, torch.cat([*parts, torch.zeros(2, 6)]))
    upstream = torch.randn(y.shape, generator=generator)
    dx, dv = torch.func.vjp(call, x, values)[1](upstream)
    pulled = (dx * along_x).sum() + sum((dv[name] * along[name]).sum() for name in values)
    torch.testing.assert_close((pushed * upstream).sum(), pulled, rtol=1e-4, atol=1e-4)


def test_double_backward():
    grouped, experts = pair(QuantConfig(bits=4))
    v = torch.randn(grouped.weight.shape, generator=torch.Generator().manual_seed(3))

    def product(loss, weights, v):
        grads = torch.autograd.grad(loss, weights, create_graph=True)
        return torch.autograd.grad(sum((g * u).sum() for g, u in zip(grads, v, strict=True)), weights)

    (ours,) = product(grouped(tokens(), OFFSETS).square().sum(), [grouped.weight], [v])
    theirs = product(one_by_one(experts, tokens()).square().sum(), [e.weight for e in experts], list(v))
    torch.testing.assert_close(ours, torch.stack(theirs))


@pytest.mark.parametrize("act", [{"act_bits": 8}, {"act_bits": 4, "act_scheme": "lsq", "out_bits": 4}])
def test_activations(act):
    config = QuantConfig(bits=4, **act)
    grouped, experts = pair(config)
    grouped.eval()
    if grouped.act is not None and hasattr(grouped.act, "scale"):
        grouped.train()
        grouped(tokens(), OFFSETS)
        for expert in experts:
            expert.act, expert.out_act = grouped.act, grouped.out_act
        grouped.eval()
    torch.testing.assert_close(grouped(tokens(), OFFSETS), one_by_one([e.eval() for e in experts], tokens()))


def test_noise_is_for_training_only():
    grouped, _ = pair(QuantConfig(bits=2))
    clean = grouped.eval()(tokens(), OFFSETS)
    grouped.quantizer.set_noise(0.5, 0.0)
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


@pytest.mark.parametrize("frozen", ["weight", "bias", "both", "none"])
def test_frozen_experts_stay_frozen(frozen):
    linears = [nn.Linear(4, 4) for _ in range(3)]
    for linear in linears:
        linear.weight.requires_grad_(frozen not in ("weight", "both"))
        linear.bias.requires_grad_(frozen not in ("bias", "both"))
        linear.eval()
    grouped = GroupedQuantLinear.from_linears(linears, config=QuantConfig(bits=2))
    assert grouped.weight.requires_grad == grouped.scale.requires_grad == linears[0].weight.requires_grad
    assert grouped.bias.requires_grad == linears[0].bias.requires_grad
    assert not grouped.training


def test_experts_that_no_stack_holds():
    for changed, message in (
        (
            lambda linear: linear.weight.requires_grad_(False),
            r"linears\[1\].weight has requires_grad False, must be True",
        ),
        (lambda linear: linear.bias.requires_grad_(False), r"linears\[1\].bias has requires_grad False, must be True"),
        (lambda linear: linear.double(), r"linears\[1\].weight has dtype torch.float64, must be torch.float32"),
        (lambda linear: linear.to("meta"), r"linears\[1\].weight has device meta, must be cpu"),
    ):
        linears = [nn.Linear(4, 4), nn.Linear(4, 4)]
        changed(linears[1])
        with pytest.raises(ValueError, match=message):
            GroupedQuantLinear.from_linears(linears, config=QuantConfig(bits=2))


def test_bad_offsets():
    layer = GroupedQuantLinear(2, 4, 4, config=QuantConfig(bits=2))
    packed = pack_model(copy.deepcopy(layer))
    for error, message, offsets in (
        (ValueError, "offsets is .3, 2., must ascend from 0", torch.tensor([3, 2], dtype=torch.int32)),
        (ValueError, "at most the 3 rows of x", torch.tensor([1, 4], dtype=torch.int32)),
        (RuntimeError, "offsets is torch.int64, must be torch.int32", torch.tensor([1, 3])),
        (RuntimeError, "offsets has shape .3,., must be .2,.", torch.tensor([1, 2, 3], dtype=torch.int32)),
    ):
        for module in (layer, packed):
            with pytest.raises(error, match=message):
                module(torch.zeros(3, 4), offsets)


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
    }.items():
        with pytest.raises(ValueError, match=message):
            call()
