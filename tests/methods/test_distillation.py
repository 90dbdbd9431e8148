"""Distillation against its definition."""

import math

import pytest
import torch

from qatkernels.methods import distillation_loss
from qatkernels.methods.distillation import DistillationConfig
from qatkernels.options import ConfigError


@pytest.mark.parametrize("temperature", [1.0, 2.0, 0.5])
def test_value_and_gradient(temperature):
    torch.manual_seed(0)
    logits = torch.randn(3, 5, 7, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(3, 5, 7, dtype=torch.float64, requires_grad=True)
    p, q = (torch.softmax(t / temperature, -1) for t in (teacher, logits))
    wanted = (p * (p.log() - q.log())).sum(-1).mean() * temperature**2
    found = distillation_loss(logits, teacher, temperature)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-6)
    found.backward()
    torch.testing.assert_close(logits.grad, temperature * (q - p).detach() / 15, rtol=1e-4, atol=1e-6)
    assert teacher.grad is None


def test_equal_predictions_have_no_loss():
    logits = torch.randn(4, 9, dtype=torch.bfloat16)
    assert distillation_loss(logits, logits).item() == 0
    assert math.isfinite(distillation_loss(torch.full((1, 3), 1e4), torch.tensor([[0.0, 1e4, -1e4]])).item())


def test_bad_input():
    with pytest.raises(ValueError, match=r"teacher has shape \(2, 4\), must be \(2, 3\) like logits"):
        distillation_loss(torch.zeros(2, 3), torch.zeros(2, 4))
    with pytest.raises(ValueError, match="temperature is 0, must be positive"):
        distillation_loss(torch.zeros(2, 3), torch.zeros(2, 3), 0)
    with pytest.raises(ConfigError, match=r"--distill is 2, must be in \[0, 1\]"):
        DistillationConfig(distill=2)
