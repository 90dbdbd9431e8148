"""Embeddings of transformers that multiply what they look up: quantized, packed, saved, plain again, exported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import qatkernels as qk
from qatkernels.nn import PackedEmbedding, QuantConfig, QuantEmbedding
from qatkernels.testing.compare import assert_same_bits

transformers = pytest.importorskip("transformers")
bart = pytest.importorskip("transformers.models.bart.modeling_bart")
gemma3 = pytest.importorskip("transformers.models.gemma3.modeling_gemma3")
t5gemma2 = pytest.importorskip("transformers.models.t5gemma2.modeling_t5gemma2")

from qatkernels.integrations.transformers import QatConfig  # noqa: E402

IDS = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])
CLASSES = [gemma3.Gemma3TextScaledWordEmbedding, bart.BartScaledWordEmbedding]
FACTOR = 23.7  # which no 16-bit dtype holds


@pytest.mark.parametrize("made_by", CLASSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_layer(made_by: Any, dtype: torch.dtype) -> None:
    """Every form gives what the class itself gives with the quantized weight."""
    plain = made_by(12, 16, 0, FACTOR).to(dtype)
    reference = made_by(12, 16, 0, FACTOR).to(dtype)
    layer = qk.quantize_model(nn.Sequential(plain), QuantConfig(4), embeddings=True)
    assert isinstance(layer[0], QuantEmbedding)
    with torch.no_grad():
        reference.weight.copy_(layer[0].quantized_weight())
    wanted = reference(IDS)
    assert_same_bits(layer(IDS), wanted)
    assert_same_bits(torch.compile(layer, fullgraph=True, backend="eager")(IDS), wanted)
    with qk.nn.quantizer.modified([(layer[0], torch.zeros_like(layer[0].weight))]):
        assert_same_bits(layer(IDS), wanted)
    layer(IDS).sum().backward()
    once = torch.bincount(IDS.flatten(), minlength=12)[9] * FACTOR
    assert float(layer[0].weight.grad[9].max()) == pytest.approx(float(once), rel=1e-2)
    packed = qk.pack_model(qk.quantize_model(nn.Sequential(plain), QuantConfig(4), embeddings=True))
    assert isinstance(packed[0], PackedEmbedding)
    assert_same_bits(packed(IDS), wanted)
    for model in (packed, layer):
        again = qk.to_plain(model)
        assert type(again[0]) is made_by
        assert_same_bits(again(IDS), wanted)


def test_a_class_that_does_more_is_left() -> None:
    plain = t5gemma2.T5Gemma2TextScaledWordEmbedding(12, 16, 0, FACTOR)
    with pytest.warns(UserWarning, match="0: is a .*T5Gemma2TextScaledWordEmbedding, must be exactly"):
        qk.quantize_model(nn.Sequential(plain, nn.Linear(16, 8)), QuantConfig(4), embeddings=True)


def small_gemma() -> Any:
    config = transformers.Gemma3TextConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, sliding_window=16, initializer_range=0.2,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.Gemma3ForCausalLM(config).eval()


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(input_ids=IDS).logits


def test_gemma3(tmp_path: Path) -> None:
    """The model with its embedding and its tied head quantized equals the plain model of the quantized values."""
    plain = small_gemma()
    plain.save_pretrained(tmp_path / "plain")
    model = qk.quantize_model(small_gemma(), QuantConfig(4, group_size=16), embeddings=True)
    assert model.model.embed_tokens.scale is model.lm_head.scale
    reference = small_gemma()
    with torch.no_grad():
        for name, layer in qk.quantized_modules(model).items():
            reference.get_submodule(name).weight.copy_(layer.quantized_weight())
    wanted = logits(reference)
    assert_same_bits(logits(model), wanted)
    read = transformers.AutoModelForCausalLM.from_pretrained
    config = QatConfig(bits=4, group_size=16, embeddings=True)
    assert_same_bits(logits(read(tmp_path / "plain", quantization_config=config)), wanted)
    model.save_pretrained(tmp_path / "trained")
    assert_same_bits(logits(read(tmp_path / "trained")), wanted)
    packed = qk.pack_model(read(tmp_path / "trained"))
    found = logits(packed)
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)
    packed.save_pretrained(tmp_path / "packed")
    assert_same_bits(logits(read(tmp_path / "packed")), found)
    qk.save_packed(packed, tmp_path / "packed.safetensors")
    assert_same_bits(logits(qk.load_packed(tmp_path / "packed.safetensors", lambda _: small_gemma())), found)
    assert_same_bits(logits(qk.to_plain(model)), wanted)


@pytest.mark.parametrize("made_by", CLASSES)
def test_onnx(made_by: Any, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    from qatkernels.formats import export

    model = nn.Sequential(made_by(12, 32, 0, FACTOR), nn.Linear(32, 8))
    qk.quantize_model(model, QuantConfig(4, group_size=32), embeddings=True).eval()
    export(model, tmp_path / "model.onnx", to="onnx", inputs=(IDS,))
    session = runtime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: IDS.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), model(IDS).detach(), rtol=1e-4, atol=1e-4)
