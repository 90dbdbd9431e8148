"""What transformers and accelerate do with large models: files in parts, device maps, offload, models without data."""

import json

import pytest
import torch

import qatkernels as qk
from qatkernels.nn import QuantConfig, QuantLinear
from qatkernels.testing.compare import assert_same_bits

transformers = pytest.importorskip("transformers")
accelerate = pytest.importorskip("accelerate")
pytest.importorskip("qatkernels.integrations.transformers")

TOKENS = torch.tensor([[1, 2, 3, 4]])
CONFIG = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2,
}  # fmt: skip


def make(packed):
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**CONFIG))
    model = qk.quantize_model(model, QuantConfig(4, group_size=16)).eval()
    return qk.pack_model(model) if packed else model


@pytest.fixture(params=[False, True], ids=["quantized", "packed"], scope="module")
def folder(request, tmp_path_factory):
    """A folder with a model in several files, and its logits."""
    path, model = tmp_path_factory.mktemp("model"), make(request.param)
    model.save_pretrained(path, max_shard_size="20KB")
    return path, model(TOKENS).logits.detach(), request.param


def test_several_files(folder):
    path, wanted, packed = folder
    index = json.loads((path / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2
    model = transformers.AutoModelForCausalLM.from_pretrained(path)
    assert_same_bits(model(TOKENS).logits, wanted)
    kind = qk.PackedLinear if packed else QuantLinear
    assert type(model.model.layers[0].mlp.up_proj) is kind


@pytest.mark.parametrize("device_map", ["auto", {"": "cpu"}], ids=str)
def test_device_map(folder, device_map):
    path, wanted, _ = folder
    model = transformers.AutoModelForCausalLM.from_pretrained(path, device_map=device_map)
    assert not any(t.is_meta for t in model.state_dict().values())
    assert_same_bits(model(TOKENS).logits, wanted)


def test_device_map_with_layers_on_the_disk(folder, tmp_path):
    path, wanted, _ = folder
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    places |= {f"model.layers.{i}": "disk" if i else "cpu" for i in range(CONFIG["num_hidden_layers"])}
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path, device_map=places, offload_folder=tmp_path, offload_buffers=True
    )
    assert model.model.layers[0].mlp.up_proj.bias is None
    for _ in range(2):
        assert_same_bits(model(TOKENS).logits, wanted)


@pytest.mark.parametrize("packed", [False, True], ids=["quantized", "packed"])
def test_models_without_data(packed):
    """accelerate's init_empty_weights: quantize and pack without data, then take the tensors of a state dict."""
    wanted = make(packed)
    with accelerate.init_empty_weights(include_buffers=False):
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**CONFIG))
    model = qk.quantize_model(model, QuantConfig(4, group_size=16)).eval()
    model = qk.pack_model(model) if packed else model
    assert all(p.is_meta for p in model.parameters())
    model.load_state_dict(wanted.state_dict(), assign=True)
    assert_same_bits(model(TOKENS).logits, wanted(TOKENS).logits)


@pytest.mark.parametrize("packed", [False, True], ids=["quantized", "packed"])
def test_a_longer_vocabulary(packed):
    """Embedding and head stay in full precision: resizing them leaves the quantized layers as they are."""
    model = make(packed)
    before = model(TOKENS).logits
    model.resize_token_embeddings(104, mean_resizing=False)
    after = model(TOKENS).logits
    assert after.shape[-1] == 104
    torch.testing.assert_close(after[..., :96], before)
