"""Folders in the format that transformers calls gemma: it loads them, with equal weights and equal logits."""

import json

import pytest
import torch

import qatkernels as qk
from qatkernels.formats import UnfitError, export
from qatkernels.testing.compare import assert_same_bits
from tests.formats.tiny import IDS, build, logits

transformers = pytest.importorskip("transformers")

#: The width that holds each grid.
WIDTHS = {
    (1, "binary"): 2, (1.58, "ternary"): 2, (2, "lsq"): 2, (2, "seq"): 4, (3, "lsq"): 4, (4, "lsq"): 4, (4, "seq"): 8,
    (8, "lsq"): 8, (2, "affine"): 4, (4, "affine"): 8,
}  # fmt: skip


def load(path):
    model, info = transformers.AutoModelForCausalLM.from_pretrained(path, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


@pytest.mark.parametrize("packs", [False, True], ids=["trained", "packed"])
@pytest.mark.parametrize(("bits", "scheme"), WIDTHS)
def test_transformers_loads_the_same_model(bits, scheme, packs, tmp_path):
    model = build("llama", qk.QuantConfig(bits, scheme), tie_word_embeddings=packs)
    wanted = {name: layer.quantized_weight().detach() for name, layer in qk.quantized_modules(model).items()}
    expected = logits(model)
    report = export(qk.pack_model(model) if packs else model, tmp_path / "out", to="gemma")
    assert report.exact
    assert {row.stored_as for row in report.rows} == {f"int{WIDTHS[bits, scheme]}, rows"}
    loaded = load(tmp_path / "out")
    for name, value in wanted.items():
        assert_same_bits(loaded.get_submodule(name)._dequantize_weights(), value, name)
    assert type(loaded.lm_head) is torch.nn.Linear
    torch.testing.assert_close(logits(loaded), expected, rtol=0, atol=1e-5)


def test_mixed_widths_and_names_that_end_alike(tmp_path):
    """Layers that stay in full precision are told from those whose name ends the same way."""
    patterns = {"layers.0.*": qk.QuantConfig(2, "lsq"), "layers.1.*": qk.QuantConfig(8)}
    model = build("qwen3")
    qk.quantize_model(model, patterns, exclude=("layers.1.mlp.*", "lm_head"), warn_below=0)
    expected = logits(model)
    export(model, tmp_path / "out", to="gemma")
    loaded = load(tmp_path / "out")
    kinds = {name: type(m).__name__ for name, m in loaded.named_modules() if isinstance(m, torch.nn.Linear)}
    quantized = {name for name, kind in kinds.items() if kind == "QuantizedLinear"}
    assert quantized == set(qk.quantized_modules(model))
    torch.testing.assert_close(logits(loaded), expected, rtol=0, atol=1e-5)


def test_static_inputs(tmp_path):
    """One learned scale of int8 inputs: the same integers, so the same logits."""
    model = build("llama", qk.QuantConfig(2, "lsq", act_bits=8, act_scheme="lsq"))
    qk.nn.calibrate(model, IDS)
    expected = logits(model)
    report = export(model, tmp_path / "out", to="gemma")
    assert {row.stored_as for row in report.rows} == {"int2, rows, int8 inputs"}
    loaded = load(tmp_path / "out")
    for name, layer in qk.quantized_modules(model).items():
        assert torch.equal(loaded.get_submodule(name).input_activation_scale, layer.act.scale.reshape(()))
    torch.testing.assert_close(logits(loaded), expected, rtol=0, atol=1e-5)


REFUSED = {
    "groups": (qk.QuantConfig(4, group_size=32), "32 inputs share a scale, the format has one scale for each row"),
    "too many": (qk.QuantConfig(8, "seq"), "its integers are -255 to 255, at most 8 bits hold -128 to 127"),
    "dynamic inputs": (qk.QuantConfig(4, act_bits=8), "the format holds one learned scale of int8 inputs"),
    "narrow inputs": (
        qk.QuantConfig(4, act_bits=4, act_scheme="lsq"),
        "the format holds one learned scale of int8 inputs",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(case, tmp_path):
    config, message = REFUSED[case]
    model = build("llama", config)
    if config.act_scheme == "lsq":
        qk.nn.calibrate(model, IDS)
    with pytest.raises(UnfitError, match=message):
        export(model, tmp_path / "out", to="gemma")
    assert not list(tmp_path.iterdir())


def test_what_the_configuration_says(tmp_path):
    export(build("llama", qk.QuantConfig(2, "lsq")), tmp_path / "out", to="gemma")
    settings = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert settings["quant_method"] == "gemma"
    assert settings["num_bits"] == 2
    assert settings["modules_to_not_convert"] == ["lm_head$"]
