"""Settings from a TOML file, and the log for TensorBoard."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from qatkernels import cli, files
from qatkernels.trainer import ConfigError, Interrupted, TrainConfig, toml, train
from tests.passes import MachineGone, gone_at, signals_at

from .conftest import options


def written(folder: Path, text: str) -> Path:
    path = folder / "run.toml"
    path.write_text(text)
    return path


def test_every_kind_of_value(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        """
        out = "runs/x"
        bits = [4, 1.58]
        tokens = "10M"
        [run]
        method = "winq"
        act-bits = 8
        [training]
        lr = 1
        qat_fraction = 0.25
        accumulate = 2
        schedule = "fused"
        [winq]
        two-sided = true
        scale-noise-std = 0
        """,
    )
    found = toml.read(path)
    assert found == {
        "out": "runs/x", "bits": (4, 1.58), "tokens": 10_000_000, "method": "winq", "act_bits": 8, "lr": 1.0,
        "qat_fraction": 0.25, "accumulate": 2, "schedule": "fused", "two_sided": True, "scale_noise_std": 0.0,
    }  # fmt: skip
    assert isinstance(found["lr"], float)
    assert TrainConfig(**found).training.tokens == 10_000_000
    assert toml.read(written(tmp_path, 'bits = 2\nqat-fraction = "auto"')) == {"bits": (2,), "qat_fraction": "auto"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("qat-rl = 1e-3", "sets 'qat-rl', .*; did you mean 'qat-lr'?"),
        ("[winq]\nresetevery = 3", "sets 'resetevery', .*; did you mean 'reset-every'?"),
        ("[trainning]\nlr = 1e-3", "sets 'trainning', .*; did you mean 'training'?"),
        ("zzz = 1", r"sets 'zzz', which is not known$|sets 'zzz', not an option$"),
        ("[winq]\nlr = 1e-3", r"sets 'lr' in \[winq\], must be in \[training\] or before any table"),
        ("lr = 1e-3\n[training]\nlr = 1e-3", "sets 'lr' twice"),
        ('lr = "fast"', "lr is 'fast', must be a number"),
        ("lr = true", "lr is True, must be a number"),
        ("steps = 1.5", "steps is 1.5, must be a whole number"),
        ("two-sided = 1", "two-sided is 1, must be true or false"),
        ("method = 1", "method is 1, must be a string"),
        ('bits = ["two"]', r"bits is \('two',\), must be numbers"),
        ('tokens = "many"', "tokens is 'many', must be a whole number"),
        ("reset-every = 2.5", "reset-every is 2.5, must be a whole number"),
        ("act-bits = [8]", r"act-bits is \[8\], must be a whole number"),
        ("lr = ", "is not TOML"),
        ("lr = " + "[" * 5000, "is not TOML"),
        ("[[run]]\nbits = 2", r"has \[\[run\]\], must be one table, \[run\]"),
    ],
)
def test_what_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        toml.read(written(tmp_path, text))


@pytest.mark.parametrize("name", ["lr", "steps", "qat-fraction", "noise-std", "scale-noise-std"])
def test_integers_that_no_float_holds(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=f"--{name} is (10{{400}}|inf), must be"):
        TrainConfig(**toml.read(written(tmp_path, f"tokens = 1000000\n{name} = 1{'0' * 400}")))


def test_the_command_line_goes_first(tiny: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = written(tmp_path, "[training]\nsteps = 7\nqat-steps = 5\n[evaluation]\nlog-every = 1\n")
    given = {k: v for k, v in tiny.items() if k not in ("steps", "log_every")}
    assert cli.main(["train", "--config", str(path), *options(given)]) == 0
    stored = files.read_json(Path(tiny["out"]) / "run.json")
    assert (stored["steps"], stored["qat_steps"], stored["log_every"]) == (7, tiny["qat_steps"], 1)
    assert cli.main(["train", "--config", str(tmp_path / "none.toml")]) == 2
    assert "none.toml cannot be read: No such file" in capsys.readouterr().err


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder), purge_orphaned_data=True)
    found.Reload()
    return {tag: [(e.step, e.value) for e in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


def test_tensorboard(tiny: dict[str, Any]) -> None:
    """What it shows is what the log says, also of a run that was stopped and lost some steps."""
    pytest.importorskip("tensorboard")
    config = TrainConfig(**tiny, tensorboard=True, stats_every=4)
    with signals_at(10), gone_at(19):
        for error in (Interrupted, MachineGone):
            with pytest.raises(error):
                train(config, say=lambda line: None)
    report = train(config, say=lambda line: None)
    for phase, curves in report["curves"].items():
        found = scalars(Path(tiny["out"]) / "tensorboard" / phase)
        for name in ("train", "held_out"):
            assert [step for step, _ in found[name]] == [step for step, _ in curves[name]]
            assert [value for _, value in found[name]] == pytest.approx([value for _, value in curves[name]], rel=1e-6)
    assert {"flips", "distance", "lr"} <= set(found)


def test_tensorboard_is_optional(tiny: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install qatkernels\[tensorboard\]"):
        TrainConfig(**tiny, tensorboard=True).resolved()
