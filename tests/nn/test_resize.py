"""transformers' resize_token_embeddings, which puts a new nn.Linear in place of the head."""

import copy

import pytest
import torch

import qatkernels as qk
from qatkernels.nn import QuantConfig, QuantLinear

transformers = pytest.importorskip("transformers")

TOKENS = torch.tensor([[1, 2, 3, 4]])


def quantized(**kwargs):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    return qk.quantize_model(transformers.LlamaForCausalLM(config), QuantConfig(4), **kwargs).eval()


def test_with_the_head_in_full_precision():
    model = quantized()
    before = model(TOKENS).logits
    model.resize_token_embeddings(48, mean_resizing=False)
    after = model(TOKENS).logits
    assert after.shape[-1] == 48
    torch.testing.assert_close(after[..., :40], before)
    assert qk.pack_model(model)(TOKENS).logits.shape[-1] == 48


def test_a_quantized_head_has_to_be_quantized_again():
    model = quantized(exclude=())
    weight = model.lm_head.weight.detach().clone()
    model.resize_token_embeddings(48, mean_resizing=False)
    assert not isinstance(model.lm_head, QuantLinear)
    qk.quantize_model(model, QuantConfig(4), include="lm_head", exclude=())
    assert isinstance(model.lm_head, QuantLinear)
    assert torch.equal(model.lm_head.weight[:40], weight)
    assert model(TOKENS).logits.shape[-1] == 48
    assert qk.check(model, TOKENS).ok


def test_a_replaced_head_is_noticed():
    whole = torch.nn.ModuleDict({"inner": copy.deepcopy(quantized(exclude=()))})
    whole["inner"].resize_token_embeddings(48, mean_resizing=False)
    cause = "lm_head was quantized, and something replaced it by a Linear in full precision"
    problems = qk.check(whole["inner"], TOKENS).problems
    assert len(problems) == 1
    assert problems[0].startswith(cause)
    assert "quantize_model(model, config, include='lm_head', exclude=())" in problems[0]
    row = next(r for r in qk.quantization_report(whole).rows if r.name == "inner.lm_head.weight")
    assert (row.status, row.reason) == (
        "full precision",
        "was quantized, and something replaced it by a plain layer since",
    )
    with pytest.warns(UserWarning, match="^inner." + cause):
        qk.pack_model(whole)


def test_a_packed_head_is_refused_by_name():
    model = qk.pack_model(quantized(exclude=()))
    with pytest.raises(AttributeError, match=r"the weight of 'lm_head' is packed codes.*Exclude 'lm_head'"):
        model.resize_token_embeddings(48, mean_resizing=False)
