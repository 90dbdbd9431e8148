"""The operator: batches, weights, dtypes, kept graphs, checkpointing, processes, scipy, and what it refuses."""

import copy
import logging
import warnings

import numpy as np
import pytest
import scipy.sparse.linalg
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from qatkernels.hessian import HessianOperator, eigs, hvp, spectrum, trace
from qatkernels.hessian.checkpoint import blocks, checkpointed
from qatkernels.nn import QuantConfig, quantize_model, quantized_weights
from qatkernels.ops import cross_entropy
from qatkernels.trainer.demo_model import ModelConfig, Transformer


def loss_fn(model, batch):
    x, y = batch
    return F.cross_entropy(model(x).float() if model(x).dtype == torch.bfloat16 else model(x), y)


def make(dtype=torch.float64, batches=3, dropout=0.0):
    generator = torch.Generator().manual_seed(1)
    torch.manual_seed(0)
    layers = nn.Linear(6, 8), nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, 4)
    model = quantize_model(nn.Sequential(*layers), QuantConfig(2)).to(dtype)
    data = [
        (
            torch.randn(4 + i, 6, generator=generator).to(dtype),
            torch.randint(4, (4 + i,), generator=generator),
        )
        for i in range(batches)
    ]
    return model, data


def flat(tensors):
    return torch.cat([t.reshape(-1) for t in tensors])


def by_hand(model, data, v, weights=None):
    params = quantized_weights(model)
    parts = v.split([p.numel() for p in params])
    parts = [part.view(p.shape) for part, p in zip(parts, params, strict=True)]
    weights = weights or [1.0] * len(data)
    total = sum(w * flat(hvp(lambda b=b: loss_fn(model, b), params, parts)) for w, b in zip(weights, data, strict=True))
    return total / sum(weights)


@pytest.mark.parametrize("options", [{}, {"retain": True}, {"retain": False}, {"engine": "forward"}], ids=str)
@pytest.mark.parametrize("weights", [None, [4, 5, 6]])
def test_mean_over_batches(options, weights):
    model, data = make()
    op = HessianOperator(model, loss_fn, iter(data), weights=weights, **options)
    assert op.shape == (op.n, op.n) == (80, 80)
    vectors = torch.randn(80, 3, dtype=torch.float64)
    for _ in range(2):
        wanted = torch.stack([by_hand(model, data, v, weights) for v in vectors.T], 1)
        torch.testing.assert_close(op.matmat(vectors), wanted, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(op.matvec(vectors[:, 0]), wanted[:, 0], rtol=1e-12, atol=1e-14)
    assert op.count == 8
    mean = sum(w * loss_fn(model, b) for w, b in zip(weights or [1, 1, 1], data, strict=True)) / sum(weights or [3])
    wanted = flat(torch.autograd.grad(mean, quantized_weights(model)))
    torch.testing.assert_close(op.gradient(), wanted, rtol=1e-12, atol=1e-14)


def test_params_may_be_chosen():
    model, data = make()
    biases = [m.bias for m in model if isinstance(m, nn.Linear)]
    op = HessianOperator(model, loss_fn, data[:1], params=biases)
    v = torch.randn(12, dtype=torch.float64)
    wanted = flat(hvp(lambda: loss_fn(model, data[0]), biases, [v[:8], v[8:]]))
    torch.testing.assert_close(op.matvec(v), wanted)


def test_a_changed_model_is_seen():
    model, data = make()
    op = HessianOperator(model, loss_fn, data[:1])
    v = torch.randn(op.n, dtype=torch.float64)
    before = op.matvec(v)
    with torch.no_grad():
        model[0].weight.mul_(3)
    after = op.matvec(v)
    assert not torch.allclose(before, after)
    torch.testing.assert_close(after, by_hand(model, data[:1], v))
    with torch.no_grad():
        model[3].scale.mul_(0.5)  # what is not differentiated counts, too
    torch.testing.assert_close(op.matvec(v), by_hand(model, data[:1], v))
    model[0].weight.data.mul_(0.3)  # unseen by design
    op.refresh()
    torch.testing.assert_close(op.matvec(v), by_hand(model, data[:1], v))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_sixteen_bit_models_and_wider_products(dtype):
    """A bfloat16 model has the products of the float32 model with its weights; float64 agrees with those."""
    model, data = make(dtype)
    wide = copy.deepcopy(model).float()
    v = torch.randn(80)
    op = HessianOperator(model, loss_fn, data)
    assert op.dtype == torch.float32
    exact = HessianOperator(wide, loss_fn, [(x.float(), y) for x, y in data])
    assert torch.equal(op.matvec(v), exact.matvec(v))
    double = HessianOperator(model, loss_fn, data, dtype=torch.float64).matvec(v.double())
    torch.testing.assert_close(op.matvec(v).double(), double, rtol=1e-4, atol=1e-6)
    assert model[0].weight.dtype == dtype
    with torch.no_grad():
        model[0].weight.mul_(2)
        wide[0].weight.mul_(2)
    assert torch.equal(op.matvec(v), exact.matvec(v))


def transformer():
    model = Transformer(ModelConfig(width=16, depth=2, heads=2, context=8, vocab=11)).double()
    model = quantize_model(model, QuantConfig(2), exclude=("lm_head",))
    tokens = torch.randint(11, (2, 9))
    return model, tokens, lambda m, t: cross_entropy(m(t[:, :-1]), t[:, 1:])


@pytest.mark.parametrize("which", [True, "all but the head"])
def test_checkpointing_changes_nothing(which):
    model, tokens, loss = transformer()
    modules = which if which is True else [*model.blocks, model.norm]
    plain = HessianOperator(model, loss, [tokens])
    saving = HessianOperator(model, loss, [tokens], checkpoint=modules)
    v = torch.randn(plain.n, 2, dtype=torch.float64)
    torch.testing.assert_close(saving.gradient(), plain.gradient(), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(saving.matmat(v), plain.matmat(v), rtol=1e-11, atol=1e-14)
    torch.testing.assert_close(saving.matmat(v), plain.matmat(v), rtol=1e-11, atol=1e-14)
    assert all("forward" not in m.__dict__ for m in model.modules())


def test_checkpointing_keeps_less():
    """Counts the bytes that a retained gradient graph keeps alive."""
    model, tokens, loss = transformer()

    held = {}

    class Saved:
        def __init__(self, t):
            self.t = t
            held[id(self)] = (t.data_ptr(), t.untyped_storage().nbytes())

        def __del__(self):
            del held[id(self)]

    def kept(**options):
        op = HessianOperator(model, loss, [tokens], **options)
        with torch.autograd.graph.saved_tensors_hooks(Saved, lambda saved: saved.t):
            op.gradient()
        return sum(dict(held.values()).values())

    # Two blocks; the head, the norm and the loss are outside.
    assert kept(checkpoint=True) < 0.4 * kept()


def test_blocks_are_the_outermost_elements():
    model, _, _ = transformer()
    assert blocks(model) == list(model.blocks)
    with pytest.raises(ValueError, match="checkpoint is True, but the model has no ModuleList"):
        blocks(nn.Linear(2, 2))


def test_checkpointed_structures_come_back():
    """Keyword arguments, several outputs, inputs without gradients, autocast."""

    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.randn(3, dtype=torch.float64))

        def forward(self, x, *, scale, index):
            return {"a": (x * self.w * scale).sin(), "b": [x[index] ** 3, index + 1]}

    module = Odd()
    x = torch.randn(3, dtype=torch.float64, requires_grad=True)
    index = torch.tensor([2, 0])

    def loss():
        out = module(x, scale=2.0, index=index)
        assert torch.equal(out["b"][1], index + 1)
        return (out["a"] ** 2).sum() + out["b"][0].sum()

    v = [torch.randn(3, dtype=torch.float64), torch.randn(3, dtype=torch.float64)]
    wanted = hvp(loss, [x, module.w], v)
    with checkpointed([module]):
        found = hvp(loss, [x, module.w], v)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b)


