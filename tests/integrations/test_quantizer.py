"""from_pretrained and save_pretrained of quantized and packed models."""

import copy
import json
import subprocess
import sys

import pytest
import torch

import qatkernels as qk
from qatkernels.testing.compare import assert_same_bits

transformers = pytest.importorskip("transformers")

from qatkernels.integrations.transformers import QatConfig  # noqa: E402

IDS = torch.arange(3, 15)[None]


def save_plain(folder, kind="llama"):
    torch.manual_seed(0)
    if kind == "gpt2":
        config = transformers.GPT2Config(vocab_size=64, n_positions=32, n_embd=32, n_layer=2, n_head=4)
        transformers.GPT2LMHeadModel(config).save_pretrained(folder)
        return
    sizes = {
        "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.1,
    }  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(kind, **sizes))
    model.save_pretrained(folder)


def load(folder, **settings):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **settings).eval()


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def step(model):
    """Train one step, so that scales and weights are not what they begin as."""
    model.train()
    model(input_ids=IDS, labels=IDS).loss.backward()
    torch.optim.AdamW(model.parameters(), 1e-3).step()
    return model.eval()


@pytest.fixture
def plain(tmp_path):
    save_plain(tmp_path / "plain")
    return tmp_path / "plain"


MIXED = {"*.q_proj": qk.QuantConfig(4, group_size=16, scale_dtype=torch.float16), "*.down_proj": qk.QuantConfig(1.58)}


@pytest.mark.filterwarnings("error:.*scales have fallen")
@pytest.mark.parametrize("config", [qk.QuantConfig(2), MIXED, qk.QuantConfig(4, act_bits=8)], ids=["2", "mixed", "a8"])
def test_quantized_while_it_loads(plain, config):
    model = load(plain, quantization_config=QatConfig(config))
    wanted = qk.quantize_model(load(plain), config)
    assert qk.quantized_modules(model).keys() == qk.quantized_modules(wanted).keys()
    assert_same_bits(logits(model), logits(wanted))
    assert all(p.requires_grad for p in model.parameters())


def test_settings_in_place_of_a_config(plain):
    model = load(plain, quantization_config=QatConfig(bits=3, group_size=16, exclude=["lm_head", "*.o_proj"]))
    layers = qk.quantized_modules(model)
    assert {layer.config for layer in layers.values()} == {qk.QuantConfig(3, group_size=16)}
    assert not [name for name in layers if name.endswith("o_proj")]
    with pytest.raises(ValueError, match=r"config and the settings \['bits'\] are given"):
        QatConfig(qk.QuantConfig(2), bits=2)
    with pytest.raises(ValueError, match="unknown fields"):
        QatConfig(bit=2)


def test_searched_scales(plain, tmp_path):
    """Set from the weights that were loaded, then from a batch; a saved model has its own and waits for nothing."""
    config = qk.QuantConfig(2, group_size=16, scale_init="activation")
    model = load(plain, quantization_config=QatConfig(bits=2, group_size=16, scale_init="activation"))
    wanted = qk.quantize_model(load(plain), config)
    assert_same_bits(logits(model), logits(wanted))
    rounded = logits(model)
    for each in (model, wanted):
        report = qk.nn.calibrate(each, input_ids=IDS)
        assert len(report.layers) == len(qk.quantized_modules(each))
    assert_same_bits(logits(model), logits(wanted))
    assert not torch.equal(logits(model), rounded)
    model.save_pretrained(tmp_path / "saved")
    loaded = load(tmp_path / "saved")
    assert_same_bits(logits(loaded), logits(model))
    assert not any(layer.awaits_inputs for layer in qk.quantized_modules(loaded).values())
    assert {layer.config for layer in qk.quantized_modules(loaded).values()} == {config}


ROUTES = ["from_pretrained", "quantize_model"]


@pytest.mark.parametrize("packed", [False, True], ids=["trained", "packed"])
@pytest.mark.parametrize(
    "config",
    [
        qk.QuantConfig(2),
        MIXED,
        qk.QuantConfig(4, act_bits=8, act_scheme="lsq+"),
        qk.QuantConfig(4, act_bits=8, out_bits=8),
    ],
)
@pytest.mark.parametrize("route", ROUTES)
def test_saved_models_load_with_the_same_logits(plain, tmp_path, route, config, packed):
    if route == "from_pretrained":
        model = load(plain, quantization_config=QatConfig(config))
    else:
        model = qk.quantize_model(load(plain), config)
    step(model)
    if packed:
        qk.pack_model(model)
    model.save_pretrained(tmp_path / "saved")
    loaded, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert_same_bits(logits(loaded.eval()), logits(model))
    assert [type(m) for m in loaded.modules()] == [type(m) for m in model.modules()]
    # And once more, from what was loaded.
    loaded.save_pretrained(tmp_path / "again")
    assert_same_bits(logits(load(tmp_path / "again")), logits(model))


@pytest.mark.parametrize("packed", [False, True], ids=["trained", "packed"])
def test_with_and_without_a_head(plain, tmp_path, packed):
    """A model and the one inside it load what the other saved; either may have been given to quantize_model."""
    whole = load(plain)
    qk.quantize_model(whole.model, qk.QuantConfig(2, group_size=16))
    step(whole)
    if packed:
        qk.pack_model(whole.model)
    whole.save_pretrained(tmp_path / "whole")
    loaded = load(tmp_path / "whole")
    assert_same_bits(logits(loaded), logits(whole))
    loaded.save_pretrained(tmp_path / "again")
    inner = transformers.AutoModel.from_pretrained(tmp_path / "again").eval()
    with torch.no_grad():
        wanted = whole.model(input_ids=IDS).last_hidden_state
        assert_same_bits(inner(input_ids=IDS).last_hidden_state, wanted)
        inner.save_pretrained(tmp_path / "inner")
        back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "inner").eval()
        assert_same_bits(back.model(input_ids=IDS).last_hidden_state, wanted)


