"""Methods of training in the loop: that each does its work there, and can be taken up again exactly."""

from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from qatkernels import QuantConfig, files, quantize_model, quantized_modules
from qatkernels.methods.winq import WinQConfig
from qatkernels.trainer import ConfigError, Interrupted, TrainConfig, data, loop, models
from qatkernels.trainer.demo_model import Transformer
from qatkernels.trainer.methods import MethodConfig
from qatkernels.trainer.parallel import Processes
from qatkernels.trainer.phases import phases
from tests.passes import signals_at

from .conftest import outcome, run

WAYS = {
    "winq": {"method": "winq", "reset_every": 5, "stats_every": 3},
    "winq two-sided": {"method": "winq", "two_sided": True, "samples": 2, "reset_until": 0.5},
    "squat": {"method": "squat", "scale_every": 2},
    "squat next": {
        "method": "squat", "target": "latent", "norm": "asam", "minibatch": "next", "stats_every": 2, "qat_lr": 1e-2
    },
    "stableqat": {"method": "stableqat", "amplitude": 0.1, "stats_every": 3},
    "bfloat16": {"weights": "bfloat16", "qat_lr": 1e-2},
    "stochastic": {"weights": "stochastic", "method": "winq", "reset_every": 5, "stats_every": 3},
    "A8": {"act_bits": 8, "accumulate": 2, "schedule": "wsd", "stats_every": 3, "qat_lr": 1e-2},
}  # fmt: skip


def logged(out: str) -> list[dict[str, Any]]:
    lines = (Path(out) / "log.jsonl").read_text().splitlines()
    return [entry for line in lines if (entry := json.loads(line))["phase"] == "w2"]


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_interrupted_and_resumed(tiny: dict[str, Any], tmp_path: Path, way: dict[str, Any]) -> None:
    settings = {**tiny, **way}
    run(settings, out=str(tmp_path / "whole"))
    run(tiny, out=str(tmp_path / "plain"))
    assert outcome(str(tmp_path / "whole"))["w2"] != outcome(str(tmp_path / "plain"))["w2"]
    stops = 0
    with signals_at(26, 31, 50):
        while True:
            try:
                run(settings)
                break
            except Interrupted:
                stops += 1
    assert stops >= 2
    assert outcome(tiny["out"]) == outcome(str(tmp_path / "whole"))


def test_winq_resets_on_time_and_not_late(tiny: dict[str, Any]) -> None:
    run(tiny, method="winq", reset_every=3, reset_until=0.8, reset_weight=1.0, noise_std=0.0, stats_every=1)
    entries = {entry["step"]: entry for entry in logged(tiny["out"])}
    assert [entries[step]["winq/resets"] for step in range(1, 13)] == [0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3, 3]
    for step in (3, 6, 9):  # with all the weight on the grid value, what is left are weights beyond the clamp
        assert entries[step]["winq/distance"] < 0.5 * entries[step - 1]["winq/distance"]


def test_noise_is_for_training(tiny: dict[str, Any]) -> None:
    """The first evaluation, before any step, is that of plain training; the first training loss is not."""
    run(tiny, out=tiny["out"] + "-qat", log_every=1)
    run(tiny, method="winq", noise_std=0.05, log_every=1)
    plain, noisy = logged(tiny["out"] + "-qat"), logged(tiny["out"])
    assert plain[0] == noisy[0]
    assert plain[0]["step"] == 0
    assert plain[1]["train"] != noisy[1]["train"]


def test_squat_and_plain_training_say_what_they_see(tiny: dict[str, Any]) -> None:
    run(tiny, method="squat", stats_every=4)
    seen = [entry for entry in logged(tiny["out"]) if "squat/sharpness" in entry]
    assert [entry["step"] for entry in seen] == [4, 8, 12]
    assert all(entry["squat/sharpness"] != 0 and entry["squat/perturbation_norm"] > 0 for entry in seen)
    run(tiny, out=tiny["out"] + "-qat", stats_every=4)
    seen = [entry for entry in logged(tiny["out"] + "-qat") if "flips" in entry]
    assert [entry["step"] for entry in seen] == [4, 8, 12]
    assert 0 < seen[1]["flips"] < 1


