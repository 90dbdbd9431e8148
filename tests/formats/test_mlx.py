"""Folders for mlx-lm: MLX has the trained values within two units in the last place, and mlx-lm the same logits."""

import json

import numpy as np
import pytest
import torch

import qatkernels as qk
from qatkernels.formats import UnfitError, export
from qatkernels.formats.integers import IntegerWeight
from qatkernels.formats.mlx import Stored
from tests.formats.tiny import IDS, build, logits

pytest.importorskip("transformers")
SCHEMES = [(b, s) for s in ("lsq", "seq", "affine") for b in (2, 3, 4, 5, 6, 8)] + [(1, "paretoq"), (1.58, "paretoq")]


def quantized(bits, scheme, group_size, cols=384, scale_dtype=torch.float32):
    """Return a layer whose weights reach every code; zero points are whole."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(cols, 24, bias=False))
    config = qk.QuantConfig(bits, scheme=scheme, group_size=group_size, scale_dtype=scale_dtype)
    layer = qk.quantize_model(model, config)[0]
    with torch.no_grad():
        layer.weight.mul_(1.5)
        if layer.zero_point is not None:
            layer.zero_point.copy_(layer.zero_point.round())
    return layer


def defined(stored):
    """Return the values by MLX's definition, from the packed words."""
    packed = stored.tensors["weight"].view(torch.uint8).numpy()
    digits = np.unpackbits(packed, axis=-1, bitorder="little").reshape(len(packed), -1, stored.bits)
    q = (digits * 2 ** np.arange(stored.bits)).sum(-1).reshape(*stored.scales.shape, -1)
    scales, biases = (t.float().numpy()[..., None] for t in (stored.scales, stored.biases))
    return (q.astype(np.float32) * scales + biases).reshape(len(packed), -1)


#: Units in the last place by which a value may be off: half for the bias (nothing where it is a power of two times the
#: scale), one for the product, which may be in the next binade, and half for the sum; 0 where all three are exact.
def allowed(bits, scheme):
    if scheme == "paretoq":
        return 0
    return 1 if scheme == "lsq" else 2


def unit(weight):
    """Return one unit in the last place of the largest value of each row."""
    ends = torch.maximum(weight.low.abs(), (weight.low + weight.spacing * (weight.levels - 1)).abs())
    return np.spacing((ends * weight.steps).amax(-1, keepdim=True).numpy())


@pytest.mark.parametrize("group_size", [None, 32, 64, 128])
@pytest.mark.parametrize(("bits", "scheme"), SCHEMES)
def test_values(bits, scheme, group_size):
    layer = quantized(bits, scheme, group_size)
    weight, wanted = IntegerWeight.of(layer), layer.quantized_weight().detach().numpy()
    stored = Stored.of(weight, torch.float32, convert=False)
    assert (stored.bits, stored.group_size) == (2 if bits == 1.58 else bits, group_size or 64)
    assert (np.abs(defined(stored) - wanted) <= allowed(bits, scheme) * unit(weight)).all()
    assert stored.error(weight) == np.float32(np.abs(defined(stored) - wanted).max() / np.abs(wanted).max())
    mx = pytest.importorskip("mlx.core")
    parts = [mx.array(stored.tensors[part].numpy()) for part in ("weight", "scales", "biases")]
    kind = {"group_size": stored.group_size, "bits": stored.bits}
    found = np.array(mx.dequantize(*parts, **kind))
    np.testing.assert_array_equal(found, defined(stored))
    x = torch.randn(5, wanted.shape[1])
    product = np.array(mx.quantized_matmul(mx.array(x.numpy()), *parts, transpose=True, **kind))
    np.testing.assert_allclose(product, x.numpy() @ wanted.T, rtol=0, atol=2e-5)


@pytest.mark.parametrize(("bits", "scheme"), SCHEMES)
def test_scales_of_few_bits_are_exact(bits, scheme):
    layer = quantized(bits, scheme, 32, scale_dtype=torch.float16)
    weight = IntegerWeight.of(layer)
    stored = Stored.of(weight, torch.float32, convert=False)
    assert stored.error(weight) == 0
    np.testing.assert_array_equal(defined(stored), layer.quantized_weight().detach().numpy())


