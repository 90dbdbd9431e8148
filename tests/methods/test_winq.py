"""WinQ in a plain training loop."""

import copy
import warnings

import pytest
import torch
from torch import nn

from qatkernels import QuantConfig, fake_quantize, quantize_model, quantized_modules
from qatkernels.methods import GridStats, WinQ, hadamard
from qatkernels.ops import normal
from qatkernels.testing.compare import assert_same_bits

NOISE = {"reset_every": None, "reset_weight": 0.4, "noise_std": 0.01}
RESETS = {"reset_every": 2, "reset_weight": 0.4, "noise_std": 0.0}


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def make_model(config=None, **kwargs):
    model = nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 8))
    return quantize_model(model, config or QuantConfig(bits=2, **kwargs))


def closure_of(model, x, optimizer=None):
    def closure():
        if optimizer is not None:
            optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        return loss

    return closure


class TestResets:
    @pytest.mark.parametrize("bits", [1, 1.58, 2, 4])
    def test_move_weights_and_no_output(self, bits):
        model = make_model(QuantConfig(bits=bits))
        winq, x = WinQ(model, **RESETS), torch.randn(5, 16)
        before = {name: m.weight.detach().clone() for name, m in quantized_modules(model).items()}
        scales = [m.scale.detach().clone() for m in quantized_modules(model).values()]
        y = model(x)
        assert not winq.after_step()
        assert all(torch.equal(m.weight, before[n]) for n, m in quantized_modules(model).items())
        assert winq.after_step()
        assert_same_bits(model(x), y)
        for name, m in quantized_modules(model).items():
            expected = 0.6 * before[name] + 0.4 * m.quantized_weight()
            torch.testing.assert_close(m.weight, expected)
            assert not torch.equal(m.weight, before[name])
        for m, scale in zip(quantized_modules(model).values(), scales, strict=True):
            assert_same_bits(m.scale.detach(), scale)

    def test_reset_weight_is_on_the_quantized_value(self):
        model = make_model()
        WinQ(model, reset_every=1, reset_weight=1.0, noise_std=0.0).after_step()
        for m in quantized_modules(model).values():
            assert_same_bits(m.weight.detach(), m.quantized_weight().detach())

    def test_leave_frozen_weights_alone(self):
        model = make_model()
        model[0].weight.requires_grad_(False)
        before = copy.deepcopy(model)
        WinQ(model, **RESETS).reset()
        assert_same_bits(model[0].weight, before[0].weight)
        assert not torch.equal(model[2].weight, before[2].weight)

    def test_that_would_move_nothing_are_an_error(self):
        model = make_model()
        winq = WinQ(model, **RESETS)
        for module in quantized_modules(model).values():
            module.weight.requires_grad_(False)
        with pytest.raises(ValueError, match="every quantized weight of the model is frozen"):
            winq.reset()
        assert winq.resets == 0
        with pytest.warns(UserWarning, match="is frozen.*a reset will be an error"):
            WinQ(model, **RESETS)

    def test_leave_the_optimizer_alone(self):
        model = make_model()
        optimizer = torch.optim.AdamW(model.parameters())
        closure_of(model, torch.randn(5, 16))()
        optimizer.step()
        before = copy.deepcopy(optimizer.state_dict())
        WinQ(model, **RESETS).reset()
        for (_, a), (_, b) in zip(before["state"].items(), optimizer.state_dict()["state"].items(), strict=True):
            assert all(torch.equal(a[key], b[key]) for key in a)

    def test_tied_weights_move_once(self):
        layers = [nn.Linear(16, 16, bias=False) for _ in range(2)]
        layers[1].weight = layers[0].weight
        model = quantize_model(nn.Sequential(*layers), QuantConfig(bits=4))
        alone = copy.deepcopy(model[0])
        WinQ(model, **RESETS).reset()
        WinQ(nn.Sequential(alone), **RESETS).reset()
        assert_same_bits(model[1].weight.detach(), alone.weight.detach())

    def test_tied_weights_of_two_grids_are_refused(self):
        layers = [nn.Linear(16, 16, bias=False) for _ in range(2)]
        layers[1].weight = layers[0].weight
        model = quantize_model(nn.Sequential(*layers), {"0": QuantConfig(bits=4), "1": QuantConfig(bits=2)})
        with pytest.raises(ValueError, match="0 and 1 share a weight"):
            WinQ(model, **RESETS)

    def test_behind_a_rotation(self):
        model = quantize_model(nn.Sequential(nn.Linear(64, 32)), QuantConfig(bits=3))
        layer = model[0]
        with torch.no_grad():
            layer.scale.copy_(layer.grid.init_scale(hadamard(layer.weight)))
        before = layer.weight.detach().clone()
        winq = WinQ(model, **RESETS, rotation=hadamard)
        away = winq.log()["winq/distance"]
        winq.reset()
        assert winq.log() == {"winq/flips": 0, "winq/distance": pytest.approx(0.6 * away, rel=1e-4), "winq/resets": 1}
        rotated = hadamard(before)
        values = fake_quantize(rotated, layer.scale.detach(), layer.grid)
        torch.testing.assert_close(layer.weight.detach(), hadamard(0.6 * rotated + 0.4 * values))
        assert_same_bits(fake_quantize(hadamard(layer.weight.detach()), layer.scale.detach(), layer.grid), values)

    def test_change_what_autograd_saved(self):
        """A reset between forward and backward is an error, as any change in place is."""
        model = make_model()
        loss = model(torch.randn(3, 16)).square().mean()
        WinQ(model, **RESETS).reset()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


