"""Models that a run starts from: those of earlier runs and of transformers, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from qatkernels import cli, files, load_packed, quantized_modules
from qatkernels.testing.compare import assert_same_bits
from qatkernels.trainer import CheckpointError, ConfigError, TrainConfig, data, loop, models
from tests.passes import MachineGone, gone_at

from .conftest import options, outcome, run, trained

transformers = pytest.importorskip("transformers")


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
