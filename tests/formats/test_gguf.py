"""Whole models as GGUF: every tensor is what was trained, and llama.cpp computes the same logits."""

import numpy as np
import pytest
import torch

import qatkernels as qk
from qatkernels.formats import UnfitError, export
from qatkernels.formats.gguf import ARCHITECTURES

gguf = pytest.importorskip("gguf")
transformers = pytest.importorskip("transformers")

SIZES = {
    "vocab_size": 259, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "initializer_range": 0.08,
}  # fmt: skip
GEMMA = {"head_dim": 64, "query_pre_attn_scalar": 64}
HEADS = {"llama": {}, "qwen2": {}, "gemma2": GEMMA, "gemma3_text": GEMMA}
BUILT = "llama.cpp takes minutes to build: pip install llama-cpp-python"
IDS = [1, *np.random.RandomState(0).randint(3, 259, 20).tolist()]


def build(kind, bits=4, group_size=32, *, scale_dtype=torch.float16, **settings):
    """Return a quantized model of two layers whose norms and biases are not what they begin as."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **SIZES, **HEADS.get(kind, {"head_dim": 64}), **settings)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for name, p in model.named_parameters():
        if "norm" in name or name.endswith("bias"):
            torch.nn.init.normal_(p, 0.0 if "gemma" in kind or name.endswith("bias") else 1.0, 0.1)
    return qk.quantize_model(model, qk.QuantConfig(bits, group_size=group_size, scale_dtype=scale_dtype))


def values(path):
    """Return the tensors of a file in float32, by the package's own reader."""
    found = {}
    for tensor in gguf.GGUFReader(path).tensors:
        shape = tuple(int(n) for n in reversed(tensor.shape))
        found[tensor.name] = gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(shape)
    return found


def pairs(weight, heads):
    """Return the rows of q or k as llama.cpp wants them: halves of each head turned into pairs."""
    return weight.reshape(heads, 2, len(weight) // heads // 2, -1).swapaxes(1, 2).reshape(weight.shape)


@pytest.mark.parametrize(("bits", "group_size"), [(4, 32), (2, None)], ids=["4 bits", "2 bits"])
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_tensors_are_what_was_trained(kind, bits, group_size, tmp_path):
    model = build(kind, bits, group_size)
    report = export(model, tmp_path / "model.gguf", to="gguf")
    assert report.exact
    assert {row.stored_as for row in report.rows} == {"Q4_0" if bits == 4 else "Q2_K"}
    assert report.nbytes == (tmp_path / "model.gguf").stat().st_size
    found, layers = values(tmp_path / "model.gguf"), qk.quantized_modules(model)
    permuted = ARCHITECTURES[kind].permuted
    for block in range(2):
        names = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "mlp.down_proj": "ffn_down"}
        for mine, theirs in names.items():
            weight = layers[f"model.layers.{block}.{mine}"].quantized_weight().detach().numpy()
            heads = {"attn_q": 4, "attn_k": 2}.get(theirs)
            weight = pairs(weight, heads) if permuted and heads else weight
            np.testing.assert_array_equal(found[f"blk.{block}.{theirs}.weight"], weight)
    offset = ARCHITECTURES[kind].norm_offset
    np.testing.assert_array_equal(found["output_norm.weight"], (model.model.norm.weight + offset).detach().numpy())
    np.testing.assert_array_equal(found["token_embd.weight"], model.model.embed_tokens.weight.detach().numpy())
    tied = model.lm_head.weight is model.model.embed_tokens.weight
    assert ("output.weight" in found) != tied


def logits(path):
    """Return llama.cpp's logits."""
    llama_cpp = pytest.importorskip("llama_cpp", reason=BUILT)
    run = llama_cpp.Llama(str(path), n_ctx=512, logits_all=True, verbose=False, n_threads=1)
    run.eval(IDS)
    return torch.from_numpy(np.array(run.scores[: len(IDS)]))


@pytest.mark.parametrize(("bits", "group_size"), [(4, 32), (2, None), (1.58, None), (8, 32)])
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_llama_cpp_computes_the_same(kind, bits, group_size, tmp_path):
    """Up to its own rounding of activations to 8 bits, which is what is left with weights in float32 too."""
    model = build(kind, bits, group_size)
    export(model, tmp_path / "model.gguf", to="gguf")
    with torch.no_grad():
        wanted = model(input_ids=torch.tensor([IDS])).logits[0]
    error = (logits(tmp_path / "model.gguf") - wanted).square().mean().sqrt()
    assert error < 0.06 * wanted.std(), f"{error} of {wanted.std()}"


