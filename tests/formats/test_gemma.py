"""Folders in the format that transformers calls gemma: it loads them, with equal weights and equal logits."""

import json

import pytest
import torch

import qatkernels as qk
from qatkernels.formats import UnfitError, export
from qatkernels.nn.activation import ACTS, learned_acts
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


#: What is quantized beside the weights, and how the report says so.
STATIC = {
    "inputs": ({"act_bits": 8, "act_scheme": "lsq"}, ", int8 inputs"),
    "outputs": ({"out_bits": 8}, ", int8 outputs"),
    "both": ({"act_bits": 8, "act_scheme": "lsq", "out_bits": 8}, ", int8 inputs, int8 outputs"),
}


@pytest.mark.parametrize("packs", [False, True], ids=["trained", "packed"])
@pytest.mark.parametrize("kind", ["llama", "qwen2"])  # qwen2 has biases, which outputs are quantized after
@pytest.mark.parametrize("what", STATIC)
def test_static_activations(what, kind, packs, tmp_path):
    """One learned scale of int8 inputs, and one of outputs: the same integers, so the same logits."""
    settings, described = STATIC[what]
    model = build(kind, qk.QuantConfig(2, "lsq", **settings))
    qk.nn.calibrate(model, IDS)
    scales = {}
    with torch.no_grad():
        for name, layer in qk.quantized_modules(model).items():
            for act in learned_acts(layer).values():
                act.scale.mul_(0.1)  # so that some are clamped
            scales[name] = [getattr(layer, act) and getattr(layer, act).scale.item() for act in ACTS]
    x = torch.randn(5, 64)
    expected, of_one = logits(model), model.model.layers[0].self_attn.q_proj(x).detach()
    report = export(qk.pack_model(model) if packs else model, tmp_path / "out", to="gemma")
    assert {row.stored_as for row in report.rows} == {"int2, rows" + described}
    loaded = load(tmp_path / "out")
    for name, wanted in scales.items():
        layer = loaded.get_submodule(name)
        assert [layer.input_activation_scale, layer.output_activation_scale] == [scale or 0 for scale in wanted]
    assert torch.equal(loaded.model.layers[0].self_attn.q_proj(x), of_one)
    torch.testing.assert_close(logits(loaded), expected, rtol=0, atol=1e-5)


REFUSED = {
    "groups": (qk.QuantConfig(4, group_size=32), "32 inputs share a scale, the format has one scale for each row"),
    "too many": (qk.QuantConfig(8, "seq"), "its integers are -255 to 255, at most 8 bits hold -128 to 127"),
    "dynamic inputs": (qk.QuantConfig(4, act_bits=8), "the format holds one learned scale of int8"),
    "narrow inputs": (qk.QuantConfig(4, act_bits=4, act_scheme="lsq"), "the format holds one learned scale of int8"),
    "narrow outputs": (qk.QuantConfig(4, out_bits=4), r"scale of int8 outputs, QuantConfig\(out_bits=8\); or train"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(case, tmp_path):
    config, message = REFUSED[case]
    model = build("llama", config)
    qk.nn.calibrate(model, IDS)
    with pytest.raises(UnfitError, match=message):
        export(model, tmp_path / "out", to="gemma")
    assert not list(tmp_path.iterdir())


def test_scales_that_no_batch_has_set_are_refused(tmp_path):
    model = build("llama", qk.QuantConfig(2, "lsq", act_bits=8, act_scheme="lsq", out_bits=8))
    q_proj = model.model.layers[0].self_attn.q_proj
    with pytest.raises(ValueError, match=r"the scale of model.layers.0.self_attn.q_proj's input has not been initial"):
        export(model, tmp_path / "out", to="gemma")
    q_proj.act.initialize(torch.randn(4, 64))
    with pytest.raises(ValueError, match=r"q_proj's output has not been initialized: call calibrate\(model, batch\)"):
        export(model, tmp_path / "out", to="gemma")
    assert not list(tmp_path.iterdir())


def test_a_model_in_bfloat16_is_off_by_integers(tmp_path):
    """transformers rounds quotients to bfloat16 before it rounds them to integers, and the report says so."""
    model = build("llama", qk.QuantConfig(2, "lsq", scale_dtype=torch.bfloat16, out_bits=8))
    qk.nn.calibrate(model, IDS)
    model = qk.pack_model(model).bfloat16()
    report = export(model, tmp_path / "out", to="gemma")
    assert "14 layers quantize activations, which transformers divides by their scale in bfloat16" in str(report)
    ours, theirs = (m.get_submodule("model.layers.0.mlp.up_proj") for m in (model, load(tmp_path / "out")))
    x = torch.randn(50, 64).bfloat16()
    off = ((ours(x).float() - theirs(x).float()) / ours.out_act.scale).abs()
    assert 0.5 < off.max() < 1.5


def test_what_the_configuration_says(tmp_path):
    export(build("llama", qk.QuantConfig(2, "lsq")), tmp_path / "out", to="gemma")
    settings = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert settings["quant_method"] == "gemma"
    assert settings["num_bits"] == 2
    assert settings["modules_to_not_convert"] == ["lm_head$"]
