"""The tools leave a model in training mode unchanged, and all their products are with the Hessian of the same
function.
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.utils.checkpoint import checkpoint

from qatkernels.hessian import HessianOperator, eigs, gradient_norm_ratio, hvp, sharpness, spectrum, trace
from qatkernels.nn import QuantConfig, quantize_model, quantized_modules, quantized_weights

ENGINES = ({}, {"retain": True}, {"engine": "forward"}, {"checkpoint": True}, {"checkpoint": True, "retain": True})


class Averaged(nn.Module):
    """Divides by a running size that every forward writes to and autograd saves, as no module of torch does."""

    def __init__(self):
        super().__init__()
        self.register_buffer("size", torch.ones((), dtype=torch.float64))

    def forward(self, x):
        if self.training:
            self.size.mul_(0.5).add_(x.detach().abs().mean(), alpha=0.5)
        return x / self.size


class Replaced(nn.Module):
    """Replaces its buffer by another tensor in every forward."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros((), dtype=torch.float64))

    def forward(self, x):
        self.calls = self.calls + 1
        return x * (1 + 0.1 * self.calls)


def make(dropout=0.4, noise=0.01):
    torch.manual_seed(0)
    spectral = parametrizations.spectral_norm(nn.Linear(8, 8).double())
    model = nn.Sequential(
        nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(dropout), spectral, Averaged(), Replaced(),
        nn.Linear(8, 4),
    ).double()  # fmt: skip
    model = quantize_model(model, QuantConfig(2), exclude="4")
    for layer in quantized_modules(model).values():
        layer.quantizer.set_noise(noise, noise)
    data = [(torch.randn(5 + i, 6).double(), torch.randint(4, (5 + i,))) for i in range(2)]
    for p in model.parameters():
        p.grad = torch.full_like(p, 7.0)
    model[2].eval()
    model[7].bias.requires_grad_(False)
    return model, data