def test_numpy_and_scipy():
    model, data = make()
    op = HessianOperator(model, loss_fn, data)
    dense = op.matmat(torch.eye(op.n, dtype=torch.float64))
    torch.testing.assert_close(dense, dense.T, rtol=1e-10, atol=1e-14)
    linear = op.to_scipy()
    v = np.random.default_rng(0).standard_normal((op.n, 2))
    np.testing.assert_allclose(linear @ v, dense.numpy() @ v, rtol=1e-10, atol=1e-13)
    np.testing.assert_allclose(linear.T @ v[:, 0], dense.numpy() @ v[:, 0], rtol=1e-10, atol=1e-13)
    largest = scipy.sparse.linalg.eigsh(linear, 1, which="LA", return_eigenvectors=False)[0]
    assert largest == pytest.approx(torch.linalg.eigvalsh(dense)[-1].item(), rel=1e-8)
    assert HessianOperator(model.float(), loss_fn, [(x.float(), y) for x, y in data]).to_scipy().dtype == np.float32


@pytest.mark.parametrize("options", [{}, {"engine": "forward"}], ids=str)
def test_spectrum_eigenpairs_and_trace_of_a_model(options):
    """All of it on the Hessian itself: its eigenvalues, the zeros of clamped weights among them."""
    model, data = make()
    with torch.no_grad():
        model[0].weight.mul_(2)  # beyond the clamp
    op = HessianOperator(model, loss_fn, data, **options)
    dense = op.matmat(torch.eye(op.n, dtype=torch.float64))
    exact = torch.linalg.eigvalsh(0.5 * (dense + dense.T))
    zeros = (dense == 0).all(1).sum().item()
    assert 0 < zeros < op.n
    found = spectrum(op, 3, op.n, near_zero=1e-9)
    size = exact.abs().max().item()
    assert exact[0] < -1e-3 * size
    assert found.lambda_min == pytest.approx(exact[0].item(), abs=1e-6 * size)
    assert found.lambda_max == pytest.approx(exact[-1].item(), abs=1e-6 * size)
    assert abs(found.trace.value - exact.sum().item()) < 4 * found.trace.error
    assert abs(found.near_zero_mass.value - (exact.abs() < 1e-9).sum().item() / op.n) < 4 * found.near_zero_mass.error
    top = eigs(op, 2)
    torch.testing.assert_close(top.values, exact[[0, 1, -2, -1]], rtol=0, atol=1e-8 * size)
    estimate = trace(op, 40, "hutch++")
    assert abs(estimate.value - exact.sum().item()) <= 3 * estimate.error


