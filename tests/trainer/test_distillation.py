"""The reference loop with a teacher, and with settings of the quantizer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from qatkernels import files, quantized_modules
from qatkernels.trainer import TrainConfig, train
from qatkernels.trainer.build import build_model, build_teacher
from qatkernels.trainer.config import ConfigError
from qatkernels.trainer.loop import mean_loss
from qatkernels.trainer.models import load_trained
from qatkernels.trainer.phases import phases
from tests.passes import MachineGone, gone_at
from tests.searches import Candidates

from .conftest import TINY


def settings(text: Path, out: Path, **more: object) -> TrainConfig:
    tiny = {**TINY, "steps": 20, "qat_steps": 10, "bits": (2,), "data": str(text), "out": str(out)}
    return TrainConfig(**{**tiny, **more})  # type: ignore[arg-type]


def test_the_loss_is_a_mean_of_both(text: Path, tmp_path: Path) -> None:
    config = settings(text, tmp_path / "run", distill=0.75, temperature=2.0).resolved()
    train(config, say=lambda line: None)
    phase = phases(config)[1]
    model, teacher = build_model(config, phase, 0).eval(), build_teacher(config, phase)
    assert teacher is not None
    assert not teacher.training
    assert not quantized_modules(teacher)
    trained = load_trained(tmp_path / "run" / "fp").model
    for mine, theirs in zip(teacher.parameters(), trained.parameters(), strict=True):
        assert torch.equal(mine, theirs)
        assert not mine.requires_grad
    windows = torch.randint(256, (3, config.shape.context + 1))
    with torch.no_grad():
        p, q = (torch.log_softmax(m(windows[:, :-1]).flatten(0, 1) / 2, -1) for m in (teacher, model))
        kl = 4 * F.kl_div(q, p, log_target=True, reduction="batchmean")
        wanted = 0.25 * mean_loss(model, windows, config) + 0.75 * kl
    torch.testing.assert_close(mean_loss(model, windows, config, teacher).detach(), wanted)


def test_a_teacher_changes_what_is_learned(text: Path, tmp_path: Path) -> None:
    states = []
    for name, distill in (("plain", 0.0), ("taught", 1.0)):
        train(settings(text, tmp_path / name, distill=distill), say=lambda line: None)
        states.append({n: files.load(tmp_path / name / n / "model.safetensors")[0] for n in ("fp", "w2")})
    plain, taught = states
    assert all(torch.equal(plain["fp"][name], taught["fp"][name]) for name in plain["fp"])
    assert not all(torch.equal(plain["w2"][name], taught["w2"][name]) for name in plain["w2"])


def test_groups_and_dtype_of_scales(text: Path, tmp_path: Path) -> None:
    train(settings(text, tmp_path / "run", group_size=16, scale_dtype="float16"), say=lambda line: None)
    layers = quantized_modules(load_trained(tmp_path / "run" / "w2").model).values()
    assert {(layer.group_size, layer.config.scale_dtype) for layer in layers} == {(16, torch.float16)}
    with pytest.raises(ConfigError, match="--group-size is 0, must be at least 1"):
        settings(text, tmp_path / "run", group_size=0)


def test_scale_init(text: Path, tmp_path: Path) -> None:
    """The run searches; "activation" calibrates on training text, the same at every start, and packs and resumes."""
    start = {}
    for init in ("max", "mse", "activation"):
        out = tmp_path / init
        config = settings(text, out, group_size=16, scale_init=init, keep_every=10)
        train(config, say=lambda line: None)
        layers = quantized_modules(load_trained(out / "w2").model).values()
        assert {layer.config.scale_init for layer in layers} == {init}
        assert not any(layer.awaits_inputs for layer in layers)
        start[init] = files.load(out / "w2" / "step-000000.safetensors")[0]
    scales = [[value for name, value in state.items() if name.endswith(".scale")] for state in start.values()]
    assert all(
        not torch.equal(*pair)
        for one, two in ((0, 1), (1, 2), (0, 2))
        for pair in zip(scales[one], scales[two], strict=True)
    )
    again = settings(text, tmp_path / "again", group_size=16, scale_init="activation", keep_every=10)
    train(again, say=lambda line: None)
    state = files.load(tmp_path / "again" / "w2" / "step-000000.safetensors")[0]
    assert all(torch.equal(state[name], value) for name, value in start["activation"].items())
    with pytest.raises(ConfigError, match=r"--scale-init is 'mes'.*did you mean 'mse'"):
        settings(text, tmp_path / "wrong", scale_init="mes")


def test_a_resumed_run_does_not_search_again(text: Path, tmp_path: Path) -> None:
    """It ends with the same weights, also where its only state is damaged and the phase begins again."""
    results = []
    for name, damaged in (("whole", False), ("broken", True), ("straight", False)):
        config = settings(text, tmp_path / name, scale_init="activation", save_every=4)
        if name != "straight":
            with gone_at(20 + 6), pytest.raises(MachineGone):
                train(config, say=lambda line: None)
        states = sorted((tmp_path / name / "w2").glob("state*"))
        assert len(states) == (name != "straight")
        if damaged:
            states[0].write_bytes(states[0].read_bytes()[:-1])
        with Candidates() as tried:
            train(config, say=lambda line: None)
        assert (tried.count == 0) == (name == "whole")
        results.append(files.load(tmp_path / name / "w2" / "model.safetensors")[0])
    assert all(torch.equal(value, other[name]) for other in results for name, value in results[0].items())


def test_loading_a_trained_model_does_not_search(text: Path, tmp_path: Path) -> None:
    train(settings(text, tmp_path / "run", scale_init="mse"), say=lambda line: None)
    with Candidates() as tried:
        model = load_trained(tmp_path / "run" / "w2").model
    assert tried.count == 0
    stored = files.load(tmp_path / "run" / "w2" / "model.safetensors")[0]
    for name, layer in quantized_modules(model).items():
        assert torch.equal(layer.scale, stored[f"{name}.scale"])
