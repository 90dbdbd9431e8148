"""Quantized embeddings of transformers models: training, saving, packing, exports."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

import qatkernels as qk
from qatkernels.formats import export
from qatkernels.nn import PackedEmbedding, QuantEmbedding
from qatkernels.testing.compare import assert_same_bits

transformers = pytest.importorskip("transformers")

from qatkernels.integrations.transformers import QatConfig  # noqa: E402

IDS = torch.arange(3, 15)[None]
HALF = qk.QuantConfig(2, group_size=32, scale_dtype=torch.float16)
KINDS = {
    "llama, tied": ("llama", {"tie_word_embeddings": True}),
    "llama, untied": ("llama", {"tie_word_embeddings": False}),
    "gpt2": ("gpt2", {"n_positions": 32}),
    "t5": ("t5", {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 1, "decoder_start_token_id": 0}),
}


def plain(kind, **settings):
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
        "initializer_range": 0.1, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    if kind == "llama":
        sizes |= {"intermediate_size": 64, "num_key_value_heads": 2}
    config = transformers.AutoConfig.for_model(kind, **sizes, **settings)
    auto = transformers.AutoModelForSeq2SeqLM if kind == "t5" else transformers.AutoModelForCausalLM
    return auto.from_config(config).eval()


def load(folder, model, **settings):
    return type(model).from_pretrained(folder, **settings).eval()


def run(model):
    return model(input_ids=IDS, labels=IDS)


def logits(model):
    with torch.no_grad():
        return run(model).logits


@pytest.mark.parametrize("name", KINDS)
def test_train_save_pack(name, tmp_path):
    kind, settings = KINDS[name]
    model = qk.quantize_model(plain(kind, **settings), qk.QuantConfig(2), embeddings=True)
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert isinstance(table, QuantEmbedding)
    assert table.config == qk.QuantConfig(4)
    tied = head.weight is table.weight
    assert tied == (name != "llama, untied")
    assert tied == (getattr(head, "scale", None) is table.scale)
    if kind == "gpt2":
        assert type(model.transformer.wpe) is nn.Embedding  # positions
    optimizer, losses = torch.optim.AdamW(qk.param_groups(model, lr=1e-2)), []
    model.train()
    for _ in range(20):
        optimizer.zero_grad()
        loss = run(model).loss
        loss.backward()
        assert all(p.grad is not None for p in model.parameters())  # so that DDP waits for nothing
        optimizer.step()
        losses.append(loss.item())
    model.eval()
    assert losses[-1] < losses[0] / 2
    assert qk.check(model, input_ids=IDS, labels=IDS).ok
    with torch.autocast("cpu", torch.bfloat16):
        assert logits(model).isfinite().all()
    wanted = logits(model)
    torch.testing.assert_close(logits(qk.to_plain(copy.deepcopy(model))), wanted)
    tokens = model.generate(IDS, max_new_tokens=5, do_sample=False, pad_token_id=0)
    for packed in (False, True):
        if packed:
            qk.pack_model(model)
            torch.testing.assert_close(logits(model), wanted)
            assert torch.equal(model.generate(IDS, max_new_tokens=5, do_sample=False, pad_token_id=0), tokens)
        model.save_pretrained(tmp_path / str(packed))
        loaded = load(tmp_path / str(packed), model)
        assert_same_bits(logits(loaded), logits(model))
        table, head = loaded.get_input_embeddings(), loaded.get_output_embeddings()
        assert type(table) is (PackedEmbedding if packed else QuantEmbedding)
        assert (head.weight is table.weight) == tied
        assert packed or tied == (getattr(head, "scale", None) is table.scale)
        loaded.save_pretrained(tmp_path / "again")
        assert_same_bits(logits(load(tmp_path / "again", model)), logits(model))
        if packed:
            qk.to_plain(loaded).save_pretrained(tmp_path / "plain")
            torch.testing.assert_close(logits(load(tmp_path / "plain", model)), wanted)


@pytest.mark.parametrize("embeddings", [True, qk.QuantConfig(8, group_size=8)], ids=["true", "8 bits"])
@pytest.mark.parametrize("name", ["llama, tied", "llama, untied", "gpt2"])
def test_quantized_while_it_loads(name, embeddings, tmp_path):
    kind, settings = KINDS[name]
    original = plain(kind, **settings)
    original.save_pretrained(tmp_path)
    config = QatConfig(bits=3, embeddings=embeddings)
    assert "'embeddings': " in repr(config)
    model = load(tmp_path, original, quantization_config=config)
    wanted = qk.quantize_model(original, qk.QuantConfig(3), embeddings=embeddings)
    assert qk.quantized_modules(model).keys() == qk.quantized_modules(wanted).keys()
    assert_same_bits(logits(model), logits(wanted))
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert (getattr(head, "scale", None) is table.scale) == (name != "llama, untied")


def test_a_tied_head_alone(tmp_path):
    """The embedding stays in full precision, so that nothing ties the packed head to it."""
    model = qk.quantize_model(plain("llama", tie_word_embeddings=True), qk.QuantConfig(4), exclude=())
    model = qk.pack_model(model)
    model.save_pretrained(tmp_path)
    assert_same_bits(logits(load(tmp_path, model)), logits(model))


@pytest.mark.parametrize("packed", [False, True], ids=["trained", "packed"])
def test_compiled(packed):
    model = qk.quantize_model(plain("llama", tie_word_embeddings=True), qk.QuantConfig(2), embeddings=True)
    model = qk.pack_model(model) if packed else model
    compiled = torch.compile(model, backend="aot_eager")
    torch.testing.assert_close(logits(compiled), logits(model))


def test_resized(tmp_path):
    model = qk.quantize_model(plain("llama", tie_word_embeddings=True), qk.QuantConfig(2), embeddings=True)
    model.resize_token_embeddings(80, mean_resizing=False)
    message = "its weight has 80 rows and its scales are for 64 .*: quantize_model.*embeddings=True"
    with pytest.raises(RuntimeError, match=message):
        run(model)
    with pytest.raises(ValueError, match=f"model.embed_tokens cannot be checked: {message}"):
        qk.check(model, input_ids=IDS, labels=IDS)
    qk.quantize_model(model, qk.QuantConfig(2), embeddings=True)
    assert qk.check(model, input_ids=IDS, labels=IDS).ok
    assert model.lm_head.scale is model.model.embed_tokens.scale
    model.save_pretrained(tmp_path)
    assert_same_bits(logits(load(tmp_path, model)), logits(model))


@pytest.mark.parametrize("packed", [False, True], ids=["trained", "packed"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_gguf(tied, packed, tmp_path):
    gguf = pytest.importorskip("gguf")
    model = plain("llama", tie_word_embeddings=tied)
    qk.quantize_model(model, HALF, embeddings=True)
    wanted = model.model.embed_tokens.quantized_weight().detach().numpy()
    model = qk.pack_model(model) if packed else model
    report = export(model, tmp_path / "model.gguf", to="gguf")
    assert report.exact
    assert next(row.stored_as for row in report.rows if row.name == "model.embed_tokens") == "Q4_0"
    tensors = {t.name: t for t in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    assert ("output.weight" in tensors) != tied
    found = tensors["token_embd.weight"]
    np.testing.assert_array_equal(gguf.quants.dequantize(found.data, found.tensor_type).reshape(64, 32), wanted)


@pytest.mark.parametrize("packed", [False, True], ids=["trained", "packed"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize(
    ("to", "package"), [("compressed-tensors", "compressed_tensors"), ("gemma", "transformers"), ("torchao", "torchao")]
)
def test_folders(to, package, tied, packed, tmp_path):
    """The head is stored as codes, and the embedding in full precision."""
    pytest.importorskip(package)
    model = qk.quantize_model(plain("llama", tie_word_embeddings=tied), qk.QuantConfig(4), embeddings=True)
    model = qk.pack_model(model) if packed else model
    report = export(model, tmp_path / "out", to=to)
    assert "model.embed_tokens is stored in full precision, with exactly its quantized values" in str(report)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits(loaded.eval()), logits(model))


def test_mlx_and_onnx(tmp_path):
    model = qk.quantize_model(plain("llama", tie_word_embeddings=True), HALF, embeddings=True)
    assert "model.embed_tokens is stored in full precision" in str(export(model, tmp_path / "mlx", to="mlx"))
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    report = export(model, tmp_path / "model.onnx", to="onnx")
    assert "model.embed_tokens is stored in full precision" in str(report)
    assert isinstance(model.model.embed_tokens, QuantEmbedding)
    session = runtime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    found = session.run(None, {"input_ids": IDS.numpy()})[0]
    torch.testing.assert_close(torch.from_numpy(found), logits(model), atol=1e-3, rtol=1e-3)
