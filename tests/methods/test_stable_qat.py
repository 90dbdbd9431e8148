"""StableQAT's gradient of rounding."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from qatkernels import QuantConfig, quantize_model, quantized_modules
from qatkernels.hessian import hvp
from qatkernels.methods import StableQAT


def make(bits: float = 3, **kwargs: object) -> nn.Module:
    torch.manual_seed(0)
    return quantize_model(nn.Sequential(nn.Linear(16, 8)), QuantConfig(bits, **kwargs))  # type: ignore[arg-type]


def gradients(model: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    model.zero_grad()
    torch.manual_seed(1)
    model(torch.randn(5, 16)).square().sum().backward()
    return model[0].weight.grad.clone(), model[0].scale.grad.clone()  # type: ignore[index, operator, union-attr]


@pytest.mark.parametrize("kwargs", [{}, {"group_size": 8}, {"per_tensor": True}, {"bits": 2}, {"bits": 1.58}])
def test_the_factor(kwargs: dict[str, object]) -> None:
    model = make(**kwargs)  # type: ignore[arg-type]
    straight, of_scale = gradients(model)
    stable = StableQAT(model)
    found, still = gradients(model)
    layer = model[0]  # type: ignore[index]
    spacing = (layer.scale / layer.grid.steps).view(-1, 1)
    shape = spacing.numel(), -1
    d = ((layer.weight - layer.quantized_weight()).view(shape) / spacing).view_as(layer.weight).detach()
    a = math.sqrt(2) * math.pi * 0.2
    expected = straight * (1 - a * torch.cos(math.pi * d)) / (1 + a * torch.cos(math.pi * d))
    torch.testing.assert_close(found, expected)
    assert torch.equal(still, of_scale)
    assert float((found / straight)[straight != 0].min()) == pytest.approx((1 - a) / (1 + a), rel=0.2)
    stable.remove()
    assert torch.equal(gradients(model)[0], straight)


def test_no_amplitude_is_straight_through() -> None:
    model = make()
    straight, _ = gradients(model)
    StableQAT(model, amplitude=0.0)
    assert torch.equal(gradients(model)[0], straight)


def test_in_training_mode_alone() -> None:
    model = make()
    straight, _ = gradients(model.eval())
    StableQAT(model)
    assert torch.equal(gradients(model)[0], straight)
    assert not torch.equal(gradients(model.train())[0], straight)


def test_a_weight_that_trains_later_and_one_that_is_replaced() -> None:
    model = make()
    model[0].weight.requires_grad_(False)  # type: ignore[index, operator, union-attr]
    StableQAT(model)
    model[0].weight.requires_grad_(True)  # type: ignore[index, operator, union-attr]
    found, _ = gradients(model)
    model.load_state_dict({name: value.clone() for name, value in model.state_dict().items()}, assign=True)
    model.requires_grad_(True)
    assert torch.equal(gradients(model)[0], found)
    assert not torch.equal(gradients(make())[0], found)


def test_bfloat16_weights_have_the_factor_of_their_float32_values() -> None:
    model = make(8)
    model.bfloat16()
    wide = make(8)
    with torch.no_grad():
        wide[0].weight.copy_(model[0].weight)  # type: ignore[index, operator, union-attr, arg-type]
    factors = []
    for m in (model, wide):
        m[0].weight.grad = None  # type: ignore[index, operator, union-attr]
        weights = []
        for amplitude in (0.0, 0.2):
            stable = StableQAT(m, amplitude=amplitude)
            m[0]._forward_weight(None).float().sum().backward()  # type: ignore[index, operator, union-attr]
            weights.append(m[0].weight.grad.float().clone())  # type: ignore[index, operator, union-attr]
            m[0].weight.grad = None  # type: ignore[index, operator, union-attr]
            stable.remove()
        factors.append(weights[1])
    torch.testing.assert_close(factors[0], factors[1], rtol=2**-8, atol=2**-9)


def test_both_engines_multiply_with_the_same_hessian() -> None:
    model = quantize_model(nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 3)), QuantConfig(3))
    StableQAT(model)
    x, target = torch.randn(12, 8), torch.randn(12, 3)
    weights = [layer.weight for layer in quantized_modules(model).values()]
    v = [torch.randn_like(w) for w in weights]
    found = [
        hvp(lambda: (model(x) - target).square().mean(), weights, v, model=model, engine=engine)
        for engine in ("reverse", "forward")
    ]
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match=r"amplitude is 0.5, must be in \[0, 0.2251\)"):
        StableQAT(make(), amplitude=0.5)
    with pytest.raises(ValueError, match="has scheme 'binary', must have one that rounds"):
        StableQAT(make(1))
    with pytest.raises(ValueError, match="no quantized layer"):
        StableQAT(nn.Linear(2, 2))
