"""The training loop in this process: what it learns, what it writes, and that it can be taken up again exactly."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from qatkernels import files
from qatkernels.options import flag, settings_of
from qatkernels.trainer import CheckpointError, ConfigError, DivergedError, Interrupted, TrainConfig, loop, train
from qatkernels.trainer.demo_model import ModelConfig, Transformer
from qatkernels.trainer.models import EXCLUDED
from tests.passes import each_pass, signals_at

from .conftest import outcome, run


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_training_helps(tiny: dict[str, Any], precision: str) -> None:
    report = run(tiny, precision=precision, bits=(4, 1), steps=60, qat_steps=30, lr=1e-2, qat_lr=5e-3)
    losses = [loss for _, loss in report["curves"]["fp"]["held_out"]]
    assert losses[0] == pytest.approx(8, abs=0.1), "an untrained model knows nothing about a byte"
    assert losses[-1] < 2
    four, one = report["rows"]
    assert four["qat"] < four["round_to_nearest"] < one["round_to_nearest"] - 0.5
    assert one["qat"] < one["round_to_nearest"] - 1


def test_report(tiny: dict[str, Any]) -> None:
    report = run(tiny, bits=(4, 1.58))
    out = Path(tiny["out"])
    assert json.loads((out / "report.json").read_text()) == json.loads(json.dumps(report))
    assert (out / "report.html").exists()
    assert report["text"]["held_out_files"] >= 1
    model = Transformer(ModelConfig(32, 1, 2, 32))
    linear = [m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"]
    weights, rows = sum(m.weight.numel() for m in linear), sum(m.out_features for m in linear)
    total = sum(p.numel() for p in model.parameters())
    assert (report["parameters"], report["quantized_parameters"]) == (total, weights)
    assert report["full_precision"]["quantized_bytes"] == 4 * weights
    assert report["full_precision"]["model_bytes"] == 4 * total
    for row, width in zip(report["rows"], (4, 2), strict=True):
        assert row["quantized_bytes"] == weights * width // 8 + 4 * rows
        assert row["model_bytes"] == row["quantized_bytes"] + 4 * (total - weights)
        assert row["tokens_per_second"] > 0
        curve = report["curves"][row["phase"]]
        assert curve["held_out"][0] == [0, row["round_to_nearest"]]
        assert curve["held_out"][-1] == [12, row["qat"]]
        assert [step for step, _ in curve["train"]] == [2, 4, 6, 8, 10, 12]


def test_checkpoints_hold_what_was_evaluated(tiny: dict[str, Any]) -> None:
    """The files of a phase are enough to rebuild its model and find the reported loss again."""
    from qatkernels.nn import QuantConfig, quantize_model
    from qatkernels.trainer import data

    report = run(tiny)
    config = TrainConfig(**tiny)
    windows = data.load(config.data, config.shape.context).evaluation(
        config.evaluation.eval_windows, config.shape.context
    )
    folder = Path(tiny["out"]) / "w2"
    described = files.read_json(folder / "phase.json")
    model = Transformer(ModelConfig(**described["model"]))
    quantization = QuantConfig.from_dict(described["quantization"])
    model = quantize_model(model, quantization, exclude=described["exclude"])
    model.load_state_dict(files.load(folder / "model.safetensors")[0])
    assert loop.evaluate(model, windows, config) == report["rows"][0]["qat"]


def test_same_seed_same_result(tiny: dict[str, Any], tmp_path: Path) -> None:
    run(tiny)
    torch.rand(3)  # the state of the global generator must not matter
    run(tiny, out=str(tmp_path / "again"))
    run(tiny, out=str(tmp_path / "other"), seed=1)
    assert outcome(tiny["out"]) == outcome(str(tmp_path / "again"))
    assert outcome(tiny["out"])["fp"] != outcome(str(tmp_path / "other"))["fp"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("stops", [(1, 9, 23), (24, 30, 36)], ids=["in-fp", "in-w2"])
def test_interrupted_and_resumed(tiny: dict[str, Any], tmp_path: Path, stops: tuple[int, ...], number: int) -> None:
    """A signal at any step of the run, counted over all its processes, leaves a run that ends the same."""
    run(tiny, out=str(tmp_path / "whole"))
    before = signal.getsignal(number)
    with signals_at(*stops, signal_number=number) as passes:  # 24 is the last step of fp, 36 of w2
        for _ in stops:
            with pytest.raises(Interrupted) as caught:
                run(tiny)
            assert caught.value.number == number
            assert signal.getsignal(number) is before
        run(tiny)
    assert passes.count == 36, "a step was taken twice"
    assert outcome(tiny["out"]) == outcome(str(tmp_path / "whole"))


def test_finished_phases_are_not_run_again(tiny: dict[str, Any]) -> None:
    first = run(tiny)
    before = outcome(tiny["out"])
    second = run(tiny, bits=(2, 1))
    assert first["rows"][0] == second["rows"][0]
    assert {k: v for k, v in outcome(tiny["out"]).items() if k in ("fp", "w2")} == {k: before[k] for k in ("fp", "w2")}
    with each_pass() as passes:
        assert run(tiny, bits=(2, 1))["rows"] == second["rows"]
    assert passes.count == 0


def test_a_lost_log_costs_only_the_curves(tiny: dict[str, Any]) -> None:
    before = run(tiny)
    (Path(tiny["out"]) / "log.jsonl").unlink()
    after = run(tiny)
    assert after["rows"] == before["rows"]
    curve = before["curves"]["w2"]["held_out"]
    assert after["curves"]["w2"] == {"train": [], "held_out": [curve[0], curve[-1]]}


def test_models_are_kept_along_the_way(tiny: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is the model that a shorter run of the same schedule would be at, also when a signal comes in between."""
    out = Path(tiny["out"])
    run(tiny, keep_every=6)
    steps = {"fp": range(0, 24, 6), "w2": range(0, 12, 6)}
    assert (tiny["steps"], tiny["qat_steps"]) == (24, 12)
    for phase, wanted in steps.items():
        kept = sorted((out / phase).glob("step-*"))
        assert [f.name for f in kept] == [f"step-{step:06d}.safetensors" for step in wanted]
        for step, file in zip(wanted, kept, strict=True):
            tensors, header = files.load(file)
            assert header["result"] == {
                "phase": phase, "bits": None if phase == "fp" else 2, "first": 0 if phase == "fp" else 24, "steps": step
            }  # fmt: skip
            finished, after = files.load(out / phase / "model.safetensors")
            assert {k: v for k, v in after.items() if k != "result"} == {
                k: v for k, v in header.items() if k != "result"
            }
            assert tensors.keys() == finished.keys()
            assert not torch.equal(tensors["blocks.0.mlp.down.weight"], finished["blocks.0.mlp.down.weight"])
    before = {path: files.digest(files.load(path)[0]) for path in out.glob("*/step-*")}
    replace_file = os.replace

    def stopping(source: Any, target: Any) -> None:
        replace_file(source, target)
        if Path(target).name.startswith("state-"):
            signal.raise_signal(signal.SIGTERM)

    train_config = TrainConfig(**{**tiny, "keep_every": 6})
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", stopping)
        with pytest.raises(Interrupted):
            train(train_config, restart=True, say=lambda line: None)
    assert 0 < len(list(out.glob("*/step-*"))) < len(before)
    train(train_config, say=lambda line: None)
    assert {path: files.digest(files.load(path)[0]) for path in out.glob("*/step-*")} == before


