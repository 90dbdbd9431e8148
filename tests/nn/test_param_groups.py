import copy
import math
import re
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import qatkernels as qk
from qatkernels import QuantConfig, check, param_groups, quantize_model, quantized_modules, scales_at_floor
from qatkernels.methods.stats import GridStats
from qatkernels.nn import calibrate


class Net(nn.Module):
    def __init__(self, width=64):
        super().__init__()
        self.embed = nn.Embedding(32, width)
        self.up, self.norm, self.down = nn.Linear(width, 2 * width), nn.LayerNorm(2 * width), nn.Linear(2 * width, 8)

    def forward(self, x):
        return self.down(self.norm(F.gelu(self.up(x))))


def named(groups):
    return {
        name: [p for g in groups if g["name"] == name for p in g["params"]] for name in ("weights", "scales", "others")
    }


@pytest.mark.parametrize("scale_lr", [None, 1e-4])
def test_every_trainable_parameter_is_in_one_group(scale_lr):
    model = quantize_model(Net(), {"up": QuantConfig(bits=2), "down": QuantConfig(bits=8, scheme="affine")})
    model.norm.weight.requires_grad_(False)
    groups = param_groups(model, lr=1e-3, scale_lr=scale_lr, weight_decay=0.1)
    given = [id(p) for g in groups for p in g["params"]]
    assert sorted(given) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    parts = named(groups)
    assert {id(p) for p in parts["weights"]} == {id(model.up.weight), id(model.down.weight)}
    assert {id(p) for p in parts["scales"]} == {id(model.up.scale), id(model.down.scale), id(model.down.zero_point)}
    assert {id(p) for p in parts["others"]} == {
        id(model.embed.weight), id(model.up.bias), id(model.norm.bias), id(model.down.bias)
    }  # fmt: skip
    assert {g["name"]: g["weight_decay"] for g in groups} == {"weights": 0.1, "scales": 0.0, "others": 0.0}
    assert {g["lr"] for g in groups if g["name"] != "scales"} == {1e-3}
    torch.optim.AdamW(groups)


def test_the_default_rate_is_a_tenth_relative_to_the_weights():
    torch.manual_seed(0)
    model = quantize_model(Net(), {"up": QuantConfig(bits=4), "down": QuantConfig(bits=8)})
    rates = {id(p): g["lr"] for g in param_groups(model, lr=1e-3) for p in g["params"]}
    for layer in (model.up, model.down):
        rms = layer.weight.square().mean().sqrt()
        assert rates[id(layer.scale)] == pytest.approx((0.1 * 1e-3 * layer.scale.mean() / rms).item(), rel=1e-5)
    assert rates[id(model.down.scale)] < rates[id(model.up.scale)] / 8


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_scales_survive_adamw(bits):
    """Under one learning rate for everything rows die; in these groups none does."""
    torch.manual_seed(0)
    full = nn.Sequential(nn.Linear(256, 256), nn.GELU(), nn.Linear(256, 8))
    x = torch.randn(128, 256)
    with torch.no_grad():
        y = full(x)

    def dead(groups):
        model = quantize_model(copy.deepcopy(full), QuantConfig(bits=bits))
        optimizer = torch.optim.AdamW(groups(model), lr=1e-3)
        for _ in range(60):
            optimizer.zero_grad()
            F.mse_loss(model(x), y).backward()
            optimizer.step()
        return sum(scales_at_floor(model).values())

    assert dead(lambda model: param_groups(model, lr=1e-3)) == 0
    if bits > 2:
        assert dead(lambda model: model.parameters()) > 0


def test_scales_per_group_are_matrices_and_no_matrix_rule_takes_them():
    model = quantize_model(Net(), QuantConfig(bits=4, group_size=32))
    assert model.up.scale.ndim == 2
    groups = param_groups(model, lr=1e-3)
    muon = torch.optim.Muon([g for g in groups if g["name"] == "weights"])
    assert [id(p) for g in muon.param_groups for p in g["params"]] == [id(model.up.weight), id(model.down.weight)]


def test_shared_scales_are_given_once():
    model = nn.ModuleDict({"a": nn.Linear(8, 8), "b": nn.Linear(8, 8)})
    model["b"].weight = model["a"].weight
    quantize_model(model, QuantConfig(bits=2))
    scales = named(param_groups(model, lr=1e-3))["scales"]
    assert len(scales) == 1
    assert scales[0] is model["a"].scale


def test_activation_scales():
    torch.manual_seed(0)
    model = quantize_model(Net(), QuantConfig(bits=4, act_bits=8, act_scheme="lsq+"))
    with pytest.raises(ValueError, match=r"scale_lr is None.*activation scale of up.*calibrate"):
        param_groups(model, lr=1e-3)
    given = named(param_groups(model, lr=1e-3, scale_lr=1e-5))["scales"]
    assert len(given) == 6
    calibrate(model, torch.randn(16, 64))
    groups = param_groups(model, lr=1e-3)
    rates = {id(p): g["lr"] for g in groups for p in g["params"]}
    rms = sorted(layer.weight.square().mean().sqrt().item() for layer in quantized_modules(model).values())
    relative = 0.1 * 1e-3 / (sum(rms) / 2)
    acts = [layer.act.scale.item() for layer in quantized_modules(model).values()]
    assert rates[id(model.up.act.scale)] == pytest.approx(relative * sum(acts) / 2, rel=1e-5)
    assert rates[id(model.up.act.zero_point)] == pytest.approx(relative, rel=1e-5)