@pytest.mark.parametrize("packed", [False, True], ids=["trained", "packed"])
def test_gpt2(tmp_path, packed):
    """Whose weights are stored transposed."""
    save_plain(tmp_path / "plain", "gpt2")
    model = step(load(tmp_path / "plain", quantization_config=QatConfig(bits=4)))
    assert len(qk.quantized_modules(model)) == 8
    if packed:
        qk.pack_model(model)
    model.save_pretrained(tmp_path / "saved")
    assert_same_bits(logits(load(tmp_path / "saved")), logits(model))


def test_gpt2_from_files_of_its_base_model(tmp_path):
    """As on the hub: names have no prefix, h.0.attn.c_attn, and weights are transposed all the same."""
    save_plain(tmp_path / "plain", "gpt2")
    plain = load(tmp_path / "plain")
    plain.transformer.save_pretrained(tmp_path / "base")
    model = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "base", quantization_config=QatConfig(bits=4))
    assert_same_bits(logits(model.eval()), logits(qk.quantize_model(plain, qk.QuantConfig(4))))


def test_generate(plain, tmp_path):
    model = qk.pack_model(step(load(plain, quantization_config=QatConfig(bits=2))))
    model.save_pretrained(tmp_path / "saved")
    settings = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    wanted = model.generate(IDS, **settings)
    assert torch.equal(load(tmp_path / "saved").generate(IDS, **settings), wanted)


def test_bfloat16_keeps_scales(plain, tmp_path):
    model = load(plain, quantization_config=QatConfig(bits=2), dtype=torch.bfloat16)
    layer = model.model.layers[0].mlp.up_proj
    assert (layer.weight.dtype, layer.scale.dtype) == (torch.bfloat16, torch.float32)
    model.save_pretrained(tmp_path / "saved")
    assert_same_bits(logits(load(tmp_path / "saved")), logits(model))


@pytest.mark.parametrize("packed", [False, True])
def test_trainer_saves_what_loads(plain, tmp_path, packed):
    model = load(plain, quantization_config=QatConfig(bits=2))
    args = transformers.TrainingArguments(
        tmp_path / "out", max_steps=2, use_cpu=True, report_to=[], disable_tqdm=True, save_strategy="no"
    )
    data = [{"input_ids": IDS[0], "labels": IDS[0]}] * 4
    trainer = transformers.Trainer(model=model, args=args, train_dataset=data)
    trainer.train()
    if packed:
        qk.pack_model(model)
    trainer.save_model(tmp_path / "saved")
    assert_same_bits(logits(load(tmp_path / "saved")), logits(model.eval()))


def test_a_copy_is_described_by_itself(plain):
    model = qk.quantize_model(load(plain), qk.QuantConfig(2))
    packed = qk.pack_model(copy.deepcopy(model))
    assert [g["packed"] for g in packed.config.quantization_config["recipe"]] == ["float32"]
    assert [g["packed"] for g in model.config.quantization_config["recipe"]] == [None]


def test_another_layout_is_refused(plain, tmp_path):
    model = qk.quantize_model(load(plain), qk.QuantConfig(2))
    model.save_pretrained(tmp_path / "saved")
    path = tmp_path / "saved" / "config.json"
    described = json.loads(path.read_text())
    described["quantization_config"]["recipe"][0]["config"]["bits"] = 3
    path.write_text(json.dumps(described))
    with pytest.raises(RuntimeError, match="scale is of bits=2, scheme=seq, must be of bits=3, scheme=lsq"):
        load(tmp_path / "saved")
    described["quantization_config"]["recipe"][0]["layers"] = ["nothing"]
    path.write_text(json.dumps(described))
    with pytest.raises(ValueError, match="the model has no layer 'nothing'"):
        load(tmp_path / "saved")
    described["quantization_config"]["recipe"] = [{"layers": 3}]
    path.write_text(json.dumps(described))
    with pytest.raises(ValueError, match="a group of the recipe is"):
        load(tmp_path / "saved")


def test_without_the_import_transformers_warns_by_name(plain, tmp_path):
    qk.pack_model(qk.quantize_model(load(plain), qk.QuantConfig(2))).save_pretrained(tmp_path / "saved")
    code = "import sys, transformers; transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])"
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "saved"], capture_output=True, text=True, check=False)
    assert "Unknown quantization type, got qatkernels" in done.stderr
    fixed = code.replace("transformers;", "transformers, qatkernels.integrations.transformers;")
    done = subprocess.run([sys.executable, "-c", fixed, tmp_path / "saved"], capture_output=True, text=True, check=True)
    assert "Unknown quantization" not in done.stderr
    assert "MISSING" not in done.stderr


@pytest.mark.parametrize("packed", [False, True], ids=["trained", "packed"])
def test_a_quantized_head_that_is_tied(tmp_path, packed):
    """Packed codes are the head's own; the folder says that the model ties nothing."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        tie_word_embeddings=True,
    )  # fmt: skip
    model = qk.quantize_model(transformers.LlamaForCausalLM(config).eval(), qk.QuantConfig(4), exclude=())
    if packed:
        qk.pack_model(model)
    model.save_pretrained(tmp_path / "saved")
    loaded = load(tmp_path / "saved")
    assert_same_bits(logits(loaded), logits(model))
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) is not packed
