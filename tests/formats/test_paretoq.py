"""Checkpoints of ParetoQ's released code."""

import pytest
import torch

import qatkernels as qk
from qatkernels.formats import load_paretoq
from qatkernels.testing.compare import assert_same_bits


def plain():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(24, 16), torch.nn.ReLU(), torch.nn.Linear(16, 8), torch.nn.Linear(8, 4))


def checkpoint(model, exclude=()):
    """The tensors of such a checkpoint: a clip value for each row of each quantized layer."""
    state = dict(model.state_dict())
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name not in exclude:
            rows = module.weight.abs().amax(-1, keepdim=True)
            state[f"{name}.weight_clip_val"] = rows * torch.empty_like(rows).uniform_(0.2, 0.9)
    return state


def reference(weight, clip, bits):
    """The released quantizers' forward, in their own terms."""
    if bits == 1:
        return torch.where(weight >= 0, clip, -clip)
    if bits in (1.58, 2):
        levels, shift = (1.5, 0.0) if bits == 1.58 else (2, 0.5)
        clamped = (weight / clip).clamp(-0.99, 0.99)
        return ((clamped * levels - shift).round() + shift) / levels * clip
    most = 2 ** (bits - 1)
    return (weight / clip).clamp(-most, most - 1).round() * clip


@pytest.mark.parametrize("bits", [1, 1.58, 2, 3, 4])
def test_weights_and_scales(bits):
    state = checkpoint(plain())
    if bits > 2:
        state = {k: v / (2 ** (bits - 1) - 1) if k.endswith("clip_val") else v for k, v in state.items()}
    model = qk.quantize_model(plain(), qk.QuantConfig(bits), exclude=())
    load_paretoq(model, state)
    for name, layer in qk.quantized_modules(model).items():
        weight, clip = state[f"{name}.weight"], state[f"{name}.weight_clip_val"]
        assert_same_bits(layer.weight.detach(), weight)
        torch.testing.assert_close(layer.quantized_weight(), reference(weight, clip, bits), rtol=1e-6, atol=1e-7)
    assert "0.weight_clip_val" in state, "the checkpoint is not changed"


def test_bfloat16_checkpoints():
    state = {name: value.bfloat16() for name, value in checkpoint(plain()).items()}
    model = qk.quantize_model(plain(), qk.QuantConfig(2), exclude=())
    load_paretoq(model, state)
    layer = qk.quantized_modules(model)["0"]
    assert layer.scale.dtype == torch.float32
    assert_same_bits(layer.scale.detach().reshape(-1, 1), state["0.weight_clip_val"].float())


@pytest.mark.parametrize(
    ("config", "exclude", "change", "message"),
    [
        (qk.QuantConfig(2), ("3",), None, r"the checkpoint quantizes 3, and the model does not \(1 such layers\)"),
        (qk.QuantConfig(2), (), {"0.weight_clip_val": None}, r"the model quantizes 0, and the checkpoint does not"),
        (qk.QuantConfig(2, group_size=8), ("3",), None, "quantizes 3"),
        (qk.QuantConfig(2, group_size=8), (), None, r"0 is quantized to .*groups of 8.*, must be as ParetoQ does"),
        (qk.QuantConfig(2, "lsq"), (), None, r"0 is quantized to .*, must be as ParetoQ does"),
        (qk.QuantConfig(2), (), {"0.weight_clip_val": torch.ones(1)}, r"has shape \(1,\), must be \(16, 1\)"),
    ],
)
def test_what_is_refused(config, exclude, change, message):
    model = qk.quantize_model(plain(), config, exclude=exclude)
    state = checkpoint(plain())
    for name, value in (change or {}).items():
        state.pop(name) if value is None else state.update({name: value})
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        load_paretoq(model, state)
    for name, value in model.state_dict().items():
        assert_same_bits(value, before[name], name)


def test_not_quantized():
    with pytest.raises(ValueError, match="no quantized layer"):
        load_paretoq(plain(), {})