class TestNoise:
    def test_is_in_training_forwards_alone(self):
        model, x = make_model(), torch.randn(5, 16)
        clean = model(x)
        winq = WinQ(model, **NOISE)
        assert not torch.equal(model(x), model(x))
        model.eval()
        assert_same_bits(model(x), clean)
        model.train()
        winq.remove()
        assert_same_bits(model(x), clean)

    def test_that_is_off_is_said_once(self):
        model, x = make_model(), torch.randn(5, 16)
        model.eval()
        for use in (lambda winq: winq.after_step(), lambda winq: winq.gradient(closure_of(model, x))):
            winq = WinQ(model, **NOISE)
            with pytest.warns(UserWarning, match=r"noise_std is 0.01, but no quantized layer is in training mode"):
                use(winq)
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                use(winq)
                WinQ(model, **RESETS).after_step()
        model[0].train()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            WinQ(model, **NOISE).after_step()

    def test_removed_with_one_before_it(self):
        """As in a notebook's cell that runs twice."""
        model = make_model()
        first = WinQ(model, **NOISE)
        second = WinQ(model, **{**NOISE, "noise_std": 0.05})
        assert model[0].quantizer.noise_std == 0.05
        second.remove()
        assert model[0].quantizer.noise_std == 0
        first.remove()
        assert model[0].quantizer.noise_std == 0

    def test_of_scales_is_that_of_weights_unless_given(self):
        first, *_ = quantized_modules(make_model()).values()
        model = nn.Sequential(first)
        WinQ(model, **NOISE)
        assert (first.quantizer.noise_std, first.quantizer.scale_noise_std) == (0.01, 0.01)
        WinQ(model, **NOISE, scale_noise_std=0.0)
        assert (first.quantizer.noise_std, first.quantizer.scale_noise_std) == (0.01, 0.0)

    def test_negative_noise_is_the_mirrored_one(self):
        w, scale, seed = torch.randn(4, 32), torch.ones(4), torch.tensor(9)
        grid = QuantConfig(bits=4).grid
        noise = 0.3 * normal(seed, w.numel()).view_as(w)
        for sign in (1, -1):
            y = fake_quantize(w, scale, grid, noise_std=sign * 0.3, seed=9)
            assert_same_bits(y, fake_quantize(w + sign * noise, scale, grid))