@pytest.mark.parametrize("engine", ["reverse", "forward"])
def test_losses_that_change_warn(engine):
    """Random numbers from outside torch, and state that is not in a buffer, warn.

    Dropout and noise are replayed, so they do not.
    """
    model, data = make(dropout=0.5)
    for layer in (model[0], model[3]):
        layer.quantizer.set_noise(0.01, 0.0)
    v = torch.ones(80, dtype=torch.float64)
    random = np.random.default_rng(0)
    with pytest.warns(UserWarning, match="the loss changes from call to call.*although buffers"):
        HessianOperator(model, lambda m, b: random.random() * loss_fn(m, b), data[:1], engine=engine).matvec(v)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        HessianOperator(model, loss_fn, data[:1], engine=engine).matvec(v)


MODEL, DATA = make()


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: HessianOperator(nn.Linear(2, 2), loss_fn, DATA), "no quantized layer.*give params"),
        (lambda: HessianOperator(MODEL, loss_fn, []), "batches is empty"),
        (lambda: HessianOperator(MODEL, loss_fn, DATA, params=[]), "params must be one or more"),
        (lambda: HessianOperator(MODEL, loss_fn, DATA, params=[torch.ones(1)]), r"params\[0\] are not parameters"),
        (lambda: HessianOperator(MODEL, loss_fn, DATA, params=[MODEL[0].weight] * 2), "twice"),
        (lambda: HessianOperator(MODEL, loss_fn, DATA, engine="x"), "engine is 'x'"),
        (lambda: HessianOperator(MODEL, loss_fn, DATA, engine="forward", retain=True), "retain and checkpoint are for"),
        (lambda: HessianOperator(MODEL, loss_fn, DATA, dtype=torch.bfloat16), "dtype is torch.bfloat16"),
        (lambda: HessianOperator(MODEL, loss_fn, DATA, weights=[1, 2]), "weights is .* for each of 3 batches"),
        (lambda: HessianOperator(MODEL, loss_fn, DATA, weights=[0, 0, 0]), "weights are all 0"),
        (lambda: HessianOperator(MODEL, loss_fn, DATA, weights=[1, -1, 1]), "finite weight >= 0"),
        (lambda: HessianOperator(MODEL, loss_fn, DATA, distributed=True), "not initialised"),
        (lambda: HessianOperator(MODEL, loss_fn, DATA).matvec(torch.ones(80)), "the vector is torch.float32"),
        (lambda: HessianOperator(MODEL, loss_fn, DATA).matvec(torch.ones(79).double()), r"\(79,\).*\(80,\)"),
        (
            lambda: HessianOperator(MODEL, lambda m, b: m(b[0]), DATA).matvec(torch.ones(80).double()),
            r"the loss is torch.float64 of shape \(4, 4\)",
        ),
        (
            lambda: HessianOperator(MODEL, lambda m, b: b[0].sum(), DATA).gradient(),
            "the loss does not depend on the parameters",
        ),
    ],
)
def test_errors(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_frozen_weights_are_named():
    model, data = make()
    model[0].weight.requires_grad_(False)
    with pytest.raises(ValueError, match=r"params\[0\] do not require grad"):
        HessianOperator(model, loss_fn, data).matvec(torch.ones(80).double())


def products_of_a_part(rank):
    model, data = make()
    own = [(data[0], 4.0), (data[2], 6.0)] if rank == 0 else [(data[1], 5.0)]
    wrapped = DistributedDataParallel(model)
    batches, weights = zip(*own, strict=True)
    op = HessianOperator(wrapped, loss_fn, batches, weights=weights)
    v = torch.randn(80, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    alone = HessianOperator(model, loss_fn, batches, weights=weights, distributed=False)
    return op.matmat(v).numpy(), op.gradient().numpy(), alone.matvec(v[:, 0]).numpy()


def test_two_processes_average(pair):
    found = pair.run(products_of_a_part)
    model, data = make()
    op = HessianOperator(model, loss_fn, data, weights=[4, 5, 6])
    v = torch.randn(80, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    for products, gradient, alone in found:
        np.testing.assert_allclose(products, op.matmat(v).numpy(), rtol=1e-11, atol=1e-14)
        np.testing.assert_allclose(gradient, op.gradient().numpy(), rtol=1e-11, atol=1e-14)
        assert not np.allclose(alone, products[:, 0])


def test_messages_of_memory(caplog):
    from qatkernels.hessian import spectrum

    model, data = make()
    op = HessianOperator(model, loss_fn, data)
    with caplog.at_level(logging.INFO):
        found = spectrum(op, 2, 5)
    assert found.settings["basis_bytes"] == 5 * 80 * 8
    assert "Krylov basis takes" in caplog.text