def test_restart(tiny: dict[str, Any]) -> None:
    run(tiny)
    before = outcome(tiny["out"])
    with pytest.raises(ConfigError, match=r"--lr is 0.5, but the run in .* was started with 0.002"):
        run(tiny, lr=0.5)
    train(TrainConfig(**{**tiny, "seed": 5}), restart=True, say=lambda line: None)
    assert outcome(tiny["out"])["fp"] != before["fp"]


def test_results_of_nobody_knows_what_are_refused(tiny: dict[str, Any]) -> None:
    """Without run.json the results could come from any model and settings. --restart deletes nothing then."""
    run(tiny)
    path = Path(tiny["out"]) / "run.json"
    path.write_text("{")
    with pytest.raises(CheckpointError, match=r"run.json is damaged .*; give another --out, or --restart"):
        run(tiny)
    path.unlink()
    before = outcome(tiny["out"])
    for settings, restart in (({}, False), ({"width": 16}, False), ({"seed": 5}, True)):
        with pytest.raises(ConfigError, match=r"holds .*fp/phase.json but no run.json"):
            train(TrainConfig(**{**tiny, **settings}), restart=restart, say=lambda line: None)
    assert outcome(tiny["out"]) == before


def test_no_checkpoint_of_weights_that_are_no_numbers(tiny: dict[str, Any]) -> None:
    """The optimizer made them of a finite gradient."""
    for settings in ({"save_every": 1}, {"keep_every": 1}, {"steps": 1}):
        with pytest.raises(DivergedError, match=r"weight is not finite after step 1 of fp.*there is no checkpoint"):
            train(TrainConfig(**{**tiny, "weight_decay": 1e300, **settings}), restart=True, say=lambda line: None)
        left = {path.name for path in Path(tiny["out"]).glob("fp/*")}
        assert left <= {"step-000000.safetensors"}
        assert "is not finite after step 1" in (Path(tiny["out"]) / "log.jsonl").read_text()