class TestGradient:
    def test_of_one_draw_is_the_closure(self):
        model, x = make_model(), torch.randn(5, 16)
        winq = WinQ(model, **NOISE)
        torch.manual_seed(1)
        loss = winq.gradient(closure_of(model, x))
        grads = [p.grad for p in model.parameters()]
        torch.manual_seed(1)
        model.zero_grad()
        assert_same_bits(loss, closure_of(model, x)().detach())
        for g, p in zip(grads, model.parameters(), strict=True):
            assert_same_bits(g, p.grad)

    @pytest.mark.parametrize("zeroes", [False, True])
    def test_two_sided_and_several(self, zeroes):
        model, x = make_model(), torch.randn(5, 16)
        optimizer = torch.optim.SGD(model.parameters()) if zeroes else None
        winq = WinQ(model, **NOISE, two_sided=True, samples=2)
        torch.manual_seed(1)
        for p in model.parameters():
            p.grad = torch.ones_like(p)  # must not count
        loss = winq.gradient(closure_of(model, x, optimizer))
        grads = [p.grad for p in model.parameters()]

        torch.manual_seed(1)
        expected, losses = [torch.zeros_like(p) for p in model.parameters()], []
        for _ in range(2):
            state = torch.get_rng_state()
            for sign in (1, -1):
                torch.set_rng_state(state)
                for m in quantized_modules(model).values():
                    m.quantizer.set_noise(sign * 0.01, sign * 0.01)
                model.zero_grad()
                losses.append(closure_of(model, x)().item())
                for e, p in zip(expected, model.parameters(), strict=True):
                    e += p.grad / 4
        assert len(set(losses)) == 4
        assert loss.item() == pytest.approx(sum(losses) / 4)
        for g, e in zip(grads, expected, strict=True):
            torch.testing.assert_close(g, e)

    def test_accumulates(self):
        model, x = make_model(), torch.randn(6, 16)
        winq = WinQ(model, **{**NOISE, "noise_std": 0.0}, samples=2)
        for part in x.split(3):
            winq.gradient(closure_of(model, part), accumulate=True)
        grads = [p.grad for p in model.parameters()]
        model.zero_grad()
        for part in x.split(3):
            closure_of(model, part)()
        for g, p in zip(grads, model.parameters(), strict=True):
            torch.testing.assert_close(g, p.grad)

    def test_moves_running_statistics_once(self):
        """By the first pass, at W + U, as in a step of one pass."""
        model = nn.Sequential(nn.Linear(16, 24), nn.BatchNorm1d(24), nn.Linear(24, 8))
        model = quantize_model(model, QuantConfig(bits=2))
        x, twin = torch.randn(6, 16), copy.deepcopy(model)
        torch.manual_seed(1)
        winq = WinQ(model, **NOISE, two_sided=True, samples=2)
        winq.gradient(closure_of(model, x))
        torch.manual_seed(1)
        WinQ(twin, **NOISE).gradient(closure_of(twin, x))
        assert model[1].num_batches_tracked == 1
        for name, buffer in model.named_buffers():
            assert_same_bits(buffer, twin.get_buffer(name), name)

    def test_needs_a_closure(self):
        with pytest.raises(ValueError, match=r"closure is NoneType, must be a function.*winq\.gradient"):
            WinQ(make_model(), **NOISE).gradient()

    @pytest.mark.parametrize("room", [0, 100])
    def test_gradients_in_shared_memory(self, room):
        """The next pass overwrites a gradient that is a view, as in a bucket of DDP, so a copy is kept.

        Also if the bucket has one gradient.
        """
        model, bucket, values = make_model(), torch.zeros(384 + room), iter((1.0, 3.0, 5.0))
        model[0].weight.grad = bucket[:384].view(24, 16).fill_(7.0)

        def closure():
            model[0].weight.grad = bucket[:384].view(24, 16).fill_(next(values))

        WinQ(model, **NOISE, samples=3).gradient(closure, accumulate=True)
        torch.testing.assert_close(model[0].weight.grad, torch.full((24, 16), 7.0 + 3.0))

    def test_noise_is_back_after_an_error(self):
        model = make_model()
        winq = WinQ(model, **NOISE, two_sided=True)
        calls = []

        def closure():
            calls.append(model[0].quantizer.noise_std)
            if len(calls) == 2:
                raise KeyError("planned")

        with pytest.raises(KeyError):
            winq.gradient(closure)
        assert calls == [0.01, -0.01]
        assert model[0].quantizer.noise_std == 0.01


def test_a_resumed_run_is_the_same():
    def run(stop):
        torch.manual_seed(3)
        model = make_model()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        winq = WinQ(model, reset_every=3, reset_weight=0.5, noise_std=1e-3)
        for step in range(8):
            if step == stop:
                state = copy.deepcopy((model.state_dict(), optimizer.state_dict(), winq.state_dict()))
                model = make_model()
                optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
                winq = WinQ(model, reset_every=3, reset_weight=0.5, noise_std=1e-3)
                for thing, saved in zip((model, optimizer, winq), state, strict=True):
                    thing.load_state_dict(saved)
            torch.manual_seed(step)
            closure_of(model, torch.randn(4, 16), optimizer)()
            optimizer.step()
            winq.after_step()
        assert winq.steps == 8
        assert winq.resets == 2
        return model.state_dict()

    whole, resumed = run(None), run(4)
    for name in whole:
        assert_same_bits(resumed[name], whole[name], name)