def loss_fn(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


class Remembered:
    """A snapshot of a model and of torch's generator, to compare with later."""

    def __init__(self, model):
        self.model, self.values = model, copy.deepcopy(model.state_dict())
        self.known, self.random = self.identities(), torch.get_rng_state()
        self.grads = [p.grad.clone() for p in model.parameters()]

    def identities(self):
        parameters = [(id(p), p.requires_grad, id(p.grad)) for p in self.model.parameters()]
        modes = [(m.training, list(m._buffers), m.__dict__.get("forward")) for m in self.model.modules()]
        return parameters, [id(b) for b in self.model.buffers()], modes

    def check(self):
        assert self.identities() == self.known
        for name, value in self.model.state_dict().items():
            assert torch.equal(value, self.values[name]), name
        for p, grad in zip(self.model.parameters(), self.grads, strict=True):
            assert torch.equal(p.grad, grad)
        assert torch.equal(torch.get_rng_state(), self.random)


def parts_of(params, flat):
    return [part.view_as(p) for part, p in zip(flat.split([p.numel() for p in params]), params, strict=True)]


TOOLS = {
    "matvec": lambda op: op.matvec(torch.ones(op.n).double()),
    "gradient": lambda op: op.gradient(),
    "eigs": lambda op: eigs(op, 1),
    "spectrum": lambda op: spectrum(op, 2, 4),
    "trace": lambda op: trace(op, 6, "hutch++"),
}


@pytest.mark.parametrize("options", ENGINES, ids=str)
@pytest.mark.parametrize("tool", TOOLS)
def test_an_operator_leaves_no_trace(tool, options):
    model, data = make()
    remembered = Remembered(model)
    op = HessianOperator(model, loss_fn, data, **options)
    TOOLS[tool](op)
    remembered.check()


@pytest.mark.parametrize("norm", ["l2", "asam"])
def test_closures_leave_no_trace(norm):
    model, data = make()
    remembered, weights = Remembered(model), quantized_weights(model)

    def loss():
        return loss_fn(model, data[0])

    for target in ("latent", "quantized"):
        sharpness(model, loss, target=target, norm=norm)
        remembered.check()
    for engine in ("reverse", "forward"):
        hvp(loss, weights, [torch.ones_like(w) for w in weights], engine=engine, model=model)
        remembered.check()
    gradient_norm_ratio(loss, weights, model=model)
    remembered.check()
    hvp(loss, weights, [torch.ones_like(w) for w in weights])  # the model is not known
    assert torch.equal(torch.get_rng_state(), remembered.random)


def failing_at(call):
    """A loss whose call of this number fails, after it has changed modes and what requires grad."""
    calls = []

    def failing(model, batch):
        calls.append(1)
        model.train()
        model[0].bias.requires_grad_(False)
        loss = loss_fn(model, batch)
        if len(calls) == call:
            raise KeyError("planned")
        return loss

    return failing


@pytest.mark.parametrize("call", [1, 2])
@pytest.mark.parametrize("options", [*ENGINES, "latent", "quantized"], ids=str)
def test_an_error_leaves_no_trace(options, call):
    model, data = make()
    remembered, loss = Remembered(model), failing_at(call)

    def run():
        if isinstance(options, str):
            sharpness(model, lambda: loss(model, data[0]), target=options)
        else:
            HessianOperator(model, loss, data, **options).matvec(torch.ones(80).double())

    with pytest.raises(KeyError):
        run()
    remembered.check()


def test_the_sixteen_bit_model_is_left_alone():
    model, data = make()
    model[4] = nn.Linear(8, 8)
    for p in model.parameters():
        p.grad = None
    model = model.bfloat16()
    for p in model.parameters():
        p.grad = torch.full_like(p, 7.0)
    remembered = Remembered(model)
    op = HessianOperator(model, loss_fn, [(x.bfloat16(), y) for x, y in data])
    first = op.matvec(torch.ones(op.n))
    remembered.check()
    assert torch.equal(op.matvec(torch.ones(op.n)), first)


def by_hand(model, data):
    """The dense Hessian of the mean loss over the batches, one after the other, by plain double backward."""
    total, random = 0.0, torch.get_rng_state()
    for batch in data:
        mine = copy.deepcopy(model)
        params = quantized_weights(mine)
        grads = torch.autograd.grad(loss_fn(mine, batch), params, create_graph=True)
        flat = torch.cat([g.reshape(-1) for g in grads])
        rows = [torch.autograd.grad(g, params, retain_graph=True) for g in flat]
        total = total + torch.stack([torch.cat([h.reshape(-1) for h in row]) for row in rows]) / len(data)
    torch.set_rng_state(random)
    return total


@pytest.mark.parametrize("options", ENGINES, ids=str)
def test_products_are_of_one_function_in_training_mode(options):
    """Batch statistics, dropout, noise, and buffers that the outputs depend on."""
    model, data = make()
    wanted = by_hand(model, data)
    op = HessianOperator(model, loss_fn, data, **options)
    torch.manual_seed(99)  # the draw is that of the moment when the operator was made
    dense = torch.stack([op.matvec(e) for e in torch.eye(80).double()])
    torch.testing.assert_close(dense, wanted, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(dense, dense.T, rtol=1e-9, atol=1e-12)
    assert wanted.abs().max() > 1e-3


def test_products_see_batch_statistics_dropout_and_noise():
    """Each of them changes the Hessian, so the test above covers them."""
    model, data = make()
    plain = by_hand(copy.deepcopy(model).eval(), data)
    trained = by_hand(model, data)
    other = by_hand(make(dropout=0.0)[0], data)
    quiet = by_hand(make(noise=0.0)[0], data)
    for one, two in ((plain, trained), (trained, other), (trained, quiet)):
        assert (one - two).abs().max() > 1e-3


def test_a_kept_graph_sees_the_mode_and_the_noise():
    model, data = make()
    op = HessianOperator(model, loss_fn, data, retain=True)
    v = torch.ones(80).double()
    trained = op.matvec(v)
    model.eval()
    still = op.matvec(v)
    torch.testing.assert_close(still, HessianOperator(model, loss_fn, data).matvec(v), rtol=1e-9, atol=1e-12)
    assert not torch.allclose(still, trained)
    model.train()
    model[2].eval()
    torch.testing.assert_close(op.matvec(v), trained, rtol=1e-9, atol=1e-12)
    model[0].quantizer.set_noise(0.0, model[0].quantizer.scale_noise_std)
    assert not torch.allclose(op.matvec(v), trained)


def test_sharpness_in_training_mode():
    """Both losses are of the same dropout, noise and buffers; against plain gradients."""
    model, data = make()
    random, twin = torch.get_rng_state(), copy.deepcopy(model)
    found = sharpness(model, lambda: loss_fn(model, data[0]), 0.3)
    torch.set_rng_state(random)
    loss = loss_fn(twin, data[0])
    weights = quantized_weights(twin)
    grads = torch.autograd.grad(loss, weights)
    norm = sum(g.square().sum() for g in grads).sqrt()
    moved = copy.deepcopy(model)
    with torch.no_grad():
        for w, g in zip(quantized_weights(moved), grads, strict=True):
            w.add_(0.3 * g / norm)
    torch.set_rng_state(random)
    assert found.loss == pytest.approx(loss.item(), rel=1e-12)
    assert found.value == pytest.approx(loss_fn(moved, data[0]).item() - loss.item(), rel=1e-9)
    assert sharpness(model, lambda: loss_fn(model, data[0]), 0.0).value == 0


def test_forward_mode_inside_the_loss_sees_the_perturbation():
    """A loss with a directional derivative in it: its layers take their weights by way of another kernel."""
    torch.manual_seed(0)
    model = quantize_model(nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)).double(), QuantConfig(2))
    plain = nn.Sequential(model[0].to_linear(), nn.Tanh(), model[2].to_linear())
    x, along = torch.randn(5, 6).double(), torch.randn(5, 6).double()

    def loss_of(module):
        def loss():
            value, slope = torch.func.jvp(module, (x,), (along,))
            return value.square().mean() + slope.square().mean()

        return loss

    weights = [plain[0].weight, plain[2].weight]
    wanted = sharpness(plain, loss_of(plain), 0.3, params=weights)
    found = sharpness(model, loss_of(model), 0.3, target="quantized")
    assert found == pytest.approx(wanted, rel=1e-6)
    assert found.value > 0


