"""Models that a run starts from: an earlier run's and those of transformers, with bytes or with a tokenizer."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

import qatkernels
from qatkernels import cli, files, load_packed, quantized_modules
from qatkernels.testing.compare import assert_same_bits
from qatkernels.trainer import CheckpointError, ConfigError, TrainConfig, data, generate, loop, models, spectra, train
from tests.passes import MachineGone, gone_at

from .conftest import options, outcome

transformers = pytest.importorskip("transformers")

import qatkernels.integrations.transformers  # noqa: E402  from_pretrained reads quantized models


def run(settings: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return train(TrainConfig(**{**settings, **changes}), say=lambda line: None)


def trained(folder: Path) -> dict[str, torch.Tensor]:
    return files.load(folder / "model.safetensors")[0]


@pytest.fixture
def tiny_hf(tiny: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in tiny.items() if k not in ("width", "depth", "heads")}


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    """A folder with the configuration of a tiny model, without weights."""
    config = transformers.LlamaConfig(
        vocab_size=256, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=False,
    )  # fmt: skip
    config.save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


def test_a_configuration_of_transformers(tiny_hf: dict[str, Any], llama: Path, tmp_path: Path) -> None:
    """It is trained, quantized but for its head, packed and taken up again, like the demo."""
    report = run(tiny_hf, model=str(llama), steps=40, qat_steps=30, lr=1e-2, qat_lr=5e-3)
    (row,) = report["rows"]
    assert report["curves"]["fp"]["held_out"][0][1] == pytest.approx(8, abs=0.1)
    assert row["full_precision"] < 5
    assert row["qat"] < row["round_to_nearest"]
    left = models.load_trained(Path(tiny_hf["out"]) / "w2")
    model, described = left.model, left.about
    assert isinstance(model, transformers.LlamaForCausalLM)
    assert described["exclude"] == ["lm_head"]
    names = set(quantized_modules(model))
    assert names == {n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)} - {"lm_head"}
    assert cli.main(["pack", f"{tiny_hf['out']}/w2", str(tmp_path / "packed.safetensors")]) == 0
    packed = load_packed(tmp_path / "packed.safetensors", lambda config: models.build(config["model"])).eval()
    tokens = torch.arange(20)[None]
    torch.testing.assert_close(packed(tokens).logits, model.eval()(tokens).logits, rtol=1e-4, atol=1e-5)


def assert_same_model(model: Any, wanted: Any) -> None:
    """The same tensors bit for bit; logits may differ by the order of sums: files are mapped at any address."""
    found, expected = model.state_dict(), wanted.state_dict()
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert_same_bits(value, expected[name], name)
    with torch.no_grad():
        logits = [m.eval()(torch.arange(20)[None]).logits for m in (model, wanted)]
    torch.testing.assert_close(*logits, rtol=1e-5, atol=1e-5)


def test_transformers_reads_what_train_and_pack_leave(
    tiny_hf: dict[str, Any], llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And the commands read what transformers leaves: the same logits, and the same text."""
    run(tiny_hf, model=str(llama), steps=40, lr=1e-2)
    out = Path(tiny_hf["out"])
    read = transformers.AutoModelForCausalLM.from_pretrained
    for name in ("fp", "w2"):
        assert_same_model(read(out / name), models.load_trained(out / name).model)
    assert json.loads((out / "w2" / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
    assert read(out / "w2").config.use_cache

    packed = {"folder": tmp_path / "packed", "file": tmp_path / "packed.safetensors"}
    for path in packed.values():
        assert cli.main(["pack", str(out / "w2"), str(path)]) == 0
    assert "times smaller than in float32" in capsys.readouterr().out
    assert_same_model(read(packed["folder"]), generate.load(packed["file"])[0])
    assert read(packed["folder"]).config.use_cache
    read(out / "w2").save_pretrained(tmp_path / "saved")
    assert cli.main(["pack", str(tmp_path / "saved"), str(tmp_path / "again")]) == 0
    assert_same_model(read(tmp_path / "again"), read(packed["folder"]))

    texts = {}
    for path in (out / "w2", tmp_path / "saved", *packed.values()):
        capsys.readouterr()
        assert cli.main(["generate", str(path), "--tokens", "20", "--prompt", "red is"]) == 0
        texts[path] = capsys.readouterr()
    assert len({text.out for text in texts.values()}) == 1
    assert texts[out / "w2"].out.startswith("red is")
    assert len(texts[out / "w2"].out) == len("red is") + 20 + 1
    assert texts[out / "w2"].err.startswith("20 tokens, ")
    drawn = []
    for seed in ("0", "1", "0"):
        assert cli.main(["generate", str(out / "w2"), "--temperature", "2", "--seed", seed]) == 0
        drawn.append(capsys.readouterr().out)
    assert drawn[0] == drawn[2] != drawn[1]

    assert cli.main(["pack", str(out / "fp"), str(tmp_path / "x")]) == 2
    assert "holds no quantized layer" in capsys.readouterr().err
    assert cli.main(["pack", str(out / "w2"), str(packed["folder"])]) == 2
    assert "exists already: give the name of a new folder" in capsys.readouterr().err
    assert cli.main(["check", str(packed["folder"])]) == 0


def test_training_continues_from_what_save_pretrained_wrote(
    tiny_hf: dict[str, Any], llama: Path, tmp_path: Path
) -> None:
    """From the full-precision weights of a quantized model; a packed one has none."""
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(llama))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    qatkernels.quantize_model(model, qatkernels.QuantConfig(2), warn_below=0).save_pretrained(tmp_path / "quantized")
    run(tiny_hf, model=str(tmp_path / "quantized"), steps=0)
    after = trained(Path(tiny_hf["out"]) / "fp")
    assert after.keys() == before.keys()
    for name, value in after.items():
        assert_same_bits(value, before[name], name)
    qatkernels.pack_model(model).save_pretrained(tmp_path / "packed")
    with pytest.raises(CheckpointError, match="holds a packed model, which has no weights to train"):
        run(tiny_hf, model=str(tmp_path / "packed"), steps=0, out=str(tmp_path / "other"))


SMALL = {"vocab_size": 256, "num_attention_heads": 2}
OTHERS = {
    "gpt2": {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32},
    "gpt_oss": {
        "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_local_experts": 4,
        "num_experts_per_tok": 2, "num_key_value_heads": 2, "head_dim": 16,
    },
}  # fmt: skip


@pytest.mark.parametrize("family", OTHERS)
def test_master_weights_of_layers_that_are_not_linear(tmp_path: Path, family: str) -> None:
    """GPT-2's Conv1D and stacks of experts lose what quantization added to them, and keep their weights."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(family, **SMALL | OTHERS[family])
    model = transformers.AutoModelForCausalLM.from_config(config)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    qatkernels.quantize_model(model, qatkernels.QuantConfig(4), warn_below=0).save_pretrained(tmp_path)
    tensors = models.initial_weights(str(tmp_path))
    assert tensors is not None
    assert before.keys() - tensors.keys() <= {"lm_head.weight"}, "a tied head"
    for name, value in tensors.items():
        assert_same_bits(value, before[name], name)


@pytest.mark.parametrize("name", ["tokenizer.model", "vocab.json"])
def test_a_tokenizer_in_another_file(tiny_hf: dict[str, Any], llama: Path, name: str) -> None:
    """A model must not be trained on bytes because its tokenizer is not read."""
    (llama / name).write_text("{}")
    with pytest.raises(ConfigError, match=rf"whose tokenizer is in {name}, must be in tokenizer.json"):
        run(tiny_hf, model=str(llama))


def test_folders_that_cannot_be_read(llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Weights that are missing or pickled are errors: neither random weights nor code from the file."""
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(llama))
    model.save_pretrained(tmp_path / "m")
    tensors = safetensors.torch.load_file(tmp_path / "m" / "model.safetensors")
    dropped = tensors.pop("model.layers.0.mlp.up_proj.weight")
    safetensors.torch.save_file(tensors, tmp_path / "m" / "model.safetensors", {"format": "pt"})
    assert cli.main(["generate", str(tmp_path / "m")]) == 2
    assert "model.layers.0.mlp.up_proj.weight is missing or has another shape" in capsys.readouterr().err
    (tmp_path / "m" / "model.safetensors").unlink()
    torch.save({**tensors, "model.layers.0.mlp.up_proj.weight": dropped}, tmp_path / "m" / "pytorch_model.bin")
    assert cli.main(["generate", str(tmp_path / "m")]) == 2
    assert "is not a model that transformers reads" in capsys.readouterr().err
    quantized = qatkernels.quantize_model(copy.deepcopy(model), qatkernels.QuantConfig(2), warn_below=0)
    for name, saved in (("trained", quantized), ("packed", qatkernels.pack_model(copy.deepcopy(quantized)))):
        saved.save_pretrained(tmp_path / name)
        settings = json.loads((tmp_path / name / "config.json").read_text())
        settings.pop("quantization_config")
        (tmp_path / name / "config.json").write_text(json.dumps(settings))
        assert cli.main(["generate", str(tmp_path / name)]) == 2
        assert "holds quantized layers" in capsys.readouterr().err
    model.resize_token_embeddings(300)
    model.save_pretrained(tmp_path / "large")
    assert cli.main(["generate", str(tmp_path / "large")]) == 2
    assert "has no tokenizer for the 300 tokens of its model: give --tokenizer" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["llama", "llama/config.json"])
