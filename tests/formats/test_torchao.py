"""Folders with torchao's tensors: transformers loads them, with equal weights and equal logits."""

import pytest
import torch

import qatkernels as qk
from qatkernels.formats import UnfitError, export
from qatkernels.testing.compare import assert_same_bits
from tests.formats.tiny import build, logits

transformers = pytest.importorskip("transformers")
torchao = pytest.importorskip("torchao")

CONFIGS = {
    "2, rows": (qk.QuantConfig(2), 3),
    "lsq 2, groups": (qk.QuantConfig(2, "lsq", 32), 2),
    "1, groups": (qk.QuantConfig(1, group_size=32), 2),
    "ternary": (qk.QuantConfig(1.58), 2),
    "4, groups": (qk.QuantConfig(4, group_size=32), 4),
    "affine 4": (qk.QuantConfig(4, "affine"), 5),
    "8": (qk.QuantConfig(8), 8),
}


def load(path):
    model, info = transformers.AutoModelForCausalLM.from_pretrained(path, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


@pytest.mark.parametrize("case", CONFIGS)
def test_transformers_loads_the_same_model(case, tmp_path):
    config, bits = CONFIGS[case]
    packs = config.bits == 4
    model = build("llama", config, tie_word_embeddings=packs)
    wanted = {name: layer.quantized_weight().detach() for name, layer in qk.quantized_modules(model).items()}
    expected = logits(model)
    report = export(qk.pack_model(model) if packs else model, tmp_path / "out", to="torchao")
    assert report.exact
    assert all(row.stored_as.startswith(f"int{bits} in bytes, ") for row in report.rows)
    loaded = load(tmp_path / "out")
    for name, value in wanted.items():
        weight = loaded.get_submodule(name).weight
        assert isinstance(weight, torchao.quantization.IntxUnpackedToInt8Tensor)
        assert_same_bits(weight.dequantize(), value, name)
    assert type(loaded.lm_head.weight) is torch.nn.Parameter
    torch.testing.assert_close(logits(loaded), expected, rtol=0, atol=1e-5)


def test_mixed_widths(tmp_path):
    model = build("qwen3")
    patterns = {"mlp.*": qk.QuantConfig(2, "lsq", 32), "self_attn.*": qk.QuantConfig(8)}
    qk.quantize_model(model, patterns, exclude=("layers.1.mlp.*", "lm_head"), warn_below=0)
    expected = logits(model)
    export(model, tmp_path / "out", to="torchao")
    torch.testing.assert_close(logits(load(tmp_path / "out")), expected, rtol=0, atol=1e-5)


def test_what_is_refused(tmp_path):
    for config, message in (
        (qk.QuantConfig(8, "seq"), "its integers are -255 to 255, at most 8 bits hold -128 to 127"),
        (qk.QuantConfig(4, act_bits=8), "export to torchao takes weights alone"),
        (qk.QuantConfig(4, out_bits=8), "quantizes its output: .*takes weights alone. Train without out_bits"),
    ):
        with pytest.raises(UnfitError, match=message):
            export(build("llama", config), tmp_path / "out", to="torchao")
    assert not list(tmp_path.iterdir())
