"""Plain models of the values of quantized and packed ones."""

import copy

import pytest
import torch
from torch import nn

import qatkernels as qk
from qatkernels.testing.compare import assert_same_bits

CONFIG = qk.QuantConfig(4)


@pytest.mark.parametrize("packed", [False, True])
def test_ties_stay(packed):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8, bias=False), nn.LayerNorm(8))
    model[1].weight = model[0].weight
    model.append(model[2])
    qk.quantize_model(model, CONFIG)
    x, values = torch.randn(3, 8), model[0].quantized_weight()
    wanted = model(x)
    if packed:
        qk.pack_model(model)
    biases = [model[i].bias for i in range(3)]
    assert qk.to_plain(model) is model
    assert [type(m) for m in model] == [nn.Linear, nn.Linear, nn.Linear, nn.LayerNorm, nn.Linear]
    assert model[0].weight is model[1].weight
    assert model[4] is model[2]
    assert [model[i].bias for i in range(3)] == biases
    assert_same_bits(model[0].weight, values)
    assert model[0].weight.requires_grad is not packed
    torch.testing.assert_close(model(x), wanted)
    assert qk.quantization_report(model).quantized == 0
    with pytest.raises(ValueError, match="no quantized and no packed layer"):
        qk.to_plain(model)


def test_a_layer_alone():
    layer = qk.quantize_model(nn.Linear(8, 4), CONFIG)
    plain = qk.to_plain(layer)
    assert type(plain) is nn.Linear
    assert_same_bits(plain.weight, layer.quantized_weight())


def test_what_has_no_plain_form_changes_nothing():
    first = qk.QuantLinear(8, 8, config=CONFIG)
    for other, message in (
        (qk.QuantLinear(8, 8, config=qk.QuantConfig(4, act_bits=8)), "1 cannot be made plain: it quantizes its input"),
        (
            qk.QuantLinear(8, 8, config=qk.QuantConfig(4, act_bits=8, out_bits=8)),
            "it quantizes its input and its output, which no plain layer does",
        ),
        (qk.GroupedQuantLinear(2, 8, 8, config=CONFIG), "it is a GroupedQuantLinear that the model's own code calls"),
    ):
        for packed in (False, True):
            model = nn.Sequential(copy.deepcopy(first), copy.deepcopy(other))
            model = qk.pack_model(model) if packed else model
            before = list(model)
            with pytest.raises(ValueError, match=message.replace("Quant", "(Quant|Packed)")):
                qk.to_plain(model)
            assert list(model) == before


def test_a_head_that_was_tied_to_an_embedding(tmp_path):
    """Values of the head are not those of the embedding, which is not quantized: they cannot stay one tensor."""
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        tie_word_embeddings=True,
    )  # fmt: skip
    model = qk.quantize_model(transformers.LlamaForCausalLM(config).eval(), CONFIG, include="lm_head", exclude=())
    ids = torch.arange(10)[None]
    with torch.no_grad():
        wanted = model(input_ids=ids).logits
        qk.to_plain(model)
        torch.testing.assert_close(model(input_ids=ids).logits, wanted)
        model.save_pretrained(tmp_path)
        loaded = transformers.LlamaForCausalLM.from_pretrained(tmp_path).eval()
        torch.testing.assert_close(loaded(input_ids=ids).logits, wanted)


def test_packed_conv1d_in_a_file(tmp_path):
    """The file does not say that a layer was a Conv1D, the model that it is loaded into does."""
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=64, n_positions=32, n_embd=32, n_layer=1, n_head=4)
    model = qk.pack_model(qk.quantize_model(transformers.GPT2LMHeadModel(config), CONFIG)).eval()
    qk.save_packed(model, tmp_path / "model.safetensors")
    model = qk.load_packed(tmp_path / "model.safetensors", lambda _: transformers.GPT2LMHeadModel(config))
    ids = torch.arange(10)[None]
    with torch.no_grad():
        wanted = model(input_ids=ids).logits
        torch.testing.assert_close(qk.to_plain(model)(input_ids=ids).logits, wanted)
    assert type(model.transformer.h[0].attn.c_attn).__name__ == "Conv1D"