def test_its_file_alone_is_enough(tiny_hf: dict[str, Any], llama: Path, name: str) -> None:
    config = TrainConfig(**tiny_hf, model=str(llama.parent / name)).resolved()
    assert config.described["transformers"]["hidden_size"] == 16
    assert models.initial_weights(config.model) is None


@pytest.mark.parametrize("tied", [False, True])
def test_weights_of_transformers(tiny_hf: dict[str, Any], llama: Path, tied: bool) -> None:
    """Without steps in full precision QAT starts from just these, in float32, tied or not."""
    config = transformers.AutoConfig.from_pretrained(llama)
    config.tie_word_embeddings = tied
    torch.manual_seed(5)
    model = transformers.AutoModelForCausalLM.from_config(config).bfloat16()
    model.save_pretrained(llama)
    report = run(tiny_hf, model=str(llama), steps=0)
    for name, value in trained(Path(tiny_hf["out"]) / "fp").items():
        assert_same_bits(value, model.state_dict()[name].float(), name)
    settings = TrainConfig(**{**tiny_hf, "model": str(llama), "steps": 0}).resolved()
    windows = data.load(settings.data, settings.shape.context).evaluation(
        settings.evaluation.eval_windows, settings.shape.context
    )
    assert report["full_precision"]["full_precision"] == loop.evaluate(model.float(), windows, settings)
    after = trained(Path(tiny_hf["out"]) / "w2")
    assert not torch.equal(after["model.layers.0.mlp.up_proj.weight"], model.model.layers[0].mlp.up_proj.weight)
    assert ("lm_head.weight" in after) is not tied  # a tied weight is written once
    loaded = models.load_trained(Path(tiny_hf["out"]) / "w2").model
    assert torch.equal(loaded.lm_head.weight, loaded.model.embed_tokens.weight) is tied


