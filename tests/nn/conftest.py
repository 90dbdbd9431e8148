"""Small models for the tests of nn."""

import pytest
import torch
from torch import nn

from qatkernels.nn import QuantConfig, QuantLinear

#: One configuration of each kind of weight quantizer.
CONFIGS = {
    "binary": QuantConfig(1),
    "ternary": QuantConfig(1.58),
    "seq2": QuantConfig(2),
    "lsq3": QuantConfig(3),
    "lsq4-group": QuantConfig(4, group_size=8),
    "lsq4-tensor": QuantConfig(4, per_tensor=True),
    "affine4": QuantConfig(4, "affine"),
    "affine8-group": QuantConfig(8, "affine", group_size=8),
}


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(params=CONFIGS.values(), ids=CONFIGS.keys())
def config(request):
    return request.param


@pytest.fixture
def mlp():
    return nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 8))


@pytest.fixture
def layer(config):
    return QuantLinear(16, 12, config=config)
