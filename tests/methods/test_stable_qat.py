"""StableQAT's gradient of rounding."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from qatkernels import QuantConfig, quantize_model
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


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match=r"amplitude is 0.5, must be in \[0, 0.2251\)"):
        StableQAT(make(), amplitude=0.5)
    with pytest.raises(ValueError, match="has scheme 'binary', must have one that rounds"):
        StableQAT(make(1))
    with pytest.raises(ValueError, match="no quantized layer"):
        StableQAT(nn.Linear(2, 2))