def write_tokenizer(folder: Path) -> None:
    """Write a tokenizer of pieces of words."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
    from tokenizers.models import BPE

    tokenizer = Tokenizer(BPE(unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=200, special_tokens=["?"], show_progress=False)
    tokenizer.train_from_iterator(["red is number 11\ngreen is number 22\nblue is number 33\n" * 9], trainer)
    tokenizer.save(str(folder / "tokenizer.json"))


def test_a_mixture_that_stores_experts_one_by_one(tiny_hf: dict[str, Any], llama: Path) -> None:
    """transformers stacks them while it loads, and training starts from these stacks."""
    config = transformers.MixtralConfig(
        vocab_size=256, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=2, max_position_embeddings=64,
    )  # fmt: skip
    model = transformers.MixtralForCausalLM(config)
    folder = llama.parent / "mixtral"
    model.save_pretrained(folder)
    stored = safetensors.torch.load_file(folder / "model.safetensors")
    if not any(".experts.0." in name for name in stored):
        pytest.skip("this transformers stores stacks")
    run(tiny_hf, model=str(folder), steps=0)
    start = trained(Path(tiny_hf["out"]) / "fp")
    assert start.keys() == model.state_dict().keys()
    for name, value in start.items():
        assert_same_bits(value, model.state_dict()[name], name)
    layers = quantized_modules(models.load_trained(Path(tiny_hf["out"]) / "w2").model)
    assert any(name.endswith("experts.down_proj") for name in layers)


def test_json_of_numbers_that_json_lacks(llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """NaN becomes null: a layer with a weight that is not finite has no ratio of scales."""
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(llama))
    qatkernels.quantize_model(model, qatkernels.QuantConfig(2))
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = math.nan
    model.save_pretrained(llama)
    capsys.readouterr()
    assert cli.main(["check", str(llama), "--json"]) == 1
    found = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    ratios = {layer["name"]: layer["scale_ratio"] for layer in found["layers"]}
    assert ratios["model.layers.0.mlp.up_proj"] is None
    assert ratios["model.layers.0.mlp.down_proj"] == pytest.approx(1, abs=0.5)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_tokenizer_beside_a_file(tiny_hf: dict[str, Any], llama: Path, tmp_path: Path, name: str) -> None:
    """--model may be a file in the folder of a model; its tokenizer is used and copied as well."""
    write_tokenizer(llama)
    if name == "model.safetensors":
        run(tiny_hf, model=str(llama), steps=2, qat_steps=2)
        llama = Path(tiny_hf["out"]) / "w2"
    out = tmp_path / "again"
    run({**tiny_hf, "out": str(out)}, model=str(llama / name), steps=2, qat_steps=2)
    assert (out / "w2" / "tokenizer.json").read_bytes() == (llama / "tokenizer.json").read_bytes()
    assert models.tokenizer(str(llama / name)) == llama / "tokenizer.json"


def test_a_tokenizer(tiny_hf: dict[str, Any], llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Losses are per byte all the same, and the text is known by its tokenizer too."""
    write_tokenizer(llama)
    report = run(tiny_hf, model=str(llama))
    corpus = data.load(tiny_hf["data"], 32, llama / "tokenizer.json")
    assert corpus.train.dtype == torch.int32
    assert 2 < corpus.bytes_per_token < 12
    assert report["text"]["held_out_bytes"] == corpus.held_out_bytes
    config = TrainConfig(**tiny_hf, model=str(llama)).resolved()
    model = models.load_trained(Path(tiny_hf["out"]) / "fp").model
    windows = corpus.evaluation(config.evaluation.eval_windows, config.shape.context)
    with torch.no_grad():
        nats = float(loop.mean_loss(model, windows, config))
    wanted = nats / math.log(2) / corpus.bytes_per_token
    assert report["full_precision"]["full_precision"] == pytest.approx(wanted, rel=1e-5)
    assert corpus.sha256 != data.load(tiny_hf["data"], 32).sha256
    assert (Path(tiny_hf["out"]) / "w2" / "tokenizer.json").read_bytes() == (llama / "tokenizer.json").read_bytes()
    capsys.readouterr()
    few = ["--tokens", "4", "--prompt", "red is"]
    assert cli.main(["generate", tiny_hf["out"] + "/w2", *few]) == 0
    own = capsys.readouterr()
    assert len(own.out) > len("red is") + 4 + 1, "a token is more than a byte"
    assert own.out.startswith("red is")
    assert own.err.startswith("4 tokens, ")
    assert cli.main(["pack", tiny_hf["out"] + "/w2", tiny_hf["out"] + "/packed"]) == 0
    assert cli.main(["pack", tiny_hf["out"] + "/w2", tiny_hf["out"] + "/packed.safetensors"]) == 0
    capsys.readouterr()
    assert cli.main(["generate", tiny_hf["out"] + "/packed", *few]) == 0
    assert capsys.readouterr().out == own.out
    assert cli.main(["generate", tiny_hf["out"] + "/packed.safetensors", *few, "--tokenizer", str(llama)]) == 0
    assert capsys.readouterr().out == own.out