@pytest.mark.parametrize("packed", [False, True], ids=["trained", "packed"])
def test_a_quantized_head_that_is_tied(tmp_path, packed):
    """The head becomes a tensor of its own, and the embedding stays in full precision."""
    model = transformers.AutoModelForCausalLM.from_config(build("llama", tie_word_embeddings=True).config).eval()
    qk.quantize_model(model, qk.QuantConfig(4, group_size=32, scale_dtype=torch.float16), exclude=())
    embedding, head = model.model.embed_tokens.weight.detach().clone(), model.lm_head.quantized_weight().detach()
    export(qk.pack_model(model) if packed else model, tmp_path / "model.gguf", to="gguf")
    found = values(tmp_path / "model.gguf")
    np.testing.assert_array_equal(found["token_embd.weight"], embedding.numpy())
    np.testing.assert_array_equal(found["output.weight"], head.numpy())


def test_packed_models_give_the_same_file(tmp_path):
    model = build("llama", 3, None)
    export(model, tmp_path / "trained.gguf", to="gguf")
    export(qk.pack_model(model), tmp_path / "packed.gguf", to="gguf")
    assert (tmp_path / "trained.gguf").read_bytes() == (tmp_path / "packed.gguf").read_bytes()


def test_scales_that_float16_does_not_hold(tmp_path):
    model = build("llama", scale_dtype=torch.float32)
    with pytest.raises(UnfitError, match=r"(?s)model.layers.0.self_attn.q_proj .*Q4_0: .*scale_dtype=torch.float16"):
        export(model, tmp_path / "model.gguf", to="gguf")
    assert not list(tmp_path.iterdir())
    report = export(model, tmp_path / "model.gguf", to="gguf", convert=True)
    assert not report.exact
    assert max(row.error for row in report.rows) < 2**-11
    assert "off by up to" in str(report)


def test_types(tmp_path):
    model = build("llama")
    report = export(model, tmp_path / "model.gguf", to="gguf", types="Q8_0", embeddings="Q8_0")
    assert {row.stored_as for row in report.rows} == {"Q8_0"}
    kinds = {t.name: t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    assert (kinds["token_embd.weight"], kinds["output_norm.weight"]) == ("Q8_0", "F32")
    model = build("llama")
    model.model.layers[0].mlp.up_proj = torch.nn.Linear(256, 512, bias=False)  # which nobody asked to round
    export(model, tmp_path / "model.gguf", to="gguf", embeddings="Q8_0")
    plain = model.model.layers[0].mlp.up_proj.weight.detach().numpy()
    np.testing.assert_array_equal(values(tmp_path / "model.gguf")["blk.0.ffn_up.weight"], plain)
    with pytest.raises(UnfitError, match=r"q_proj \(256 x 256\): groups of 32 are not whole blocks of 256"):
        export(model, tmp_path / "model.gguf", to="gguf", types="TQ1_0")


def test_refusals(tmp_path):
    with pytest.raises(ValueError, match=r"to is 'ggml', must be one of"):
        export(build("llama"), tmp_path / "x", to="ggml")
    plain = torch.nn.Sequential(torch.nn.Linear(64, 64))
    with pytest.raises(ValueError, match="Sequential of model_type None; export to GGUF knows"):
        export(qk.quantize_model(plain, qk.QuantConfig(4)), tmp_path / "x", to="gguf")
    unquantized = transformers.AutoModelForCausalLM.from_config(build("llama").config)
    with pytest.raises(ValueError, match="no quantized layer, quantize_model makes them"):
        export(unquantized, tmp_path / "x", to="gguf")
    with pytest.raises(ValueError, match="types is 'Q9', must be None or one of"):
        export(build("llama"), tmp_path / "x", to="gguf", types="Q9")
    scaled = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}
    with pytest.raises(ValueError, match=r"rotary embedding is .*linear.*knows rope_type 'default'"):
        export(build("llama", rope_parameters=scaled), tmp_path / "x", to="gguf")
    model = build("gemma2")
    model.config.query_pre_attn_scalar = 256
    with pytest.raises(ValueError, match=r"query_pre_attn_scalar is 256, must be head_dim \(64\)"):
        export(model, tmp_path / "x", to="gguf")
    for kind, name, value, message in (
        ("llama", "hidden_act", "gelu", "activation function is 'gelu', must be 'silu'"),
        ("mistral", "sliding_window", 128, "sliding_window is 128 and max_position_embeddings 512"),
        ("gemma3_text", "final_logit_softcapping", 30.0, "final_logit_softcapping is 30.0, must be None"),
    ):
        model = build(kind)
        setattr(model.config, name, value)
        with pytest.raises(ValueError, match=message):
            export(model, tmp_path / "x", to="gguf")
    model = build("gemma3_text")
    model.config.rope_parameters["sliding_attention"]["rope_theta"] = 5e5
    with pytest.raises(ValueError, match=r"rope_theta of local attention is 500000.0, must be 10000"):
        export(model, tmp_path / "x", to="gguf")
    model = build("qwen3")
    model.config.layer_types = ["sliding_attention", "full_attention"]
    with pytest.raises(ValueError, match=r"layer_types\[0\] is 'sliding_attention', must be full"):
        export(model, tmp_path / "x", to="gguf")
    for config, message in (
        (qk.QuantConfig(4, act_bits=8), "q_proj quantizes its input, .*Train without act_bits"),
        (qk.QuantConfig(4, out_bits=8), "q_proj quantizes its output, .*Train without out_bits"),
    ):
        acts = qk.quantize_model(build("llama"), config, requantize=True)
        with pytest.raises(ValueError, match=message):
            export(acts, tmp_path / "x", to="gguf")
    assert not list(tmp_path.iterdir())


