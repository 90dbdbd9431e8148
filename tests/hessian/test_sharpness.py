"""Sharpness against formulas. Afterwards the weights are restored."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from qatkernels.hessian import gradient_norm_ratio, sharpness
from qatkernels.nn import GroupedQuantLinear, QuantConfig, quantize_model, quantized_modules, quantized_weights


class Bowl(nn.Module):
    """L = a . w + w' D w / 2."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64))
        self.d = torch.tensor([1.0, 4.0, 9.0], dtype=torch.float64)

    def forward(self):
        return 0.5 * (self.d * self.w**2).sum()


@pytest.mark.parametrize("norm", ["l2", "asam"])
@pytest.mark.parametrize("rho", [0.0, 0.05, 1.0])
def test_formula(norm, rho):
    model = Bowl()
    w, d = model.w.detach().clone(), model.d
    g, t = d * w, w.abs() + 0.01 if norm == "asam" else torch.ones(3, dtype=torch.float64)
    e = rho * t**2 * g / (t * g).norm()
    found = sharpness(model, model, rho, norm=norm)
    value = 0.5 * (d * (w + e) ** 2).sum() - 0.5 * (d * w**2).sum()
    assert found.value == pytest.approx(value.item(), rel=1e-12, abs=1e-15)
    assert found.loss == pytest.approx(0.5 * (d * w**2).sum().item())
    assert found.gradient_norm == pytest.approx(g.norm().item())
    assert found.perturbation_norm == pytest.approx(e.norm().item())
    assert torch.equal(model.w, w)
    assert gradient_norm_ratio(model, [model.w]) == pytest.approx((g.norm() / w.norm()).item())


def quantized():
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)).double()
    model = quantize_model(model, QuantConfig(2))
    x, y = torch.randn(9, 6, dtype=torch.float64), torch.randint(4, (9,))
    return model, lambda: F.cross_entropy(model(x), y), x, y


@pytest.mark.parametrize("norm", ["l2", "asam"])
def test_after_rounding(norm):
    """Perturbing Q(W) is perturbing the weights of the plain model that holds them."""
    model, loss, x, y = quantized()
    before = copy.deepcopy(model.state_dict())
    plain = nn.Sequential(model[0].to_linear(), nn.Tanh(), model[2].to_linear())
    weights = [plain[0].weight, plain[2].weight]
    wanted = sharpness(plain, lambda: F.cross_entropy(plain(x), y), 0.3, norm=norm, params=weights)
    found = sharpness(model, loss, 0.3, norm=norm, target="quantized")
    assert found == pytest.approx(wanted, rel=1e-6)
    assert wanted.value > 0
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    assert all(m.quantizer.added is None for m in quantized_modules(model).values())


def test_latent_perturbations_of_a_quantized_model_that_cross_no_level():
    model, loss, _, _ = quantized()
    tiny = sharpness(model, loss, 1e-9)
    assert tiny.value == 0
    assert tiny.perturbation_norm == pytest.approx(1e-9)
    assert sharpness(model, loss, 10.0).value != 0


def test_weights_come_back_when_the_loss_fails():
    model = Bowl()
    calls = []

    def loss():
        calls.append(model.w.detach().clone())
        if len(calls) == 2:
            raise RuntimeError("out of luck")
        return model()

    before = model.w.detach().clone()
    with pytest.raises(RuntimeError, match="out of luck"):
        sharpness(model, loss)
    assert not torch.equal(calls[1], before)
    assert torch.equal(model.w, before)


def test_at_a_minimum_nothing_is_perturbed():
    model = Bowl()
    with torch.no_grad():
        model.w.zero_()
    found = sharpness(model, model, 0.1)
    assert (found.value, found.gradient_norm, found.perturbation_norm) == (0, 0, 0)
    with pytest.raises(ValueError, match="params are all zero"):
        gradient_norm_ratio(model, [model.w])


def test_shared_weights_are_perturbed_once():
    torch.manual_seed(0)
    linear = nn.Linear(4, 4).double()
    model = quantize_model(nn.Sequential(linear, nn.Tanh(), linear), QuantConfig(4))
    assert len(quantized_weights(model)) == 1
    x = torch.randn(5, 4, dtype=torch.float64)
    found = sharpness(model, lambda: model(x).square().sum(), 0.1, target="quantized")
    assert found.perturbation_norm == pytest.approx(0.1)


@pytest.mark.parametrize("norm", ["l2", "asam"])
def test_experts_are_perturbed_after_rounding(norm):
    """A stack of experts has the same sharpness as separate layers, each with its expert's tokens."""
    apart = quantize_model(nn.ModuleList(nn.Linear(6, 3, bias=False) for _ in range(2)).double(), QuantConfig(2))
    stack = GroupedQuantLinear.from_stacked(torch.stack([m.weight.detach() for m in apart]), config=QuantConfig(2))
    x, y, offsets = torch.randn(9, 6).double(), torch.randint(3, (9,)), torch.tensor([4, 9], dtype=torch.int32)

    def separately():
        return F.cross_entropy(torch.cat([apart[0](x[:4]), apart[1](x[4:])]), y)

    wanted = sharpness(apart, separately, 0.3, norm=norm, target="quantized")
    found = sharpness(stack, lambda: F.cross_entropy(stack(x, offsets), y), 0.3, norm=norm, target="quantized")
    assert found == pytest.approx(wanted, rel=1e-6)
    assert wanted.value > 0
    assert stack.quantizer.added is None


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda m: sharpness(m, m, -1.0), "rho is -1.0"),
        (lambda m: sharpness(m, m, math.nan), "rho is nan"),
        (lambda m: sharpness(m, m, norm="linf"), "norm is 'linf'"),
        (lambda m: sharpness(m, m, target="scales"), "target is 'scales'"),
        (lambda m: sharpness(m, m, eta=-0.1), "eta is -0.1"),
        (lambda m: sharpness(m, m, target="quantized"), "no quantized layer"),
        (lambda m: sharpness(m, m, target="quantized", params=[m.w]), "params is given"),
        (lambda m: sharpness(m, lambda: m.w), r"shape \(3,\)"),
        (lambda m: sharpness(m, lambda: torch.ones(())), "does not depend"),
        (lambda m: sharpness(m, lambda: m.w.sum() * math.nan), "norm of the gradient is nan"),
        (lambda m: gradient_norm_ratio(lambda: torch.ones(()), [m.w]), "does not depend"),
    ],
)
def test_errors(call, words):
    model = Bowl()
    with pytest.raises(ValueError, match=words):
        call(model)
