"""Hessian-vector products against torch.func.hessian, closed forms, and the algebra of symmetric matrices."""

import copy
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from qatkernels.hessian import hvp
from qatkernels.nn import GroupedQuantLinear, QuantConfig, quantize_model, quantized_weights
from qatkernels.ops import cross_entropy
from qatkernels.trainer.demo_model import ModelConfig, Transformer

#: One configuration of each kind of weight quantizer, and of activations.
CONFIGS = {
    "binary": QuantConfig(1),
    "ternary": QuantConfig(1.58),
    "seq2": QuantConfig(2),
    "lsq3": QuantConfig(3),
    "lsq4-group": QuantConfig(4, group_size=2),
    "lsq4-tensor": QuantConfig(4, per_tensor=True),
    "affine4": QuantConfig(4, "affine"),
    "seq2-dynamic8": QuantConfig(2, act_bits=8),
    "lsq4-lsq8": QuantConfig(4, act_bits=8, act_scheme="lsq"),
    "lsq4-lsq8-out8": QuantConfig(4, act_bits=8, act_scheme="lsq", out_bits=8),
}
ENGINES = ("reverse", "forward")


def small(config, dtype=torch.float64):
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).to(dtype)
    model = quantize_model(model, config)
    x, y = torch.randn(5, 4, dtype=dtype), torch.randint(3, (5,))
    model(x)  # initializes learned activations
    return model.eval(), x, y


def functional_hessian(model, loss_of, params):
    """The Hessian by torch.func, over the named parameters, as one matrix."""
    names = [name for name, p in model.named_parameters() if any(p is q for q in params)]
    own = dict(model.named_parameters())

    def loss(flat):
        parts = flat.split([own[n].numel() for n in names])
        given = {n: part.view_as(own[n]) for n, part in zip(names, parts, strict=True)}
        return loss_of(lambda *args: torch.func.functional_call(model, given, args))

    flat = torch.cat([own[n].detach().reshape(-1) for n in names])
    return torch.func.hessian(loss)(flat)


def dense(loss_fn, params, engine="reverse"):
    """The Hessian, a product with each unit vector at a time."""
    columns = []
    for i, p in enumerate(params):
        for j in range(p.numel()):
            v = [torch.zeros_like(q) for q in params]
            v[i].view(-1)[j] = 1
            columns.append(torch.cat([t.reshape(-1) for t in hvp(loss_fn, params, v, engine=engine)]))
    return torch.stack(columns, 1)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_equals_the_functional_hessian(config, engine):
    model, x, y = small(config)
    params = quantized_weights(model)
    with torch.no_grad():
        for p in params:  # some weights where the gradient does not pass
            p.mul_(1.5)
    wanted = functional_hessian(model, lambda call: cross_entropy(call(x), y), params)
    assert wanted.abs().max() > 1e-3
    found = dense(lambda: cross_entropy(model(x), y), params, engine)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("engine", ENGINES)
def test_all_parameters_of_a_transformer(engine):
    """Attention, norms, the embedding and the head besides the quantized weights."""
    model = Transformer(ModelConfig(width=8, depth=1, heads=2, context=4, vocab=5)).double()
    model = quantize_model(model, QuantConfig(2), exclude=("lm_head",))
    tokens = torch.randint(5, (2, 5))
    # Scales are float32 and would make it a comparison in float32.
    params = [p for p in model.parameters() if p.numel() < 70 and p.dtype == torch.float64]

    def loss_of(call):
        return cross_entropy(call(tokens[:, :-1]), tokens[:, 1:])

    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        wanted = functional_hessian(model, loss_of, params)
    found = dense(lambda: loss_of(model), params, engine)
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("engine", ENGINES)
def test_experts(engine):
    """Two layers of experts in a row, tokens that no expert takes among them."""
    first, second = (GroupedQuantLinear(2, a, b, config=QuantConfig(2)).double() for a, b in ((4, 5), (5, 3)))
    x, y, offsets = torch.randn(8, 4).double(), torch.randint(3, (8,)), torch.tensor([3, 7], dtype=torch.int32)
    model = nn.ModuleList((first, second))
    params = quantized_weights(model)
    weights = [layer.quantized_weight().detach() for layer in model]

    def plain(flat):
        a, b = (t.view_as(w) for t, w in zip(flat.split([w.numel() for w in weights]), weights, strict=True))
        parts = [torch.tanh(part @ a[e].T) @ b[e].T for e, part in enumerate((x[:3], x[3:7]))]
        return cross_entropy(torch.cat([*parts, torch.zeros(1, 3, dtype=torch.float64)]), y)

    flat = torch.cat([w.reshape(-1) for w in weights])
    masks = torch.cat(
        [torch.autograd.grad(layer.quantized_weight().sum(), layer.weight)[0].view(-1) for layer in model]
    )
    wanted = masks[:, None] * torch.func.hessian(plain)(flat) * masks
    assert 0 < masks.mean() < 1
    found = dense(lambda: cross_entropy(second(torch.tanh(first(x, offsets)), offsets), y), params, engine)
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("engine", ENGINES)
def test_linear_regression(engine):
    """mean((X w - y)^2) has the Hessian 2 X'X / rows wherever it is."""
    x, y = torch.randn(7, 4, dtype=torch.float64), torch.randn(7, dtype=torch.float64)
    w = torch.randn(4, dtype=torch.float64, requires_grad=True)
    v = torch.randn(4, dtype=torch.float64)
    (product,) = hvp(lambda: (x @ w - y).square().mean(), [w], [v], engine=engine)
    torch.testing.assert_close(product, 2 / 7 * x.T @ (x @ v))


