"""Training by tokens and a fraction: how they become phases, and what each of them starts from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from qatkernels import cli, files
from qatkernels.plan import ExtrapolationWarning, optimal_qat_fraction
from qatkernels.trainer import ConfigError, Interrupted, TrainConfig, loop, run_folder, train
from qatkernels.trainer.models import EXCLUDED
from qatkernels.trainer.phases import phases, quantized_parameters, steps_of
from tests.passes import signals_at

from .conftest import options

#: 60 steps of 4 windows of 32 bytes.
TOKENS = 60 * 4 * 32


def by_tokens(tiny: dict[str, Any], **changes: Any) -> TrainConfig:
    settings = {k: v for k, v in tiny.items() if k not in ("steps", "qat_steps")}
    settings |= {"tokens": TOKENS, "qat_fraction": 0.3, "schedule": "fused", "warmup": 0.1}
    return TrainConfig(**{**settings, **changes}).resolved()


def quietly(config: TrainConfig) -> dict[str, Any]:
    return train(config, say=lambda line: None)


def test_steps_are_the_default(tiny: dict[str, Any]) -> None:
    first, second = phases(TrainConfig(**tiny).resolved())
    assert (first.name, first.steps, first.start) == ("fp", 24, None)
    assert (second.name, second.steps, second.start) == ("w2", 12, "fp")


@pytest.mark.parametrize("schedule", ["classic", "fused"])
def test_a_fraction_for_all_widths(tiny: dict[str, Any], schedule: str) -> None:
    found = {p.name: p for p in phases(by_tokens(tiny, bits=(4, 1), schedule=schedule))}
    start = {"classic": "cooled42", "fused": "fp42"}[schedule]
    assert list(found) == (["fp34", "cooled42"] if schedule == "classic" else ["fp42"]) + ["w4", "w1"]
    for name in ("w4", "w1"):
        assert (found[name].start, found[name].first, found[name].steps) == (start, 42, 18)
        assert found[name].rate(0) == pytest.approx(1.0)
    last = found[start].rate(found[start].steps - 1)
    assert last == 1 if schedule == "fused" else last < 0.1


@pytest.mark.parametrize("schedule", ["classic", "fused"])
def test_auto_is_the_planners_fraction(tiny: dict[str, Any], schedule: str) -> None:
    tokens = 40 * TOKENS
    config = by_tokens(tiny, bits=(4, 2, 1), tokens=tokens, qat_fraction="auto", schedule=schedule, cooldown=0.1)
    with pytest.warns(ExtrapolationWarning, match="tokens is 307200, outside"):
        plan = phases(config)
    found = {p.name: p for p in plan}
    for bits in (4, 2, 1):
        with pytest.warns(ExtrapolationWarning):
            share = optimal_qat_fraction(quantized_parameters(config), tokens, bits)
        with pytest.warns(ExtrapolationWarning):
            assert steps_of(config, bits) == (2400 - round(2400 * share), round(2400 * share))
        last = found[f"w{bits}"]
        assert last.first + last.steps == 2400
        seen, phase = 0, last  # every byte of the budget belongs to exactly one phase of the chain
        while phase.start is not None:
            seen, phase = seen + phase.steps, found[phase.start]
        assert seen + phase.steps == 2400
        assert sum(p.start == last.start for p in plan if p.bits) == 1
    done: set[str | None] = {None}
    for phase in plan:
        assert phase.start in done, "a phase runs before what it starts from"
        done.add(phase.name)


def test_quantized_parameters(tiny: dict[str, Any]) -> None:
    assert quantized_parameters(by_tokens(tiny)) == quietly(TrainConfig(**tiny))["quantized_parameters"]


@pytest.mark.parametrize("schedule", ["classic", "fused"])
def test_each_phase_starts_from_the_right_checkpoint(tiny: dict[str, Any], schedule: str) -> None:
    """The loss of round-to-nearest is that of the checkpoint in question, quantized by hand."""
    from qatkernels.nn import QuantConfig, quantize_model
    from qatkernels.trainer import data
    from qatkernels.trainer.demo_model import Transformer

    config = by_tokens(tiny, schedule=schedule)
    report = quietly(config)
    windows = data.load(config.data, config.shape.context).evaluation(
        config.evaluation.eval_windows, config.shape.context
    )
    rounded = {}
    for name in ("fp42",) if schedule == "fused" else ("fp34", "cooled42"):
        model = Transformer(config.shape)
        model.load_state_dict(files.load(Path(config.out) / name / "model.safetensors")[0])
        rounded[name] = loop.evaluate(quantize_model(model, QuantConfig(2), exclude=EXCLUDED), windows, config)
    start = "fp42" if schedule == "fused" else "cooled42"
    assert report["rows"][0]["round_to_nearest"] == rounded.pop(start)
    assert report["rows"][0]["round_to_nearest"] not in rounded.values()
    assert report["rows"][0]["first"] == 42
    assert report["starts"]["w2"] == [start, 42]


#: A model for which these few tokens are many: the planner asks for 9 of 60 steps at 4 bits, and for 15 at 1 bit.
SMALL = {"width": 4, "heads": 1, "qat_fraction": "auto"}


@pytest.mark.filterwarnings("ignore::qatkernels.plan.ExtrapolationWarning")
@pytest.mark.parametrize("schedule", ["classic", "fused"])
def test_parts_that_go_on_are_one_training(tiny: dict[str, Any], tmp_path: Path, schedule: str) -> None:
    """A constant rate trained in two parts, for two widths, gives the bits of one part that is as long."""
    config = by_tokens(tiny, bits=(4, 1), schedule=schedule, **SMALL)
    first, second, *_ = plan = phases(config)
    assert second.takes_optimizer
    assert second.first == first.steps
    quietly(config)
    assert {p.name for p in plan} == {p.name for p in Path(config.out).iterdir() if p.is_dir()}
    whole = by_tokens(tiny, bits=(4,), schedule=schedule, out=str(tmp_path / "whole"), **SMALL)
    quietly(whole)
    for name in (second.name, "w4"):
        parts, one = (files.load(Path(out) / name / "model.safetensors")[0] for out in (config.out, whole.out))
        assert parts.keys() == one.keys()
        assert all(torch.equal(parts[key], one[key]) for key in one), name


@pytest.mark.filterwarnings("ignore::qatkernels.plan.ExtrapolationWarning")
@pytest.mark.parametrize("stop", [21, 48])
def test_a_width_added_within_a_part(tiny: dict[str, Any], tmp_path: Path, stop: int) -> None:
    """A checkpoint of a part that now starts later is not taken for one of the shorter part."""
    more = by_tokens(tiny, bits=(4, 1), **SMALL)
    with signals_at(stop) as passes:
        with pytest.raises(Interrupted):
            quietly(by_tokens(tiny, bits=(4,), **SMALL))
        quietly(more)
    assert [p.name for p in phases(more) if p.bits is None] == ["fp45", "fp51"]
    assert passes.count == stop + sum(p.steps for p in phases(more))
    whole = by_tokens(tiny, bits=(4, 1), out=str(tmp_path / "whole"), **SMALL)
    assert quietly(whole)["rows"][0]["qat"] == train(more, say=lambda line: None)["rows"][0]["qat"]


def test_restart_removes_every_phase(tiny: dict[str, Any]) -> None:
    config = by_tokens(tiny, schedule="classic")
    quietly(config)
    run_folder.remove_run(Path(config.out))
    assert not list(Path(config.out).glob("*/*"))


def test_by_tokens_on_the_command_line(tiny: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    settings = {k: v for k, v in tiny.items() if k not in ("steps", "qat_steps")}
    arguments = [*options(settings), "--tokens", "7.68k", "--qat-fraction", "0.25", "--schedule", "fused"]
    assert cli.main(["train", *arguments]) == 0
    assert "constant learning rate" in capsys.readouterr().out
    assert cli.main(["train", "--resume", "--out", tiny["out"]]) == 0
    stored = files.read_json(Path(tiny["out"]) / "run.json")
    assert (stored["tokens"], stored["qat_fraction"], stored["schedule"]) == (7680, 0.25, "fused")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": None}, "--qat-fraction is 0.3, a fraction of --tokens"),
        ({"tokens": 0}, "--tokens is 0, must be at least 1"),
        ({"schedule": "cosine"}, "must be classic or fused with --tokens"),
        ({"schedule": "fast"}, "--schedule is 'fast', must be one of auto, cosine, wsd, classic, fused"),
        ({"decay": "square"}, "--decay is 'square'"),
        ({"qat_fraction": 1.0}, r"--qat-fraction is 1.0, must be auto or in \(0, 1\)"),
        ({"qat_fraction": "all"}, "--qat-fraction is 'all', must be auto or a number"),
        ({"cooldown": 2.0}, r"--cooldown is 2.0, must be in \[0, 1\]"),
    ],
)
def test_bad_settings(tiny: dict[str, Any], changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        by_tokens(tiny, **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": 100}, "--tokens 100 at 2 bits: steps is 1, must be at least 2"),
        ({"qat_fraction": "auto", "tokens": 1280}, "--tokens 1280 at 2 bits: S = "),
        ({"qat_fraction": 0.95}, r"leaves 3 steps in full precision, fewer than the warmup \(6\)"),
    ],
)
def test_what_does_not_fit(tiny: dict[str, Any], changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        phases(by_tokens(tiny, **changes))