def run(path):
    """Return the logits of mlx-lm."""
    mx = pytest.importorskip("mlx.core")
    utils = pytest.importorskip("mlx_lm.utils")
    model, _ = utils.load_model(path)
    return torch.from_numpy(np.array(model(mx.array(IDS.numpy()))))


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("group_size", [None, 32], ids=["rows", "groups of 32"])
@pytest.mark.parametrize(("bits", "scheme"), [(1, "paretoq"), (2, "seq"), (3, "lsq"), (4, "affine"), (8, "lsq")])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "gemma3_text"])
def test_mlx_lm_computes_the_same(kind, bits, scheme, group_size, tied, tmp_path):
    gemma = {"num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 4}
    settings = gemma | {"query_pre_attn_scalar": 16} if kind == "gemma3_text" else {}
    config = qk.QuantConfig(bits, scheme=scheme, group_size=group_size)
    model = build(kind, config, tie_word_embeddings=tied, **settings)
    report = export(model, tmp_path / "out", to="mlx")
    assert max(row.error for row in report.rows) < 2.0**-22
    wanted = logits(model)
    assert (run(tmp_path / "out") - wanted).abs().max() < 2e-5 * wanted.abs().max()


def test_rotary_settings_reach_mlx_lm(tmp_path):
    rope = {"rope_type": "llama3", "rope_theta": 1e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope["original_max_position_embeddings"] = 4
    model = build("llama", qk.QuantConfig(4), rope_parameters=rope)
    export(model, tmp_path / "out", to="mlx")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["rope_theta"] == 1e5
    assert config["rope_scaling"]["rope_type"] == "llama3"
    wanted = logits(model)
    assert (run(tmp_path / "out") - wanted).abs().max() < 2e-5 * wanted.abs().max()


def test_overrides_and_a_quantized_head(tmp_path):
    config = {"mlp.*": qk.QuantConfig(2, scheme="lsq", group_size=32), "v_proj": None, "*": qk.QuantConfig(4)}
    model = build("llama", config, tie_word_embeddings=True)
    qk.quantize_model(model, qk.QuantConfig(8), include="lm_head", exclude=())
    report = export(qk.pack_model(model), tmp_path / "out", to="mlx")
    assert "lm_head and the embedding, which the model ties, are stored apart" in str(report)
    found = json.loads((tmp_path / "out" / "config.json").read_text())["quantization"]
    assert (found["group_size"], found["bits"]) in ((64, 4), (32, 2))
    assert found["lm_head"] == {"group_size": 64, "bits": 8}
    assert not any("v_proj" in key for key in found)
    wanted = logits(model)
    assert (run(tmp_path / "out") - wanted).abs().max() < 2e-5 * wanted.abs().max()


def test_models_in_bfloat16(tmp_path):
    model = qk.pack_model(build("llama", qk.QuantConfig(4))).bfloat16()
    with pytest.raises(UnfitError, match=r"q_proj \(64 x 64\): \d+ of 64 groups .* no bfloat16 number, and the model"):
        export(model, tmp_path / "out", to="mlx")
    report = export(model, tmp_path / "out", to="mlx", convert=True)
    assert 0 < max(row.error for row in report.rows) < 2**-6
    model = qk.pack_model(build("llama", qk.QuantConfig(4, scale_dtype=torch.bfloat16))).bfloat16()
    assert export(model, tmp_path / "exact", to="mlx").exact


def test_refusals(tmp_path):
    with pytest.raises(UnfitError, match=r"q_proj .*it has a scale for 16 elements, MLX for 32, 64 or 128"):
        export(build("llama", qk.QuantConfig(4, group_size=16)), tmp_path / "x", to="mlx")
    with pytest.raises(UnfitError, match="q_proj quantizes its input: MLX has no field for that"):
        export(build("llama", qk.QuantConfig(4, act_bits=8)), tmp_path / "x", to="mlx")
    with pytest.raises(UnfitError, match=r"q_proj quantizes its output: MLX has no field for that\. .* out_bits"):
        export(build("llama", qk.QuantConfig(4, out_bits=8)), tmp_path / "x", to="mlx")
    kinds = ["full_attention", "sliding_attention", "sliding_attention"]
    gemma = build("gemma3_text", qk.QuantConfig(4), num_hidden_layers=3, layer_types=kinds, query_pre_attn_scalar=16)
    with pytest.raises(ValueError, match=r"layer_types is .* mlx-lm takes every n-th layer to be full"):
        export(gemma, tmp_path / "x", to="mlx")
    assert not list(tmp_path.iterdir())
