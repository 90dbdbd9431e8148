"""`train --embeddings`: embeddings and tied heads train quantized, and leave in every form that a model leaves in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import qatkernels as qk
from qatkernels import cli, files, quantized_modules
from qatkernels.nn import PackedEmbedding, QuantEmbedding
from qatkernels.testing.compare import assert_same_bits
from qatkernels.trainer import ConfigError, TrainConfig, generate, models, train

transformers = pytest.importorskip("transformers")

IDS = torch.tensor([list(b"def f(x):")])


def settings(tiny: dict[str, Any], tmp_path: Path, tied: bool | None, **more: Any) -> TrainConfig:
    """Return a short run: of a model of transformers whose head is tied or not, or of the demo model (None)."""
    if tied is None:
        return TrainConfig(**{**tiny, "embeddings": 6, **more})
    config = transformers.LlamaConfig(
        vocab_size=256, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=tied,
    )  # fmt: skip
    config.save_pretrained(tmp_path / "llama")
    own = {k: v for k, v in tiny.items() if k not in ("width", "depth", "heads")}
    return TrainConfig(**{**own, "model": str(tmp_path / "llama"), "embeddings": 6, **more})


@pytest.mark.parametrize("tied", [None, False, True], ids=["demo", "untied", "tied"])
def test_trained_packed_and_read(tiny: dict[str, Any], tmp_path: Path, tied: bool | None) -> None:
    config = settings(tiny, tmp_path, tied, group_size=16, scale_dtype="float16")
    train(config, say=lambda line: None)
    folder = Path(config.out) / "w2"
    model = models.load_trained(folder).model.eval()
    layers = quantized_modules(model)
    tables = {name: layer for name, layer in layers.items() if isinstance(layer, QuantEmbedding)}
    (table,) = tables.values()
    assert table.config == config.quantized_embeddings(2)
    assert (table.config.bits, table.config.group_size, table.config.act_bits) == (6, 16, None)
    head = "lm_head"
    assert (head in layers) == bool(tied)
    if tied:
        assert layers[head].scale is table.scale
    stored = files.load(folder / "model.safetensors")[0]
    start = files.load(Path(config.out) / "fp" / "model.safetensors")[0]
    (name,) = tables
    assert not torch.equal(stored[f"{name}.weight"], start[f"{name}.weight"])
    result = models.load_trained(folder).about["result"]
    assert result["quantized_parameters"] == sum(w.numel() for w in {layer.weight for layer in layers.values()})

    packed = tmp_path / ("packed" if tied is not None else "packed.safetensors")
    generate.pack(folder, packed)
    again, _ = generate.load(packed)
    assert [type(m) for m in again.modules() if isinstance(m, torch.nn.Embedding)] == [PackedEmbedding]
    with torch.no_grad():
        wanted, found = (m(IDS).logits if tied is not None else m(IDS) for m in (model, again))
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)
    assert cli.main(["generate", str(packed), "--tokens", "3"]) == 0


def test_the_next_run_takes_its_weights(tiny: dict[str, Any], tmp_path: Path) -> None:
    """The scales of embeddings are no weights of the model in full precision."""
    config = settings(tiny, tmp_path, True)
    train(config, say=lambda line: None)
    weights = models.initial_weights(str(Path(config.out) / "w2"))
    assert weights is not None
    assert set(weights) == set(files.load(Path(config.out) / "fp" / "model.safetensors")[0])


def test_exported(tiny: dict[str, Any], tmp_path: Path) -> None:
    """GGUF holds the embedding's own codes; llama.cpp's reader gets the trained values."""
    gguf = pytest.importorskip("gguf")
    config = settings(tiny, tmp_path, True, group_size=32, scale_dtype="float16", embeddings=8)
    train(config, say=lambda line: None)
    folder = Path(config.out) / "w2"
    assert cli.main(["export", str(folder), str(tmp_path / "model.gguf"), "--to", "gguf"]) == 0
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    table = next(t for t in reader.tensors if t.name == "token_embd.weight")
    assert table.tensor_type.name == "Q8_0"
    values = torch.from_numpy(gguf.quants.dequantize(table.data, table.tensor_type)).view(256, 32)
    layer = models.load_trained(folder).model.get_input_embeddings()
    assert_same_bits(values, layer.quantized_weight().detach())


def test_refusals(tiny: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"--embeddings is 1, must be in \[2, 8\]"):
        TrainConfig(**{**tiny, "embeddings": 1})
    with pytest.raises(ConfigError, match="--embeddings"):
        TrainConfig(**{**tiny, "embeddings": 4.5})


def test_a_step_changes_their_scales(tiny: dict[str, Any], tmp_path: Path) -> None:
    config = settings(tiny, tmp_path, None, keep_every=1, qat_steps=2)
    train(config, say=lambda line: None)
    states = [files.load(Path(config.out) / "w2" / f"step-{n:06d}.safetensors")[0] for n in (0, 1)]
    assert not torch.equal(*(state["embedding.scale"] for state in states))
    assert qk.trainer.models.load_trained(Path(config.out) / "w2").about["embeddings"]["bits"] == 6