def test_other_text_is_refused(tiny: dict[str, Any], tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("a line of text\n" * 200)
    run(tiny, data=str(text))
    text.write_text("another line of text\n" * 200)
    with pytest.raises(ConfigError, match="the text of --data"):
        run(tiny, data=str(text))


def test_checkpoint_of_another_model(tiny: dict[str, Any]) -> None:
    run(tiny)
    (Path(tiny["out"]) / "fp" / "phase.json").unlink()
    state = Path(tiny["out"]) / "fp" / "state.safetensors"
    files.save(state, {"model.weight": torch.zeros(2)}, {"step": 3})
    with pytest.raises(CheckpointError, match="does not fit this model"):
        run(tiny)


def test_divergence_is_named(tiny: dict[str, Any]) -> None:
    with pytest.raises(DivergedError, match=r"the loss is .*(nan|inf) at step \d+ of fp; .*; lower --lr"):
        run(tiny, lr=1e30, clip=1e30)


def test_log_forgets_what_is_done_again(tmp_path: Path) -> None:
    from qatkernels.trainer.report import Log

    log = Log(tmp_path / "log.jsonl")
    for phase in ("fp", "w2"):
        for step in (0, 5, 10):
            log.add(phase=phase, step=step)
    with open(log.path, "a") as file:
        file.write('{"phase": "w2", "st')
    log.trim("w2", 5)
    assert [(e["phase"], e["step"]) for e in log.entries()] == [
        ("fp", 0), ("fp", 5), ("fp", 10), ("w2", 0), ("w2", 5)
    ]  # fmt: skip
    log.trim("w2", 0)
    assert [e["phase"] for e in log.entries()] == ["fp"] * 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bits": (2.5,)}, "bits is 2.5"),
        ({"bits": ()}, "--bits is"),
        ({"bits": (2, 2)}, "--bits is"),
        ({"steps": 0}, "--steps is 0, must be at least 1"),
        ({"lr": -1.0}, "--lr is -1.0, must be at least 0 and finite"),
        ({"qat_lr": float("inf")}, "--qat-lr is inf, must be at least 0 and finite"),
        ({"beta2": 1.0}, r"--beta2 is 1.0, must be in \[0, 1\)"),
        ({"clip": 0.0}, "--clip is 0.0, must be positive and finite"),
        ({"lr": float("nan")}, "--lr is nan"),
        ({"schedule": "wsd", "warmup": 0.5, "cooldown": 0.6}, "--warmup is 0.5 and --cooldown 0.6, must be at most 1"),
        ({"warmup": 1.5}, r"--warmup is 1.5, must be in \[0, 1\]"),
        ({"heads": 5}, "heads is 5"),
        ({"qat_steps": 5.5}, "--qat-steps is 5.5, must be a whole number"),
        ({"steps": "4"}, "--steps is '4', must be a whole number"),
        ({"reset_every": 2.5}, "--reset-every is 2.5, must be a whole number"),
        ({"batch": True}, "--batch is True, must be a whole number"),
        ({"seed": 1.5}, "--seed is 1.5, must be a whole number"),
        ({"clip": True}, "--clip is True, must be a number"),
        ({"lr": "1e-3"}, "--lr is '1e-3', must be a number"),
        ({"bits": 2}, "--bits is 2, must be numbers"),
        ({"bits": (True,)}, r"--bits is \(True,\), must be numbers"),
        ({"two_sided": "no"}, "--two-sided is 'no', must be true or false"),
        ({"out": Path("runs")}, r"--out is PosixPath\('runs'\), must be a string"),
        ({"qat_fraction": "half"}, "--qat-fraction is 'half', must be auto or a number"),
        ({"precision": "int8"}, "--precision is 'int8'"),
        ({"device": "tpu"}, "--device is 'tpu'"),
    ],
)
def test_bad_settings(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TrainConfig(**changes)


def test_every_field_has_a_type_that_is_checked() -> None:
    """Nothing has the type of what is neither a number nor a string; a list of widths is as good as a tuple."""
    for name in settings_of(TrainConfig):
        with pytest.raises(ConfigError, match=f"{flag(name)} is b'', must be"):
            TrainConfig(**{name: b""})
    assert TrainConfig(bits=[4, 2]) == TrainConfig(bits=(4, 2))  # type: ignore[arg-type]


def test_optimizer_groups(tiny: dict[str, Any]) -> None:
    from qatkernels.nn import QuantConfig, quantize_model

    config = TrainConfig(**tiny)
    model = quantize_model(Transformer(config.shape), QuantConfig(bits=2), exclude=EXCLUDED)
    phase = replace(loop.phases(config)[0], lr=0.25, weight_decay=0.5)
    weights, scales, rest = loop.build_optimizer(model, config, phase).param_groups
    names = {id(p): n for n, p in model.named_parameters()}
    assert {names[id(p)] for p in scales["params"]} == {n for n in names.values() if n.endswith("scale")}
    assert {names[id(p)] for p in rest["params"]} == {n for n in names.values() if "norm" in n or "embedding" in n}
    assert sum(len(g["params"]) for g in (weights, scales, rest)) == len(names)
    model.norm.register_parameter("scale", torch.nn.Parameter(torch.ones(32)))  # of no quantizer
    assert loop.build_optimizer(model, config, phase).param_groups[1]["params"] == scales["params"]
    assert [(g["peak"], g["weight_decay"]) for g in (weights, scales, rest)] == [(0.25, 0.5), (1e-4, 0), (0.25, 0)]


def test_model_is_causal_and_sees_positions() -> None:
    torch.manual_seed(0)
    model = Transformer(ModelConfig(32, 2, 2, 16)).eval()
    tokens = torch.randint(256, (1, 16))
    changed = tokens.clone()
    changed[0, 10] = (changed[0, 10] + 1) % 256
    before, after = model(tokens), model(changed)
    assert torch.equal(before[:, :10], after[:, :10])
    assert not torch.equal(before[:, 10:], after[:, 10:])
    swapped = tokens.clone()
    swapped[0, 2], swapped[0, 5] = tokens[0, 5], tokens[0, 2]
    assert not torch.allclose(model(swapped)[0, -1], before[0, -1], atol=1e-6)
    with pytest.raises(ValueError, match="17 positions, must have at most 16"):
        model(torch.zeros(1, 17, dtype=torch.long))


def test_scales_at_the_floor_are_logged_and_warned_of_once(tiny) -> None:
    config = TrainConfig(**{**tiny, "bits": (8,), "scale_lr": 0.02, "qat_steps": 6, "log_every": 1, "save_every": 2})
    said: list[str] = []
    train(config, say=said.append)
    entries = [json.loads(line) for line in (Path(config.out) / "log.jsonl").read_text().splitlines()]
    counts = [e["scales_at_floor"] for e in entries if e["phase"] == "w8" and "scales_at_floor" in e]
    assert len(counts) == 6
    assert counts[-1] > 0
    warnings = [line for line in said if "have fallen to the smallest value" in line]
    assert len(warnings) == 1
    assert "--scale-lr below 0.02" in warnings[0]
    assert sum("note" in e for e in entries) == 1
    assert all("scales_at_floor" not in e for e in entries if e["phase"] == "fp")