class TestStats:
    def test_log(self):
        model = make_model()
        winq = WinQ(model, **RESETS)
        first = winq.log()
        assert first["winq/flips"] == 0
        winq.reset()
        second = winq.log()
        assert second["winq/flips"] == 0
        assert second["winq/resets"] == 1
        assert second["winq/distance"] == pytest.approx(0.6 * first["winq/distance"], rel=1e-4)
        with torch.no_grad():
            model[0].weight[:4].neg_()
        assert winq.log()["winq/flips"] == pytest.approx(4 * 16 / (16 * 24 + 24 * 8))
        assert winq.log()["winq/flips"] == 0

    def test_distance_in_spacings(self):
        model = quantize_model(nn.Sequential(nn.Linear(1000, 8, bias=False)), QuantConfig(bits=8))
        with torch.no_grad():
            model[0].weight.uniform_(-1, 1)
            model[0].reset_scale()
        assert GridStats(model).distance() == pytest.approx(12**-0.5, rel=0.05)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"reset_every": 0}, "reset_every is 0"),
        ({"reset_weight": 1.5}, "reset_weight is 1.5.*quantized value"),
        ({"reset_weight": float("nan")}, "reset_weight is nan"),
        ({"noise_std": -1e-3}, r"noise_std is -0\.001"),
        ({"scale_noise_std": float("inf")}, "scale_noise_std is inf"),
        ({"samples": 0}, "samples is 0"),
        ({"reset_every": 2.5}, "reset_every is 2.5, must be a whole number and at least 1, or None"),
        ({"reset_every": True}, "reset_every is True"),
        ({"reset_weight": None}, "reset_weight is None"),
        ({"noise_std": "a"}, "noise_std is 'a', must be finite"),
        ({"samples": 1.5}, "samples is 1.5, must be a whole number"),
        ({"last_reset": 3.0}, "last_reset is 3.0"),
        ({"two_sided": "no"}, "two_sided is 'no', must be True or False"),
    ],
)
def test_errors(change, words):
    with pytest.raises(ValueError, match=words):
        WinQ(make_model(), **{**RESETS, **change})


def test_a_model_without_quantized_layers_is_refused():
    with pytest.raises(ValueError, match="no quantized layer"):
        WinQ(nn.Linear(4, 4), **RESETS)
    with pytest.raises(ValueError, match="must have 'resets'"):
        WinQ(make_model(), **RESETS).load_state_dict({"step": 1})
    for state, words in (({"steps": -3, "resets": 0}, "steps is -3"), ({"steps": 2, "resets": 2.7}, "resets is 2.7")):
        with pytest.raises(ValueError, match=words):
            WinQ(make_model(), **RESETS).load_state_dict(state)


@pytest.mark.parametrize(
    ("rotation", "words"),
    [
        (hadamard, r"rotation cannot be used for 2 of shape \(8, 24\): .* a power of two"),
        (lambda w: w @ torch.eye(3), r"rotation cannot be used for 0 of shape \(24, 16\): mat1"),
        (lambda w: w.roll(1, -1), r"rotation is not its own inverse for 0 of shape \(24, 16\)"),
        (lambda w: w[:, :4], "rotation is not its own inverse for 0"),
    ],
)
def test_a_rotation_that_does_not_fit_is_refused(rotation, words):
    with pytest.raises(ValueError, match=words):
        WinQ(make_model(), **RESETS, rotation=rotation)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_rotation_sees_weights_as_they_are(dtype):
    h = hadamard(torch.eye(16)).to(dtype)
    model = quantize_model(nn.Sequential(nn.Linear(16, 8, dtype=dtype)), QuantConfig(bits=2))
    WinQ(model, **RESETS, rotation=lambda w: (w.view(8, 4, 4).flatten(1) @ h)).reset()
    with torch.device("meta"):
        later = quantize_model(nn.Sequential(nn.Linear(16, 8)), QuantConfig(bits=2))
    WinQ(later, **RESETS, rotation=hadamard)


def test_compiled():
    """Noise may change its size and sign, and WinQ come, after the model is compiled as one graph."""
    model, x = make_model(), torch.randn(5, 16)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    clean = compiled(x)
    winq = WinQ(model, **NOISE, two_sided=True)
    grads = []
    for called in (model, compiled):
        torch.manual_seed(3)
        winq.gradient(closure_of(called, x))
        grads.append([p.grad for p in model.parameters()])
    for g, e in zip(*grads, strict=True):
        torch.testing.assert_close(g, e)
    assert not torch.equal(compiled(x), compiled(x))
    winq.remove()
    torch.testing.assert_close(compiled(x), clean)


def test_hadamard():
    w = torch.randn(3, 8, dtype=torch.float64)
    h = hadamard(torch.eye(8, dtype=torch.float64))
    torch.testing.assert_close(h @ h, torch.eye(8, dtype=torch.float64))
    assert set(h.mul(8**0.5).round().flatten().tolist()) == {1.0, -1.0}
    torch.testing.assert_close(hadamard(w), w @ h)
    with pytest.raises(ValueError, match="power of two"):
        hadamard(torch.randn(3, 12))