@pytest.mark.parametrize("name", ["fp", "w2", "fp/model.safetensors", "fp/step-000012.safetensors"])
def test_a_model_of_an_earlier_run(tiny: dict[str, Any], tmp_path: Path, name: str) -> None:
    """Training continues from its weights (of a quantized model, the full-precision ones).

    Its shape needs no options.
    """
    run(tiny, keep_every=12)
    path = Path(tiny["out"]) / name
    later = {k: v for k, v in tiny.items() if k not in ("width", "depth", "heads")}
    later |= {"out": str(tmp_path / "later"), "model": str(path)}
    run(later, steps=0, bits=(1,), context=16)
    before = files.load(path if path.suffix else path / "model.safetensors")[0]
    after = trained(tmp_path / "later" / "fp")
    assert after.keys() == {key for key in before if not key.endswith((".scale", "._extra_state"))}
    assert all(torch.equal(after[key], before[key]) for key in after)
    described = files.read_json(tmp_path / "later" / "w1" / "phase.json")
    assert described["model"]["width"] == tiny["width"]
    assert described["model"]["context"] == 16


class Scaled(transformers.LlamaForCausalLM):
    """A causal language model with parameters that are called like ours."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.scale = torch.nn.Parameter(torch.tensor([1.5]))
        self.model.norm.zero_point = torch.nn.Parameter(torch.zeros(3))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = super().forward(*args, **kwargs)
        out.logits = out.logits * self.scale + self.model.norm.zero_point.sum()
        return out


@pytest.fixture
def scaled(llama: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(
        transformers.AutoModelForCausalLM, "from_config", lambda config, dtype: Scaled(config).to(dtype)
    )
    return llama


def test_parameters_called_scale_are_the_models_own(tiny_hf: dict[str, Any], scaled: Path, tmp_path: Path) -> None:
    """They train, are loaded by a later run, are packed, and count as parameters, unlike those of quantized layers."""
    torch.manual_seed(5)
    Scaled(transformers.AutoConfig.from_pretrained(scaled)).save_pretrained(scaled)
    report = run(tiny_hf, model=str(scaled), qat_lr=1e-2)
    folder = Path(tiny_hf["out"]) / "w2"
    before = trained(folder)
    assert before["scale"] != 1.5
    layers = [n for n, m in models.load_trained(folder).model.named_modules() if isinstance(m, torch.nn.Linear)]
    quantized = [name for name in layers if name != "lm_head"]
    ours = {f"{name}.{entry}" for name in quantized for entry in ("scale", "_extra_state")}
    weights = models.initial_weights(str(folder))
    assert weights is not None
    assert weights.keys() == before.keys() - ours
    assert ours <= before.keys()
    count = sum(t.numel() for t in weights.values())
    assert report["parameters"] == count
    assert generate.pack(folder, tmp_path / "packed.safetensors")["parameters"] == count
    packed = load_packed(tmp_path / "packed.safetensors", lambda config: models.build(config["model"]))
    assert torch.equal(packed.scale, before["scale"])
    run(tiny_hf, model=str(folder), steps=0, out=str(tmp_path / "later"))
    assert torch.equal(trained(tmp_path / "later" / "fp")["scale"], before["scale"])


def test_the_spectrum_of_a_model_of_transformers(
    tiny_hf: dict[str, Any], llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of the quantized weights, in windows as long as in training, per byte of text."""
    run(tiny_hf, model=str(llama), keep_every=12)
    out = Path(tiny_hf["out"])
    few = ["--probes", "2", "--steps", "4", "--windows", "3", "--out", str(tmp_path / "spectrum")]
    folders = [str(out / "fp"), str(out / "w2"), str(out / "fp" / "step-000012.safetensors")]
    assert cli.main(["spectrum", *folders, *few]) == 0
    report = json.loads((tmp_path / "spectrum" / "report.json").read_text())
    assert report["text"]["context"] == tiny_hf["context"]
    layers = quantized_modules(models.load_trained(out / "w2").model)
    for entry in report["checkpoints"]:
        assert entry["spectrum"]["n"] == sum(layer.weight.numel() for layer in layers.values())
        assert entry["spectrum"]["lambda_min"] < entry["spectrum"]["lambda_max"]
        assert 0 < entry["bits_per_byte"] < 9
    loaded = spectra.load(out / "fp")
    names = {name for name, p in loaded.model.named_parameters() if any(p is w for w in loaded.params)}
    assert names == {f"{name}.weight" for name in layers}

    alone = tmp_path / "alone.safetensors"
    alone.write_bytes((out / "w2" / "model.safetensors").read_bytes())
    capsys.readouterr()
    assert cli.main(["spectrum", str(alone), *few, "--data", tiny_hf["data"]]) == 2
    assert "--context is not given, and no run.json beside" in capsys.readouterr().err
    assert cli.main(["spectrum", str(alone), *few, "--data", tiny_hf["data"], "--context", "65"]) == 2
    assert "--context is 65, must be at most 64, the context of" in capsys.readouterr().err
    assert cli.main(["spectrum", str(alone), *few, "--data", tiny_hf["data"], "--context", "8"]) == 0