def byte_level(split):
    """Return a fast tokenizer of byte-level BPE with a few merges."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {c: i + 3 for i, c in enumerate(alphabet)} | {"th": 259, "the": 260, "in": 261}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocabulary, [("t", "h"), ("th", "e"), ("i", "n")]))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*split, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    fast.add_special_tokens({"bos_token": "<s>", "eos_token": "</s>"})
    return fast


def test_vocabulary(tmp_path):
    from tokenizers import pre_tokenizers

    fast, text = byte_level([pre_tokenizers.Digits(individual_digits=True)]), "the thin 123 päth in"
    model = build("llama")
    model.resize_token_embeddings(len(fast))
    model.config.vocab_size = len(fast)
    export(model, tmp_path / "model.gguf", to="gguf", tokenizer=fast)
    fields = gguf.GGUFReader(tmp_path / "model.gguf").fields
    assert fields["tokenizer.ggml.pre"].contents() == "smollm"
    assert fields["tokenizer.ggml.merges"].contents() == ["t h", "th e", "i n"]
    tokens = fields["tokenizer.ggml.tokens"].contents()
    assert [tokens[i] for i in fast("thein").input_ids] == ["the", "in"]
    assert fields["tokenizer.ggml.eos_token_id"].contents() == fast.eos_token_id
    # Another file's vocabulary, copied.
    export(model, tmp_path / "copy.gguf", to="gguf", tokenizer=tmp_path / "model.gguf")
    copied = gguf.GGUFReader(tmp_path / "copy.gguf").fields
    for name in (name for name in fields if name.startswith("tokenizer.")):
        assert copied[name].contents() == fields[name].contents()
    with pytest.raises(ValueError, match=r"the tokenizer splits text by \('\[Whitespace\]', '\[bytes\]'\)"):
        export(model, tmp_path / "x", to="gguf", tokenizer=byte_level([pre_tokenizers.Whitespace()]))
    llama_cpp = pytest.importorskip("llama_cpp", reason=BUILT)
    run = llama_cpp.Llama(str(tmp_path / "model.gguf"), vocab_only=True, verbose=False)
    assert run.tokenize(text.encode(), add_bos=False) == fast(text).input_ids


def test_own_format(tmp_path):
    model = qk.pack_model(build("llama", 3, None))
    report = export(model, tmp_path / "model.safetensors", to="safetensors", config={"a": 1})
    assert report.exact
    assert {row.stored_as for row in report.rows} == {"lsq, 3 bits"}
    loaded = qk.load_packed(tmp_path / "model.safetensors", lambda config: build("llama"))
    x = torch.tensor([IDS])
    assert torch.equal(loaded(input_ids=x).logits, model(input_ids=x).logits)