def test_parts_of_a_batch_add_up(tiny: dict[str, Any]) -> None:
    config = TrainConfig(**tiny, accumulate=3).resolved()
    torch.manual_seed(0)
    model = Transformer(config.shape)
    windows = torch.randint(256, (8, config.shape.context + 1))
    optimizer = torch.optim.SGD(model.parameters())
    loop.mean_loss(model, windows, config).backward()
    whole = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    loss = loop.accumulated(model, windows, optimizer, config)
    torch.testing.assert_close(loss, loop.mean_loss(model, windows, config).detach())
    for a, p in zip(whole, (p for p in model.parameters() if p.grad is not None), strict=True):
        torch.testing.assert_close(p.grad, a, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("way", [{}, *WAYS.values()], ids=["qat", *WAYS])
def test_between_steps_nothing_weight_sized_is_held(tiny: dict[str, Any], way: dict[str, Any]) -> None:
    """Weights, two moments of each and gradients are all there is, whatever the method."""
    run({**tiny, "qat_steps": 1})
    config = TrainConfig(**{**tiny, **way}).resolved()
    phase = phases(config)[1]
    corpus = data.load(config.data, config.shape.context)
    before = {id(t) for t in tensors()}
    training = loop.begin(loop.Run(config, corpus, None, None, None, Processes()), phase)  # type: ignore[arg-type]
    for step in range(3):
        loop.take_step(training, step)
    known = [p.data for p in training.model.parameters()] + [p.grad for p in training.model.parameters()]
    known += [value for state in training.optimizer.state.values() for value in state.values()]
    storages = {t.untyped_storage().data_ptr() for t in known if t is not None}
    others = [t for t in tensors() if id(t) not in before and t.untyped_storage().data_ptr() not in storages]
    shapes = {module.weight.shape for module in quantized_modules(training.model).values()}
    assert not [t.shape for t in others if t.shape in shapes]
    assert [t for t in others if t.shape == training.model.cos.shape], "the search finds nothing at all"


@pytest.mark.parametrize("weights", ["bfloat16", "stochastic"])
def test_weights_are_bfloat16_while_they_are_trained(tiny: dict[str, Any], weights: str) -> None:
    run(tiny, weights=weights, save_every=10**6)
    trained, _ = files.load(Path(tiny["out"]) / "w2" / "model.safetensors")
    before, _ = files.load(Path(tiny["out"]) / "fp" / "model.safetensors")
    assert {t.dtype for t in before.values()} == {torch.float32}
    assert {name for name, t in trained.items() if t.dtype == torch.float32} == {n for n in trained if "scale" in n}
    loaded = models.load_trained(Path(tiny["out"]) / "w2").model
    for name, layer in quantized_modules(loaded).items():
        assert torch.equal(layer.weight.bfloat16(), trained[f"{name}.weight"])


def tensors() -> list[torch.Tensor]:
    gc.collect()
    return [t for t in gc.get_objects() if issubclass(type(t), torch.Tensor)]


def test_resets_by_default() -> None:
    model = quantize_model(torch.nn.Linear(4, 4), QuantConfig())
    method = MethodConfig("winq").start(model, torch.optim.SGD(model.parameters()), 100)
    assert method.reset_every == 25  # type: ignore[attr-defined]
    assert MethodConfig("winq", WinQConfig(reset_every=0)).start(model, None, 100).reset_every is None  # type: ignore


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "sam"}, "--method is 'sam', must be one of qat, winq, squat, stableqat"),
        ({"amplitude": 0.3}, r"--amplitude is 0.3, must be in \[0, 0.225079\)"),
        ({"weights": "float16"}, "--weights is 'float16', must be one of float32, bfloat16, stochastic"),
        ({"weights": "bfloat16", "parallel": "fsdp"}, "--weights is bfloat16, must be float32 with --parallel fsdp"),
        ({"act_bits": 1}, r"--act-bits is 1, must be in \[2, 8\]"),
        ({"accumulate": 9}, "--accumulate is 9, must be at most --batch, 8"),
        ({"reset_weight": 1.5}, r"--reset-weight is 1.5, must be in \[0, 1\]"),
        ({"reset_every": -1}, "--reset-every is -1, must be at least 0"),
        ({"noise_std": -0.1}, "--noise-std is -0.1"),
        ({"target": "both"}, "--target is 'both', must be one of quantized, latent"),
        ({"norm": "l1"}, "--norm is 'l1', must be one of l2, asam"),
        ({"rho": float("inf")}, "--rho is inf"),
    ],
)
def test_bad_settings(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TrainConfig(**{"batch": 8, **changes})