def test_resumed_from_a_model(tiny: dict[str, Any], tmp_path: Path) -> None:
    run(tiny)
    later = {**tiny, "model": tiny["out"] + "/fp", "method": "winq"}
    run(later, out=str(tmp_path / "whole"))
    with gone_at(18, 30):
        for _ in range(2):
            with pytest.raises(MachineGone):
                run(later, out=str(tmp_path / "part"))
    run(later, out=str(tmp_path / "part"))
    assert outcome(str(tmp_path / "part")) == outcome(str(tmp_path / "whole"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "nowhere"}, "--model is nowhere, must be demo, or hold a model: .* cannot be read: No such file"),
        ({"model": "other"}, "which is neither of|which holds neither"),
        ({"model": "llama", "context": 65}, "--context is 65, must be at most 64"),
        ({"model": "small"}, "whose vocabulary of 100 tokens is too small to read bytes"),
        ({"steps": 0}, "--steps is 0, must be at least 1"),
    ],
)
def test_what_is_refused(
    tiny_hf: dict[str, Any], llama: Path, changes: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(llama.parent)
    found = json.loads((llama / "config.json").read_text())
    for name, content in (("other", {"a": 1}), ("small", {**found, "vocab_size": 100})):
        Path(name).mkdir()
        (Path(name) / "config.json").write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=message):
        TrainConfig(**{**tiny_hf, **changes}).resolved()


