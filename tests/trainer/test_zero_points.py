"""Runs whose zero points are integers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from qatkernels import cli, quantized_modules
from qatkernels.formats.integers import IntegerWeight
from qatkernels.testing.compare import assert_same_bits
from qatkernels.trainer import ConfigError, TrainConfig, models

from .conftest import options


def test_integer_zero_points(tiny: dict[str, Any]) -> None:
    """Training moves the parameters off the integers, and the weights that are left have integers all the same."""
    settings = {**tiny, "bits": (4,), "scheme": "affine", "group_size": 16, "zero_point_domain": "int"}
    assert cli.main(["train", *options(settings)]) == 0
    layers = quantized_modules(models.load_trained(Path(tiny["out"]) / "w4").model)
    assert layers
    for layer in layers.values():
        assert layer.zero_point is not None
        assert not layer.zero_point.equal(layer.zero_point.round())
        assert_same_bits(IntegerWeight.of(layer).dequantize(), layer.quantized_weight().detach())


def test_schemes_without_zero_points_are_refused() -> None:
    with pytest.raises(ConfigError, match="--zero-point-domain is 'int' with scheme 'seq', it is for scheme 'affine'"):
        TrainConfig(zero_point_domain="int", bits=(2,))