def test_scales_of_outputs_have_a_rate_of_their_own():
    torch.manual_seed(0)
    model = quantize_model(Net(), QuantConfig(bits=4, act_bits=8, act_scheme="lsq", out_bits=8))
    calibrate(model, torch.randn(16, 64))
    layers = quantized_modules(model).values()
    rates = {id(p): g["lr"] for g in param_groups(model, lr=1e-3) if g["name"] == "scales" for p in g["params"]}
    assert len(rates) == 3 * len(layers)
    inputs, outputs = (sum(getattr(m, n).scale.item() for m in layers) / 2 for n in ("act", "out_act"))
    assert inputs != pytest.approx(outputs, rel=1e-2)
    ratio = rates[id(model.up.out_act.scale)] / rates[id(model.up.act.scale)]
    assert ratio == pytest.approx(outputs / inputs, rel=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lr": -1.0}, "lr is -1.0, must be a finite number"),
        ({"lr": True}, "lr is True"),
        ({"lr": 1e-3, "scale_lr": math.nan}, "scale_lr is nan, .* or None"),
        ({"lr": 1e-3, "weight_decay": None}, "weight_decay is None"),
    ],
)
def test_bad_rates(arguments, message):
    model = quantize_model(Net(), QuantConfig(bits=2))
    with pytest.raises(ValueError, match=message):
        param_groups(model, **arguments)


def test_a_model_that_is_not_quantized_is_refused():
    with pytest.raises(ValueError, match="call quantize_model first"):
        param_groups(Net(), lr=1e-3)


def test_a_model_on_meta_needs_a_rate():
    with torch.device("meta"):
        model = quantize_model(Net(), QuantConfig(bits=2))
    with pytest.raises(ValueError, match=r"weight of up is on meta.*give scale_lr"):
        param_groups(model, lr=1e-3)
    assert param_groups(model, lr=1e-3, scale_lr=1e-5)


def test_scales_at_the_floor_are_counted():
    torch.manual_seed(0)
    model = quantize_model(nn.Sequential(nn.Linear(32, 8), nn.Linear(8, 4)), QuantConfig(bits=4, group_size=8))
    assert scales_at_floor(model) == {}
    with torch.no_grad():
        model[0].scale[2, 1] = -0.5
        model[0].scale[3, 0] = qk.grids.MIN_SCALE
        model[0].weight[4, :8] = 0  # a group of zeros has the smallest scale, and loses nothing by it
        model[0].scale[4, 0] = qk.grids.MIN_SCALE
    assert scales_at_floor(model) == {"0": 2}


# A process warns of scales at the floor once, so each of these programs is a process.
_OWN_LOOP = """
import warnings
import torch
from qatkernels import QuantConfig, quantize_model

warnings.simplefilter("always")
model = quantize_model(torch.nn.Sequential(torch.nn.Linear(32, 8)), QuantConfig(bits=8))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)  # the same rate for scales
for _ in range(5):
    optimizer.zero_grad()
    model(torch.randn(4, 32)).square().mean().backward()
    optimizer.step()
for _ in range(2):
    model.eval()
    model.train()
"""
_LEARNED_ACTIVATIONS = """
import sys
import torch
from qatkernels import QuantConfig, quantize_model
from qatkernels.nn import calibrate

config = QuantConfig(bits=4, **eval(sys.argv[2]))
model = quantize_model(torch.nn.Sequential(torch.nn.Linear(8, 4)), config)
calibrate(model, torch.randn(3, 8))
with torch.no_grad():
    getattr(model[0], sys.argv[1]).scale.fill_(-1.0)
model.eval()
"""


@pytest.mark.parametrize(
    ("program", "arguments", "message"),
    [
        (_OWN_LOOP, (), "of 8 scales have fallen to the smallest value.*take qatkernels.param_groups"),
        (
            _LEARNED_ACTIVATIONS,
            ("act", "{'act_bits': 8, 'act_scheme': 'lsq'}"),
            "1 of 5 scales have fallen to the smallest value",
        ),
        (
            _LEARNED_ACTIVATIONS,
            ("act", "{'act_bits': 8, 'act_scheme': 'lsq+'}"),
            "1 of 5 scales have fallen to the smallest value",
        ),
        (_LEARNED_ACTIVATIONS, ("out_act", "{'out_bits': 8}"), "1 of 5 scales have fallen to the smallest value"),
    ],
    ids=["own loop", "lsq", "lsq+", "output"],
)
def test_scales_at_the_floor_are_warned_of_once(program, arguments, message):
    run = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=True)
    assert len(re.findall(message, run.stderr)) == 1, run.stderr


@pytest.mark.parametrize(
    ("what", "act", "settings"),
    [
        ("input", "act", {"act_bits": 8, "act_scheme": "lsq"}),
        ("input", "act", {"act_bits": 8, "act_scheme": "lsq+"}),
        ("output", "out_act", {"out_bits": 8}),
    ],
    ids=["lsq", "lsq+", "output"],
)
def test_learned_scales_of_activations_at_the_floor_are_counted(what, act, settings):
    """An input that its scale reduces to nothing leaves the bias of the layer, and no error."""
    model = quantize_model(nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 4)), QuantConfig(4, **settings))
    model[0](torch.zeros(3, 8))
    assert scales_at_floor(model) == {}, "no batch has set it yet"
    calibrate(model, torch.randn(3, 8))
    stats = GridStats(model)
    assert (scales_at_floor(model), stats.at_floor()) == ({}, 0)
    with torch.no_grad():
        getattr(model[1], act).scale.fill_(-1.0)
    assert (scales_at_floor(model), stats.at_floor()) == ({f"1.{act}": 1}, 1)
    found = str(check(model, torch.randn(3, 8)))
    assert f"1 has the scale of its {what} at the floor" in found
    assert f"call layer.{act}.reset_parameters()" in found
    with torch.no_grad():
        getattr(model[1], act).scale.fill_(torch.nan)
    assert f"1 has a scale or zero point of its {what} that is not finite" in str(check(model, torch.randn(3, 8)))
