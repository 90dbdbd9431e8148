"""What SQuAT does not change in a model, and which models and optimizers it refuses."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

from qatkernels import QuantConfig, quantize_model
from qatkernels.methods import GridStats, SQuAT, WinQ
from qatkernels.testing.compare import assert_same_bits
from tests.methods.test_squat import closure_of, make_model


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def with_buffers():
    """A model with running statistics, and with a buffer that is replaced in every forward."""

    class Counted(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x):
            if self.training:
                self.calls = self.calls + 1
            return x

    layers = nn.Linear(16, 24), nn.BatchNorm1d(24), nn.GELU(), Counted(), nn.Linear(24, 8)
    return quantize_model(nn.Sequential(*layers), QuantConfig(bits=2))


class TestBuffers:
    @pytest.mark.parametrize("settings", [{}, {"target": "latent"}, {"minibatch": "next"}, {"norm": "asam"}])
    def test_move_once_a_step(self, settings):
        """As in plain training of the same batches, at the weights that are evaluated."""
        model, plain = with_buffers(), with_buffers()
        plain.load_state_dict(model.state_dict())
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)  # weights do not change
        squat = SQuAT(model, optimizer, rho=2.0, **settings)
        for _ in range(100):
            x = torch.randn(8, 16)
            squat.step(closure_of(model, x, optimizer))
            plain(x)
        assert model[1].num_batches_tracked == model[3].calls == 100
        for name, buffer in model.named_buffers():
            assert_same_bits(buffer, plain.get_buffer(name), name)

    def test_move_once_a_micro_batch(self):
        model, plain, x = with_buffers(), with_buffers(), torch.randn(8, 16)
        plain.load_state_dict(model.state_dict())
        squat = SQuAT(model, rho=2.0)
        winq = WinQ(model, reset_every=None, reset_weight=0.0, noise_std=0.0, two_sided=True, samples=2)
        for part in x.split(4):
            winq.gradient(lambda part=part: squat.gradient(closure_of(model, part)), accumulate=True)
            plain(part)
        for name, buffer in model.named_buffers():
            assert_same_bits(buffer, plain.get_buffer(name), name)

    def test_are_left_by_an_error_in_the_second_pass(self):
        model, plain, x = with_buffers(), with_buffers(), torch.randn(8, 16)
        plain.load_state_dict(model.state_dict())
        plain(x)
        inner, calls = closure_of(model, x), []

        def closure():
            calls.append(inner())
            if len(calls) == 2:
                raise KeyError("planned")

        with pytest.raises(KeyError):
            SQuAT(model, rho=2.0).gradient(closure)
        for name, buffer in model.named_buffers():
            assert_same_bits(buffer, plain.get_buffer(name), name)

    def test_scales_of_activations_are_initialized_once(self):
        """By the first pass; the second one, at other weights, sees that it has happened."""
        config = QuantConfig(bits=2, act_bits=8, act_scheme="lsq")
        model = quantize_model(nn.Sequential(nn.Linear(16, 24), nn.Linear(24, 8)), config)
        plain, x = copy.deepcopy(model), torch.randn(8, 16)
        plain(x)
        SQuAT(model, rho=5.0).gradient(closure_of(model, x))
        assert_same_bits(model[1].act.scale.detach(), plain[1].act.scale.detach())
        assert model[1].act.initialized

    def test_compiled(self):
        """Copies of buffers cause no recompilation, and do not update running statistics."""
        model, x = with_buffers()[:3], torch.randn(8, 16)
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        squat = SQuAT(model, rho=0.3)

        def closure():
            compiled(x).square().mean().backward()

        for step in range(3):
            with torch.compiler.set_stance("fail_on_recompile" if step else "default"):
                squat.gradient(closure)
        assert model[1].num_batches_tracked == 3

    def test_generators_go_on_as_after_one_pass(self):
        model = nn.Sequential(make_model(), nn.Dropout(0.5))
        inner = closure_of(model, torch.randn(8, 16))
        state = torch.get_rng_state()
        inner()
        wanted = torch.get_rng_state()
        torch.set_rng_state(state)
        SQuAT(model).gradient(inner)
        assert torch.equal(torch.get_rng_state(), wanted)


class TestOptimizers:
    """The optimizer updates the parameters that have gradients after SQuAT.

    Parameters that it does not have are reported.
    """

    def test_of_other_parameters(self):
        model, x = make_model(), torch.randn(8, 16)
        optimizer = torch.optim.SGD(copy.deepcopy(model).parameters())
        with pytest.raises(ValueError, match="optimizer holds no quantized weight of the model"):
            SQuAT(model, optimizer).step(closure_of(model, x))

    def test_made_before_quantizing(self):
        model, x = nn.Sequential(nn.Linear(16, 8)), torch.randn(8, 16)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        model = quantize_model(model, QuantConfig(bits=2))
        squat = SQuAT(model, optimizer)
        with pytest.warns(UserWarning, match=r"optimizer lacks 1 quantized weights and scales.*\(0.scale\)"):
            squat.step(closure_of(model, x, optimizer))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            squat.step(closure_of(model, x, optimizer))
            model[0].scale.requires_grad_(False)
            SQuAT(model, optimizer).step(closure_of(model, x, optimizer))

    @pytest.mark.parametrize("zeroes", [False, True])
    def test_parameters_outside_the_model(self, zeroes):
        """Those of a loss: their gradient is the second pass's, as everything's but the scales'."""
        model, x, factor = make_model(), torch.randn(8, 16), nn.Parameter(torch.ones(8))
        optimizer = torch.optim.SGD([*model.parameters(), factor], lr=0.0)
        grads = []

        def closure():
            if zeroes:
                optimizer.zero_grad()
            loss = (model(x) * factor - 1).square().mean()
            loss.backward()
            grads.append(factor.grad.clone())
            return loss

        SQuAT(model, optimizer, rho=0.3).step(closure)
        SQuAT(model, optimizer, rho=0.3).step(closure)
        assert_same_bits(grads[0], grads[2])
        assert_same_bits(factor.grad, grads[1])
        assert_same_bits(grads[1], grads[3])
        assert not torch.equal(grads[0], grads[1])


class TestReparametrized:
    @pytest.mark.parametrize("how", [parametrizations.weight_norm, lambda m: prune.l1_unstructured(m, "weight", 0.5)])
    def test_is_refused_by_name_whenever_it_comes(self, how):
        model, x = make_model(), torch.randn(8, 16)
        squat = SQuAT(model)
        winq = WinQ(model, reset_every=1, reset_weight=0.9, noise_std=0.0)
        how(model[3])
        words = r"^3 is (pruned|parametrized) by .*weight anew.*prune\.remove.*optimizer"
        for call in (
            lambda: squat.gradient(closure_of(model, x)),
            winq.reset,
            winq.log,
            lambda: SQuAT(model),
            lambda: WinQ(model, reset_every=1, reset_weight=0.9, noise_std=0.0),
            lambda: GridStats(model),
        ):
            with pytest.raises(ValueError, match=words):
                call()
        assert winq.resets == 0

    def test_goes_on_when_the_weight_is_permanent(self):
        model, x = make_model(), torch.randn(8, 16)
        squat = SQuAT(model)
        winq = WinQ(model, reset_every=1, reset_weight=0.9, noise_std=0.0)
        prune.l1_unstructured(model[3], "weight", 0.5)
        prune.remove(model[3], "weight")
        before = model[3].weight.detach().clone()
        squat.gradient(closure_of(model, x))
        assert model[3].weight.grad is not None
        winq.reset()
        assert not torch.equal(model[3].weight, before)