@pytest.mark.parametrize("loss", [F.cross_entropy, cross_entropy], ids=["torch", "ours"])
@pytest.mark.parametrize("engine", ENGINES)
def test_softmax_regression(engine, loss):
    """The Hessian of softmax regression is the mean of (diag(p) - p p') kron x x'."""
    x, y = torch.randn(6, 3, dtype=torch.float64), torch.randint(4, (6,))
    w, v = torch.randn(4, 3, dtype=torch.float64, requires_grad=True), torch.randn(4, 3, dtype=torch.float64)
    (product,) = hvp(lambda: loss(x @ w.T, y), [w], [v], engine=engine)
    p = torch.softmax(x @ w.T, 1).detach()
    inner = torch.diag_embed(p) - p[:, :, None] * p[:, None]
    hessian = torch.einsum("bij,bk,bl->ikjl", inner, x, x) / 6
    torch.testing.assert_close(product, torch.einsum("ikjl,jl->ik", hessian, v))


@given(
    seed=st.integers(0, 2**31),
    a=st.floats(-4, 4),
    b=st.floats(-4, 4),
    config=st.sampled_from(list(CONFIGS)),
    engine=st.sampled_from(ENGINES),
)
@settings(max_examples=40, deadline=None)
def test_linear_and_symmetric(seed, a, b, config, engine):
    torch.manual_seed(seed)
    model, x, y = small(CONFIGS[config])
    params = quantized_weights(model)
    u, v = ([torch.randn_like(p) for p in params] for _ in range(2))

    def times(t):
        return hvp(lambda: F.cross_entropy(model(x), y), params, t, engine=engine)

    def dot(s, t):
        return sum((p * q).sum() for p, q in zip(s, t, strict=True))

    hu, hv = times(u), times(v)
    torch.testing.assert_close(dot(v, hu), dot(u, hv), rtol=1e-10, atol=1e-12)
    both = times([a * p + b * q for p, q in zip(u, v, strict=True)])
    for left, p, q in zip(both, hu, hv, strict=True):
        torch.testing.assert_close(left, a * p + b * q, rtol=1e-10, atol=1e-12)


def test_forward_engine_leaves_no_trace():
    """Values, versions and signs of zero are unchanged, and a retained graph of the same parameters stays usable."""
    model, x, y = small(CONFIGS["lsq4-tensor"])
    params = quantized_weights(model)
    with torch.no_grad():
        params[0][0, :2] = torch.tensor([0.0, -0.0])
    before = copy.deepcopy(model.state_dict())
    v = [torch.randn_like(p) for p in params]
    loss = F.cross_entropy(model(x), y)
    versions = [p._version for p in params]
    hvp(lambda: F.cross_entropy(model(x), y), params, v, engine="forward")
    assert versions == [p._version for p in params]
    loss.backward()
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
        if value.is_floating_point():
            assert torch.equal(value.signbit(), before[name].signbit())
    with torch.autograd.forward_ad.dual_level():
        assert all(torch.autograd.forward_ad.unpack_dual(p).tangent is None for p in params)


@pytest.mark.parametrize("engine", ENGINES)
def test_unused_and_linear_parameters(engine):
    w, unused = torch.randn(3, requires_grad=True), torch.randn(2, requires_grad=True)
    ones = [torch.ones(3), torch.ones(2)]
    product = hvp(lambda: (w**2).sum(), [w, unused], ones, engine=engine)
    assert torch.equal(product[0], torch.full((3,), 2.0))
    assert torch.equal(product[1], torch.zeros(2))
    # A linear loss has a Hessian, which is zero.
    assert torch.equal(hvp(lambda: w.sum(), [w], ones[:1], engine=engine)[0], torch.zeros(3))


W = torch.randn(3, requires_grad=True)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    ("loss_fn", "params", "v", "words"),
    [
        (lambda: W * 2, [W], [torch.ones(3)], r"the loss is torch.float32 of shape \(3,\).*reduce"),
        (lambda: 1.0, [W], [torch.ones(3)], r"the loss is a float"),
        (lambda: torch.tensor(1.0), [W], [torch.ones(3)], r"does not depend on the parameters"),
        (lambda: (torch.ones(2, requires_grad=True) ** 2).sum(), [W], [torch.ones(3)], r"does not depend on the param"),
        (lambda: (W**2).sum(), [W, torch.ones(2)], [torch.ones(3), torch.ones(2)], r"params\[1\] do not require grad"),
        (lambda: (W**2).sum(), [], [], r"params is empty"),
        (lambda: (W**2).sum(), [W], [], r"v holds 0 tensors, must hold 1"),
        (lambda: (W**2).sum(), [W], [torch.ones(4)], r"v\[0\] is torch.float32 of shape \(4,\).*\(3,\)"),
        (lambda: (W**2).sum(), [W], [torch.ones(3).double()], r"v\[0\] is torch.float64"),
    ],
)
def test_errors(engine, loss_fn, params, v, words):
    with pytest.raises(ValueError, match=words):
        hvp(loss_fn, params, v, engine=engine)


def test_unknown_engine():
    with pytest.raises(ValueError, match=r"engine is 'backward', must be one of"):
        hvp(lambda: (W**2).sum(), [W], [torch.ones(3)], engine="backward")


def test_no_grad_around_it_does_not_matter():
    with torch.no_grad():
        assert torch.equal(hvp(lambda: (W**2).sum(), [W], [torch.ones(3)])[0], torch.full((3,), 2.0))


def test_the_choice_of_attention_is_said_once():
    """The message appears once per process, so this runs in a new process."""
    program = """
import logging, torch
from qatkernels.hessian import hvp
logging.basicConfig(level=logging.INFO)
w = torch.ones(3, requires_grad=True)
for _ in range(3):
    hvp(lambda: (w**2).sum(), [w], [torch.ones(3)])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stderr.count("math backend") == 1
