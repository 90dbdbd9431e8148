"""Folders of transformers that the commands write, and those that they read."""

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
from qatkernels import cli, load_packed, quantized_modules
from qatkernels.testing.compare import assert_same_bits
from qatkernels.trainer import CheckpointError, generate, models, spectra

from .conftest import run, trained

transformers = pytest.importorskip("transformers")

import qatkernels.integrations.transformers  # noqa: E402  from_pretrained reads quantized models


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