def test_weights_of_another_shape_are_named(tiny_hf: dict[str, Any], llama: Path) -> None:
    config = transformers.AutoConfig.from_pretrained(llama)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(llama)
    found = json.loads((llama / "config.json").read_text())
    (llama / "config.json").write_text(json.dumps({**found, "num_hidden_layers": 2}))
    with pytest.raises(CheckpointError, match=r"does not fit the model: it has no model\.layers\.1\."):
        run(tiny_hf, model=str(llama))


def test_pickled_weights_are_not_replaced_by_new_ones(tiny_hf: dict[str, Any], llama: Path) -> None:
    with pytest.raises(ConfigError, match=r"--steps is 0, must be at least 1 with --model .*, which has no weights"):
        run(tiny_hf, model=str(llama), steps=0)
    (llama / "pytorch_model.bin").write_bytes(b"a pickle")
    with pytest.raises(ConfigError, match=r"whose weights are in pytorch_model\.bin, must be in \*\.safetensors"):
        run(tiny_hf, model=str(llama))
    assert TrainConfig(**tiny_hf, model=str(llama / "config.json")).resolved().training.steps == tiny_hf["steps"]


def test_a_tokenizer_of_another_model(tiny_hf: dict[str, Any], llama: Path) -> None:
    from tokenizers import Tokenizer, models

    words = {"?": 0, "number": 300}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="?"))
    tokenizer.pre_tokenizer = pytest.importorskip("tokenizers").pre_tokenizers.Whitespace()
    tokenizer.save(str(llama / "tokenizer.json"))
    with pytest.raises(ConfigError, match=r"makes token 300 of --data, must be below 256, the vocab_size"):
        run(tiny_hf, model=str(llama))


@pytest.mark.parametrize("content", [b"", b"\xff" * 300, b"\xff\xff\xff\xff\xff\xff\xff\x7f{}"])
def test_damaged_weights_are_named(tiny_hf: dict[str, Any], llama: Path, content: bytes) -> None:
    (llama / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"model\.safetensors is damaged"):
        run(tiny_hf, model=str(llama))


def test_runs_of_earlier_versions_go_on(tiny: dict[str, Any]) -> None:
    """Options that a stored configuration does not know have their defaults."""
    before = run(tiny)
    path = Path(tiny["out"]) / "run.json"
    stored = files.read_json(path)
    for name in ("model", "parallel", "keep_last", "method"):
        del stored[name]
    files.write_json(path, stored)
    assert run(tiny)["rows"] == before["rows"]
    files.write_json(path, stored)
    with pytest.raises(ConfigError, match=r"--method is winq, but the run in .* was started with qat"):
        run(tiny, method="winq")


def test_on_the_command_line(tiny_hf: dict[str, Any], llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", *options({**tiny_hf, "model": str(llama), "steps": 4, "qat_steps": 4})]) == 0
    assert "bits" in capsys.readouterr().out
    assert cli.main(["train", "--resume", "--out", tiny_hf["out"]]) == 0
    assert TrainConfig().settings()["model"] == "demo"