@pytest.mark.parametrize("engine", ["reverse", "forward"])
def test_casts_that_autocast_keeps_are_not_those_of_other_weights(engine):
    model, x = nn.Linear(6, 3), torch.randn(5, 6)

    def loss():
        return model(x).float().exp().sum()

    with torch.autocast("cpu", torch.bfloat16):
        inside = sharpness(model, loss, 1.0).value
        ones = [torch.ones_like(p) for p in model.parameters()]
        products = [hvp(loss, list(model.parameters()), ones, engine=engine, model=model) for _ in range(2)]
    assert inside == pytest.approx(sharpness(model, loss, 1.0).value, rel=0.1)
    exact = hvp(loss, list(model.parameters()), ones)
    for found in products:
        for f, e in zip(found, exact, strict=True):
            torch.testing.assert_close(f, e, rtol=0.1, atol=0.1)


def test_scales_that_a_forward_would_set_are_refused():
    config = QuantConfig(4, act_bits=8, act_scheme="lsq")
    model, x = quantize_model(nn.Sequential(nn.Linear(6, 3)), config), torch.randn(5, 6)

    def loss(m=None, b=None):
        return model(x).square().mean()

    for call in (lambda: HessianOperator(model, loss, [x]), lambda: sharpness(model, loss)):
        with pytest.raises(ValueError, match=r"1 activation scales have not been initialized \(0.act\).*calibrate"):
            call()
    assert not model[0].act.initialized


class Reentrant(nn.Module):
    """Layers of which all or one run in torch's reentrant checkpoint; its weight may be used outside, too."""

    def __init__(self, which):
        super().__init__()
        torch.manual_seed(0)
        layers = [nn.Linear(6, 6) for _ in range(3)]
        if which == "shared":
            layers[2].weight = layers[1].weight
        self.layers = quantize_model(nn.Sequential(*layers), QuantConfig(2))
        self.which = which

    def forward(self, x):
        if self.which == "all":
            return checkpoint(self.layers, x, use_reentrant=True)
        return self.layers[2](checkpoint(self.layers[1], self.layers[0](x).tanh(), use_reentrant=True).tanh())


