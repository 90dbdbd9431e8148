"""SQuAT in a plain training loop, compared with its formulas."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from qatkernels import QuantConfig, fake_quantize, quantize_model, quantized_modules
from qatkernels.methods import SQuAT, WinQ
from qatkernels.testing.compare import assert_same_bits


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def make_model(**kwargs):
    model = nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.LayerNorm(24), nn.Linear(24, 8))
    return quantize_model(model, QuantConfig(**{"bits": 4, **kwargs}))


def closure_of(model, x, optimizer=None, scaler=None):
    target = torch.linspace(-1, 1, 8)

    def closure():
        if optimizer is not None:
            optimizer.zero_grad()
        loss = (model(x) - target).square().mean()
        (loss if scaler is None else scaler.scale(loss)).backward()
        return loss

    return closure


def split(model):
    """Return the names of scales and of all other parameters."""
    names = [name for name, _ in model.named_parameters()]
    scales = [n for n in names if n.endswith(("scale", "zero_point"))]
    return scales, [n for n in names if n not in scales]


def grads_of(model):
    return {name: p.grad for name, p in model.named_parameters()}


def written_out(model, x, target, norm, rho, eta=0.01):
    """Return (gradients of the first pass, of the second, losses, norm of the perturbation), without the library."""
    first_model, second = copy.deepcopy(model), copy.deepcopy(model)
    loss = closure_of(first_model, x)()
    layers = quantized_modules(first_model)
    at = {n: (m.weight if target == "latent" else m.quantized_weight()).detach() for n, m in layers.items()}
    size = {n: 1.0 if norm == "l2" else at[n].abs() + eta for n in layers}
    total = sum((size[n] * m.weight.grad).square().sum() for n, m in layers.items()).sqrt()
    steps = {n: rho * size[n] ** 2 * m.weight.grad / (total + 1e-12) for n, m in layers.items()}

    def forward(module, x):
        w = module.weight + steps[module.name] if target == "latent" else module.weight
        y = fake_quantize(w, module.scale, module.grid, grad_scale=module.quantizer.grad_scale)
        return F.linear(x, y + (steps[module.name] if target == "quantized" else 0), module.bias)

    for name, module in quantized_modules(second).items():
        module.name = name
        module.forward = forward.__get__(module)
    perturbed = closure_of(second, x)()
    norm = sum(s.square().sum() for s in steps.values()) ** 0.5
    return grads_of(first_model), grads_of(second), (loss, perturbed), norm


@pytest.mark.parametrize("norm", ["l2", "asam"])
@pytest.mark.parametrize("target", ["quantized", "latent"])
def test_is_the_formula(target, norm):
    model, x = make_model(), torch.randn(32, 16)
    first, second, (loss, perturbed), size = written_out(model, x, target, norm, 0.3)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    squat = SQuAT(model, rho=0.3, target=target, norm=norm)
    assert_same_bits(squat.gradient(closure_of(model, x)).detach(), loss.detach())
    scales, others = split(model)
    assert len(scales) == 2
    for name in scales:
        torch.testing.assert_close(grads_of(model)[name], first[name], msg=name)
    for name in others:
        torch.testing.assert_close(grads_of(model)[name], second[name], msg=name)
        assert not torch.equal(first[name], second[name])
    for name, p in model.named_parameters():
        assert_same_bits(p.detach(), before[name], name)
    log = squat.log()
    assert log["squat/sharpness"] == pytest.approx((perturbed - loss).item(), rel=1e-3)
    assert log["squat/sharpness"] > 0
    assert log["squat/perturbation_norm"] == pytest.approx(size.item(), rel=1e-4)
    if norm == "l2":
        assert log["squat/perturbation_norm"] == pytest.approx(0.3, rel=1e-4)
    assert squat.log()["squat/flips"] == 0


@pytest.mark.parametrize("norm", ["l2", "asam"])
@pytest.mark.parametrize("target", ["quantized", "latent"])
def test_the_scale_of_the_loss_does_not_matter(target, norm):
    """Not even where the norm of the gradient is tiny; without a gradient nothing is perturbed."""
    model, x, grads = make_model().double(), torch.randn(8, 16).double(), []
    for scale in (1.0, 2.0**16, 2.0**-60, 0.0):
        model.zero_grad()
        squat = SQuAT(model, rho=0.3, target=target, norm=norm)
        squat.gradient(lambda scale=scale: (scale * (model(x) - 1).square().mean()).backward())
        grads.append({name: g / (scale or 1.0) for name, g in grads_of(model).items()})
        assert squat.log()["squat/perturbation_norm"] > 0 or scale == 0
    for other in grads[1:3]:
        for name in split(model)[1]:
            torch.testing.assert_close(other[name], grads[0][name], rtol=1e-6, atol=1e-12, msg=name)
    assert all(not g.any() for g in grads[3].values())


@pytest.mark.parametrize("target", ["quantized", "latent"])
def test_step_moves_everything(target):
    model, x = make_model(), torch.randn(32, 16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    squat = SQuAT(model, optimizer, target=target)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    losses = [squat.step(closure_of(model, x, optimizer)).item() for _ in range(60)]
    assert losses[-1] < 0.7 * losses[0]
    assert all(not torch.equal(before[name], value) for name, value in model.named_parameters())
    assert all(m.quantizer.added is None for m in quantized_modules(model).values())


class TestAlternation:
    def moved(self, steps, **kwargs):
        """Return for each step which parameters moved, and how often the closure ran."""
        model, x = make_model(), torch.randn(8, 16)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
        squat, result = SQuAT(model, optimizer, **kwargs), []
        scales, others = split(model)
        for _ in range(steps):
            before = {n: p.detach().clone() for n, p in model.named_parameters()}
            calls = []
            inner = closure_of(model, x, optimizer)
            squat.step(lambda inner=inner, calls=calls: calls.append(1) or inner())
            now = dict(model.named_parameters())
            kinds = [{not torch.equal(before[n], now[n]) for n in names} for names in (scales, others)]
            assert all(len(kind) == 1 for kind in kinds)
            result.append((*(kind.pop() for kind in kinds), len(calls)))
        return result

    def test_same_minibatch(self):
        assert self.moved(3) == [(True, True, 2)] * 3
        assert self.moved(4, scale_every=2) == [(False, True, 2), (True, True, 2)] * 2

    def test_next_minibatch(self):
        assert self.moved(4, minibatch="next") == [(False, True, 2), (True, False, 1)] * 2
        expected = [(False, True, 2), (False, True, 2), (True, False, 1)]
        assert self.moved(6, minibatch="next", scale_every=2) == expected * 2

    def test_is_resumed(self):
        model = make_model()
        squat = SQuAT(model, torch.optim.SGD(model.parameters()), minibatch="next")
        other = SQuAT(make_model(), minibatch="next")
        squat.step(closure_of(squat.model, torch.randn(4, 16), squat.optimizer))
        other.load_state_dict(squat.state_dict())
        other.gradient(closure_of(other.model, torch.randn(4, 16)))
        assert other.model[0].weight.grad is None
        assert other.model[0].scale.grad is not None

    def test_scales_of_activations_are_scales(self):
        model, x = make_model(act_bits=4, act_scheme="lsq"), torch.randn(8, 16)
        model(x)
        squat = SQuAT(model, minibatch="next")
        for scales_move in (False, True):
            squat.gradient(closure_of(model, x))
            squat.after_step()
            assert (model[0].act.scale.grad is not None) == scales_move
            assert (model[0].scale.grad is not None) == scales_move


class TestLoops:
    def test_micro_batches_in_the_closure(self):
        model, x = make_model(), torch.randn(8, 16)
        whole = SQuAT(model, rho=0.2)
        whole.gradient(closure_of(model, x))
        expected = grads_of(model)

        def closure():
            model.zero_grad()
            return sum(_scaled(model, part, 0.5) for part in x.split(4))

        SQuAT(model, rho=0.2).gradient(closure)
        for name, p in model.named_parameters():
            torch.testing.assert_close(p.grad, expected[name], msg=name)

    def test_the_sharpness_of_micro_batches_is_that_of_the_step(self):
        model, x = make_model(), torch.randn(8, 16)
        squat = SQuAT(model, rho=0.2)
        for step in range(2):
            expected = 0.0
            for part in x.split(4):
                one = SQuAT(model, rho=0.2)
                one.gradient(closure_of(model, part))
                expected += one.log()["squat/sharpness"]
            model.zero_grad()
            for part in x.split(4):
                squat.gradient(closure_of(model, part), accumulate=True)
            squat.after_step()
            assert squat.log()["squat/sharpness"] == pytest.approx(expected, rel=1e-5), step

    def test_accumulates_over_calls(self):
        model, x = make_model(), torch.randn(8, 16)
        expected = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
        for part in x.split(4):
            SQuAT(model).gradient(closure_of(model, part))
            for name, grad in grads_of(model).items():
                expected[name] += grad
        model.zero_grad()
        squat = SQuAT(model)
        for part in x.split(4):
            squat.gradient(closure_of(model, part), accumulate=True)
        for name, grad in grads_of(model).items():
            torch.testing.assert_close(grad, expected[name], msg=name)

    @pytest.mark.parametrize("settings", [{"minibatch": "next"}, {"scale_every": 2}])
    def test_micro_batches_of_a_step_serve_one_objective(self, settings):
        """Two calls for each step move what two micro-batches in one closure move."""
        model, x = make_model(), torch.randn(8, 16)
        squat, whole = SQuAT(model, **settings), SQuAT(copy.deepcopy(model), **settings)
        for _ in range(4):
            model.zero_grad()
            for part in x.split(4):
                squat.gradient(closure_of(model, part), accumulate=True)
            squat.after_step()
            whole.gradient(closure_of(whole.model, x))
            whole.after_step()
            present = [{name: g is not None for name, g in grads_of(m).items()} for m in (model, whole.model)]
            assert present[0] == present[1]
            assert not all(present[0].values()) or squat.steps % 2 == 0
        assert squat.steps == 4

    def test_an_error_keeps_what_was_accumulated(self):
        model, x = make_model(), torch.randn(8, 16)
        squat = SQuAT(model)
        winq = WinQ(model, reset_every=None, reset_weight=0.0, noise_std=0.0, samples=2)
        for method in (squat, winq):
            model.zero_grad()
            method.gradient(closure_of(model, x), accumulate=True)
            before, inner, calls = {n: g.clone() for n, g in grads_of(model).items()}, closure_of(model, x), []

            def closure(inner=inner, calls=calls):
                calls.append(inner())
                if len(calls) == 2:
                    raise KeyError("planned")

            with pytest.raises(KeyError):
                method.gradient(closure, accumulate=True)
            for name, grad in grads_of(model).items():
                assert_same_bits(grad, before[name], name)

    @pytest.mark.parametrize("norm", ["l2", "asam"])
    @pytest.mark.parametrize("target", ["quantized", "latent"])
    def test_grad_scaler(self, target, norm):
        """A power of two as scale changes no bit of the step."""
        results = []
        for enabled in (False, True):
            torch.manual_seed(0)
            model, x = make_model(), torch.randn(8, 16)
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=enabled)
            squat = SQuAT(model, optimizer, target=target, norm=norm)
            for _ in range(3):
                squat.step(closure_of(model, x, optimizer, scaler), scaler=scaler)
                scaler.update()
            results.append(model.state_dict())
        for name, value in results[0].items():
            torch.testing.assert_close(results[1][name], value, rtol=1e-5, atol=1e-7, msg=name)

    @pytest.mark.parametrize("target", ["quantized", "latent"])
    def test_an_overflow_skips_the_step_and_restores(self, target):
        model, x = make_model(), torch.full((2, 16), torch.inf)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
        before = copy.deepcopy(model.state_dict())
        SQuAT(model, optimizer, target=target).step(closure_of(model, x, optimizer, scaler), scaler=scaler)
        for name, value in model.state_dict().items():
            assert_same_bits(value, before[name], name)

    @pytest.mark.parametrize("target", ["quantized", "latent"])
    @pytest.mark.parametrize("norm", ["l2", "asam"])
    def test_autocast(self, target, norm):
        model, x = make_model(), torch.randn(8, 16)
        inner = closure_of(model, x)

        def closure():
            with torch.autocast("cpu", torch.bfloat16):
                loss = (model(x) - torch.linspace(-1, 1, 8)).square().mean()
            loss.backward()
            return loss

        SQuAT(model, rho=0.2, target=target, norm=norm).gradient(closure)
        lower = grads_of(model)
        model.zero_grad()
        SQuAT(model, rho=0.2, target=target, norm=norm).gradient(inner)
        for name, grad in grads_of(model).items():
            assert F.cosine_similarity(lower[name].flatten(), grad.flatten(), dim=0) > 0.97, name
            assert not torch.equal(lower[name], grad)

    def test_bfloat16_parameters(self):
        model, x = make_model().bfloat16(), torch.randn(8, 16, dtype=torch.bfloat16)
        before = copy.deepcopy(model.state_dict())
        for target in ("quantized", "latent"):
            SQuAT(model, target=target, norm="asam").gradient(closure_of(model, x))
        for name, value in model.state_dict().items():
            assert_same_bits(value, before[name], name)

    def test_activation_checkpointing(self):
        """A forward that runs again in the backward is perturbed again."""
        model, x = make_model(), torch.randn(8, 16)
        SQuAT(model, rho=0.3).gradient(closure_of(model, x))
        expected = grads_of(model)
        model.zero_grad()

        def closure():
            y = checkpoint(model, x, use_reentrant=False)
            loss = (y - torch.linspace(-1, 1, 8)).square().mean()
            loss.backward()
            return loss

        SQuAT(model, rho=0.3).gradient(closure)
        for name, grad in grads_of(model).items():
            assert_same_bits(grad, expected[name], name)

    def test_compiled(self):
        model, x = make_model(), torch.randn(8, 16)
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        for step in range(3):
            # One graph without a perturbation, one with: nothing that changes from step to step is compiled in.
            with torch.compiler.set_stance("fail_on_recompile" if step else "default"):
                for target in ("quantized", "latent"):
                    SQuAT(model, rho=0.3, target=target).gradient(closure_of(compiled, x))
                    actual = grads_of(model)
                    SQuAT(model, rho=0.3, target=target).gradient(closure_of(model, x))
                    for name, grad in grads_of(model).items():
                        torch.testing.assert_close(actual[name], grad, msg=f"{step} {target} {name}")

    def test_both_passes_see_the_same_dropout_and_noise(self):
        model, x = make_model(), torch.randn(8, 16)
        model = nn.Sequential(nn.Dropout(0.5), model).train()
        WinQ(model, reset_every=None, reset_weight=0.0, noise_std=0.1)
        squat = SQuAT(model, rho=0.0)
        squat.gradient(closure_of(model, x))
        once = grads_of(model)
        assert squat.log()["squat/sharpness"] == 0
        squat.gradient(closure_of(model, x))
        assert not torch.equal(once["1.0.weight"], model[1][0].weight.grad), "other dropout in the next step"

    def test_a_weight_that_is_not_contiguous(self):
        def gradient(weight):
            model = copy.deepcopy(whole)
            model[0].weight.data = weight(model[0].weight.data)
            before = model[0].weight.detach().clone()
            SQuAT(model, rho=0.3, target="latent", norm="asam").gradient(closure_of(model, x))
            assert_same_bits(model[0].weight.detach(), before)
            return grads_of(model)

        whole, x = make_model(), torch.randn(8, 16)
        expected = gradient(lambda w: w)
        for name, grad in gradient(lambda w: w.t().contiguous().t()).items():
            torch.testing.assert_close(grad, expected[name], msg=name)

    @pytest.mark.parametrize("config", [{}, {"bits": 2}, {"bits": 1}, {"bits": 3, "act_bits": 8}])
    def test_together_with_winq(self, config):
        """On LSQ's grid, SEQ's and signs, with activations quantized too."""
        model, x = make_model(**config), torch.randn(8, 16)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        winq = WinQ(model, reset_every=2, reset_weight=0.4, noise_std=1e-3, two_sided=True)
        squat = SQuAT(model, scale_every=2)
        for step in range(4):
            winq.gradient(lambda: squat.gradient(closure_of(model, x, optimizer)))
            assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
            assert (model[0].scale.grad is not None) == (step % 2 == 1)
            optimizer.step()
            winq.after_step()
            squat.after_step()
        assert winq.resets == 2
        assert squat.steps == 4
        log = {**winq.log(), **squat.log()}
        assert all(isinstance(value, float) for value in log.values())
        assert len(log) == 7

    @pytest.mark.parametrize("room", [0, 100])
    def test_gradients_in_shared_memory(self, room):
        """The second pass overwrites a gradient that is a view, as in a bucket of DDP, so a copy is kept.

        Also if the bucket has one gradient.
        """
        model, x = make_model(), torch.randn(8, 16)
        bucket, small = torch.zeros(model[0].weight.numel() + room), torch.zeros(24 + room)
        inner = closure_of(model, x)

        def closure():
            loss = inner()
            view = bucket[: model[0].weight.numel()].view_as(model[0].weight)
            view.copy_(model[0].weight.grad)
            model[0].weight.grad = view
            scale = small[:24].copy_(model[0].scale.grad)
            model[0].scale.grad = scale
            scales.append(scale.clone())
            return loss

        before, scales = model[0].weight.detach().clone(), []
        SQuAT(model, target="latent").gradient(closure)
        assert_same_bits(model[0].weight.detach(), before)
        assert not torch.equal(*scales)
        assert_same_bits(model[0].scale.grad, scales[0])


def _scaled(model, x, factor):
    loss = factor * (model(x) - torch.linspace(-1, 1, 8)).square().mean()
    loss.backward()
    return loss


class TestErrors:
    @pytest.mark.parametrize(
        ("change", "words"),
        [
            ({"rho": -1.0}, r"rho is -1\.0"),
            ({"rho": float("nan")}, "rho is nan"),
            ({"eta": float("inf")}, "eta is inf"),
            ({"target": "weights"}, "target is 'weights', must be one of"),
            ({"norm": "l1"}, "norm is 'l1'"),
            ({"minibatch": "other"}, "minibatch is 'other'"),
            ({"scale_every": 0}, "scale_every is 0"),
            ({"scale_every": 1.5}, "scale_every is 1.5, must be a whole number"),
            ({"rho": True}, "rho is True"),
            ({"optimizer": torch.optim.LBFGS([nn.Parameter(torch.ones(1))])}, "optimizer is LBFGS, must be one that"),
        ],
    )
    def test_values(self, change, words):
        with pytest.raises(ValueError, match=words):
            SQuAT(make_model(), **change)

    def test_use(self):
        model = make_model()
        with pytest.raises(ValueError, match="no quantized layer"):
            SQuAT(nn.Linear(4, 4))
        with pytest.raises(ValueError, match="optimizer is None"):
            SQuAT(model).step(lambda: None)
        with pytest.raises(RuntimeError, match="no gradient in any quantized weight"):
            SQuAT(model).gradient(lambda: torch.zeros(()))
        optimizer = torch.optim.SGD(model.parameters())
        squat = SQuAT(model, optimizer)
        for call in (squat.step, squat.gradient, lambda: squat.step(None), lambda: squat.step(torch.zeros(()))):
            with pytest.raises(
                ValueError, match=r"closure is (NoneType|Tensor), must be a function.*squat\.(step|grad)"
            ):
                call()
        inner = closure_of(model, torch.randn(2, 16))
        winq = WinQ(model, reset_every=None, reset_weight=0.0, noise_std=0.0)
        for method in (squat, SQuAT(model, optimizer, minibatch="next"), winq):
            with pytest.raises(
                RuntimeError, match=r"closure changed the weight of 0: optimizer.step\(\) does not belong"
            ):
                method.gradient(lambda: [inner(), optimizer.step()])
        for layer in quantized_modules(model).values():
            layer.weight.requires_grad_(False)
        with pytest.raises(ValueError, match="every quantized weight of the model is frozen"):
            SQuAT(model).gradient(closure_of(model, torch.randn(2, 16)))
        with pytest.raises(ValueError, match="steps is -1"):
            SQuAT(model).load_state_dict({"steps": -1})
        with pytest.raises(ValueError, match="must have 'steps'"):
            SQuAT(model).load_state_dict({})

    @pytest.mark.parametrize("target", ["quantized", "latent"])
    def test_an_error_in_the_second_pass_restores(self, target):
        model, x = make_model(), torch.randn(8, 16)
        before = copy.deepcopy(model.state_dict())
        inner, calls = closure_of(model, x), []

        def closure():
            calls.append(model(x).sum().item())
            if len(calls) == 2:
                raise KeyError("planned")
            return inner()

        with pytest.raises(KeyError):
            SQuAT(model, rho=1.0, target=target).gradient(closure)
        assert calls[0] != calls[1]
        for name, value in model.state_dict().items():
            assert_same_bits(value, before[name], name)
        assert model(x).sum().item() == calls[0]
