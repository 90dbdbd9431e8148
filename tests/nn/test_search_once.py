"""A search for scales takes long, so scales are searched once, and not at all where others replace them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import qatkernels as qk
from qatkernels.nn import QuantConfig, calibrate, search_scale
from qatkernels.nn._follow_recipe import follow
from qatkernels.nn.recipe import recipe_of
from tests.searches import Candidates


def of_a_search(config: QuantConfig) -> int:
    """Return how many candidates a search has."""
    with Candidates() as tried:
        search_scale(torch.randn(4, 32), config.grid)
    return tried.count


def test_calibration_searches_what_quantizing_left() -> None:
    config = QuantConfig(2, scale_init="activation")
    with Candidates() as tried:
        model = qk.quantize_model(nn.Sequential(nn.Linear(32, 8)), config)
    assert tried.count == 0
    with Candidates() as tried:
        calibrate(model, torch.randn(4, 32))
    assert tried.count == of_a_search(config) > 0


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_recipe_brings_its_scales(device: str) -> None:
    model = qk.quantize_model(nn.Sequential(nn.Linear(32, 8)), QuantConfig(2, scale_init="mse"))
    with torch.device(device):
        again = nn.Sequential(nn.Linear(32, 8))
    recipe = recipe_of(model)
    assert recipe is not None
    with Candidates() as tried:
        follow(again, recipe)
    assert tried.count == 0
    assert again[0].config == model[0].config


@pytest.mark.parametrize("init", ["mse", "activation"])
def test_from_pretrained(tmp_path, init: str) -> None:
    transformers = pytest.importorskip("transformers")
    from qatkernels.integrations.transformers import QatConfig

    settings = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    config = transformers.LlamaConfig(**settings, num_attention_heads=2, num_key_value_heads=2)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "plain")
    read = transformers.AutoModelForCausalLM.from_pretrained
    with Candidates() as tried:
        model = read(tmp_path / "plain", quantization_config=QatConfig(bits=2, scale_init=init))
    layers = qk.quantized_modules(model)
    assert tried.count == (len(layers) * of_a_search(QuantConfig(2)) if init == "mse" else 0)
    model.save_pretrained(tmp_path / "trained")
    with Candidates() as tried:
        again = qk.quantized_modules(read(tmp_path / "trained"))
    assert tried.count == 0
    assert all(torch.equal(again[name].scale, layer.scale) for name, layer in layers.items())