@pytest.mark.parametrize("which", ["all", "one", "shared"])
def test_reentrant_checkpoints_are_named(which):
    model, x = Reentrant(which), torch.randn(4, 6, requires_grad=True)
    weights = quantized_weights(model)

    def loss(m=None, b=None):
        return model(x).square().mean()

    v = [torch.ones_like(w) for w in weights]
    for call in (
        lambda: HessianOperator(model, loss, [x]).matvec(torch.cat([t.reshape(-1) for t in v])),
        lambda: HessianOperator(model, loss, [x], engine="forward").matvec(torch.cat([t.reshape(-1) for t in v])),
        lambda: HessianOperator(model, loss, [x], retain=False).gradient(),
        lambda: hvp(loss, weights, v),
        lambda: sharpness(model, loss),
        lambda: gradient_norm_ratio(loss, weights),
    ):
        with pytest.raises(ValueError, match=r"use_reentrant=True.*use_reentrant=False"):
            call()


def test_a_reentrant_checkpoint_without_any_graph_is_hinted_at():
    op = HessianOperator(Reentrant("all"), lambda m, b: m(b).square().mean(), [torch.randn(4, 6)])
    with (
        pytest.warns(UserWarning, match="None of the inputs"),
        pytest.raises(ValueError, match="use_reentrant=True: that"),
    ):
        op.gradient()


def test_checkpoints_that_are_not_reentrant_work():
    model, data = make()

    def saving(m, batch):
        return F.cross_entropy(checkpoint(m, batch[0], use_reentrant=False), batch[1])

    wanted = by_hand(model, data)
    remembered = Remembered(model)
    op = HessianOperator(model, saving, data, retain=True)
    torch.testing.assert_close(op.matmat(torch.eye(80).double()), wanted, rtol=1e-9, atol=1e-12)
    remembered.check()


@pytest.mark.parametrize("how", [parametrizations.weight_norm, lambda m: prune.l1_unstructured(m, "weight", 0.5)])
def test_weights_that_are_computed(how):
    """Computed weights have no Hessian; the parameters that they are computed from do."""
    torch.manual_seed(0)
    model = quantize_model(nn.Sequential(nn.Linear(6, 4)).double(), QuantConfig(4))
    how(model[0])
    x, y = torch.randn(5, 6).double(), torch.randint(4, (5,))
    for call in (
        lambda: HessianOperator(model, loss_fn, [(x, y)]),
        lambda: sharpness(model, lambda: loss_fn(model, (x, y))),
        lambda: sharpness(model, lambda: loss_fn(model, (x, y)), target="quantized"),
    ):
        with pytest.raises(ValueError, match=r"^0 is (pruned|parametrized) by .* weight anew"):
            call()
    (given,) = (p for name, p in model.named_parameters() if name.endswith(("weight_orig", "original1")))
    if how is parametrizations.weight_norm:
        with pytest.raises(ValueError, match="weight_norm, whose second derivative torch computes wrongly"):
            HessianOperator(model, loss_fn, [(x, y)], params=[given]).matvec(torch.ones(24).double())
        given = model[0].parametrizations.weight.original0
    op = HessianOperator(model, loss_fn, [(x, y)], params=[given])
    found = op.matmat(torch.eye(op.n).double())
    (g,) = torch.autograd.grad(loss_fn(model, (x, y)), given, create_graph=True)
    rows = [torch.autograd.grad(one, given, retain_graph=True)[0].reshape(-1) for one in g.reshape(-1)]
    torch.testing.assert_close(found, torch.stack(rows), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found, found.T, rtol=1e-9, atol=1e-12)
    before = given.detach().clone()
    assert sharpness(model, lambda: loss_fn(model, (x, y)), 1.0, params=[given]).value != 0
    assert torch.equal(given, before)
