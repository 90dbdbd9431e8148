"""Two processes with DDP and FSDP2 train what one process trains, and are taken up again bit for bit."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from qatkernels import files
from qatkernels.trainer import ConfigError, Interrupted, TrainConfig, checkpoints, data, loop, train
from qatkernels.trainer.parallel import ParallelError, Processes, joined
from qatkernels.trainer.phases import phases
from tests.pair import Group
from tests.passes import MachineGone, gone_at, signals_at

from .conftest import TINY, options, outcome

pytestmark = pytest.mark.skipif(sys.platform != "linux" or not dist.is_gloo_available(), reason="needs fork and gloo")

ROOT = Path(__file__).parents[2]

#: What two processes and one do alike, and how: the losses may differ by the order of sums, which a code that flips
#: makes visible.
WAYS: dict[str, dict[str, Any]] = {
    "ddp": {"parallel": "ddp"},
    "ddp-winq": {"parallel": "ddp", "method": "winq", "reset_every": 4, "stats_every": 3},
    "ddp-squat": {"parallel": "ddp", "method": "squat", "accumulate": 2, "act_bits": 8},
    "ddp-stochastic": {"parallel": "ddp", "weights": "stochastic"},
    "fsdp-stableqat": {"parallel": "fsdp", "method": "stableqat", "stats_every": 3},
    "fsdp": {"parallel": "fsdp", "tokens": 60 * 4 * 32, "qat_fraction": 0.3, "schedule": "fused", "accumulate": 2},
    "fsdp-winq": {"parallel": "fsdp", "method": "winq", "reset_every": 4, "stats_every": 3, "two_sided": True},
    "fsdp-squat": {"parallel": "fsdp", "method": "squat", "target": "latent", "minibatch": "next", "stats_every": 2},
    "fsdp-squat-quantized": {"parallel": "fsdp", "method": "squat", "norm": "asam", "rho": 0.5},
}

#: Ways that are also taken up again, and the passes over a batch in a step of their QAT.
AGAIN = {"ddp-winq": 1, "fsdp-winq": 2, "fsdp-squat": 2}


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def losses(out: Path) -> list[tuple[str, int, str, float]]:
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    names = ("train", "held_out", "winq/resets", "winq/distance", "squat/sharpness")
    return [(e["phase"], e["step"], n, e[n]) for e in log for n in names if n in e]


def train_one_of_two(
    rank: int, settings: dict[str, Any], stop: int | None = None, gone: int | None = None
) -> tuple[str, list[str]]:
    """Train as one of two processes; return how it ended, and what was said.

    Args:
        rank: of this process.
        settings: of the run.
        stop: pass in which a signal is sent to the second process alone.
        gone: pass in which both processes break off.
    """
    said: list[str] = []
    with contextlib.ExitStack() as stack:
        if stop is not None and rank == 1:
            stack.enter_context(signals_at(stop))
        if gone is not None:
            stack.enter_context(gone_at(gone))
        try:
            train(TrainConfig(**settings), say=said.append)
        except (Interrupted, MachineGone) as error:
            return str(error), said
        return "done", said


class Runs:
    """Runs of two processes in one folder."""

    def __init__(self, pair: Group, folder: Path, text: Path) -> None:
        self.pair, self.folder = pair, folder
        self.settings = {**TINY, "data": str(text), "log_every": 1, "eval_windows": 7}

    def train(self, way: str, out: str, *interruption: int | None) -> tuple[list[str], list[str]]:
        """Train in both; return how each ended, and what was said."""
        settings = {**self.settings, **WAYS[way], "out": str(self.folder / out)}
        answers = self.pair.run(train_one_of_two, settings, *interruption)
        return [end for end, _ in answers], [line for _, said in answers for line in said]

    def whole(self, way: str) -> Path:
        """Return the folder of a run that nothing interrupted."""
        if not (self.folder / way).exists():
            assert self.train(way, way)[0] == ["done", "done"]
        return self.folder / way

    def alone(self, way: str, out: str, say: Callable[[str], None] = lambda line: None) -> Path:
        """Train in this process. Parts of a batch draw noise of their own: what two see in two parts, so does one."""
        train(TrainConfig(**{**self.settings, **WAYS[way], "parallel": "none", "out": str(self.folder / out)}), say=say)
        return self.folder / out


@pytest.fixture(scope="module")
def runs(pair: Group, tmp_path_factory: pytest.TempPathFactory, text: Path) -> Runs:
    return Runs(pair, tmp_path_factory.mktemp("pair"), text)


@pytest.mark.parametrize("way", WAYS)
def test_two_processes_are_one(runs: Runs, way: str) -> None:
    two, one = runs.whole(way), runs.alone(way, f"{way}-alone")
    found, wanted = losses(two), losses(one)
    assert [entry[:3] for entry in found] == [entry[:3] for entry in wanted]
    for (phase, step, kind, value), (*_, other) in zip(found, wanted, strict=True):
        # Sums in another order, and now and then a code that flips because of that.
        assert value == pytest.approx(other, rel=1e-6 if phase != "w2" else 1e-3), (phase, step, kind)
    tensors, others = (files.load(out / "w2" / "model.safetensors")[0] for out in (two, one))
    assert {n: t.shape for n, t in tensors.items()} == {n: t.shape for n, t in others.items()}


@pytest.mark.parametrize("way", AGAIN)
def test_taken_up_again(runs: Runs, way: str) -> None:
    """A signal to one process and the loss of the machine in QAT: weights and log are the same, bit for bit."""
    out = f"{way}-again"
    assert runs.train(way, out, 8)[0] == ["stopped by SIGTERM"] * 2
    ends, said = runs.train(way, out, None, 16 + 3 * AGAIN[way])
    assert ends == ["the machine is gone"] * 2
    assert any(line.startswith("fp     8 steps were done before") for line in said)
    ends, said = runs.train(way, out)
    assert ends == ["done"] * 2
    assert any(line.startswith("w2     ") for line in said)
    assert outcome(str(runs.folder / out)) == outcome(str(runs.whole(way)))


#: Pass in which step 18 of the way "fsdp" begins, which has two parts to a step.
STEP_18 = 2 * 18 - 1


def test_a_sharded_state(runs: Runs) -> None:
    """It is safetensors, the last two are kept, and one process can go on from it."""
    assert runs.train("fsdp", "half", STEP_18)[0] == ["stopped by SIGTERM"] * 2
    kept = checkpoints.newest_first(runs.folder / "half" / "fp42")
    assert [path.name for path in kept] == ["state-00000018", "state-00000015"]
    names = sorted(path.name for path in kept[0].iterdir())
    assert len(names) == 3
    assert names[-1] == "state.json"
    assert all(name.endswith(".safetensors") for name in names[:2])
    said: list[str] = []
    found, wanted = losses(runs.alone("fsdp", "half", said.append)), losses(runs.whole("fsdp"))
    assert any("18 steps were done before" in line for line in said)
    assert [entry[:3] for entry in found] == [entry[:3] for entry in wanted]
    assert [entry[3] for entry in found] == pytest.approx([entry[3] for entry in wanted], rel=1e-3)


def test_a_damaged_sharded_state(runs: Runs) -> None:
    assert runs.train("fsdp", "damaged", STEP_18)[0] == ["stopped by SIGTERM"] * 2
    path = runs.folder / "damaged" / "fp42" / "state-00000018"
    (path / "state.json").write_text("{}")
    ends, said = runs.train("fsdp", "damaged")
    assert ends == ["done"] * 2
    assert f"{path} is damaged (its digests do not match): resuming from the checkpoint before it" in "\n".join(said)
    assert any(line.startswith("fp42   15 steps were done before") for line in said)
    assert outcome_of(runs.folder / "damaged") == outcome_of(runs.whole("fsdp"))


def outcome_of(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for path in sorted(out.glob("*/model.safetensors")):
        tensors, _ = files.load(path)
        found[path.parent.name] = files.digest(tensors)
    return found


def test_the_command_line(tiny: dict[str, Any]) -> None:
    """torchrun starts it twice: both processes end well, and one of them talks."""
    settings = {**tiny, "parallel": "fsdp", "steps": 6, "qat_steps": 6}
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_port()),
         "-m", "qatkernels", "train", *options(settings)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Bits per byte on held-out text") == 1
    assert done.stderr.count("w2     done") == 1


def test_what_is_refused(tiny: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ParallelError, match="--parallel is ddp, which needs torchrun"):
        train(TrainConfig(**tiny, parallel="ddp"), say=lambda line: None)
    with pytest.raises(ConfigError, match="--parallel is 'tpu', must be one of none, ddp, fsdp"):
        TrainConfig(**tiny, parallel="tpu")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ParallelError, match="--parallel is none under torchrun"):
        train(TrainConfig(**tiny), say=lambda line: None)


def test_one_process_is_a_group_of_one(tiny: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A group of one trains to the same bits as no group, and its batch has to divide."""
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", free_port())):
        monkeypatch.setenv(name, str(value))
    train(TrainConfig(**tiny), say=lambda line: None)
    with joined("ddp", "cpu"):
        train(TrainConfig(**{**tiny, "out": str(tmp_path / "ddp"), "parallel": "ddp"}), say=lambda line: None)
    assert outcome(tiny["out"]) == outcome(str(tmp_path / "ddp"))
    group = Processes()
    group.size = 3
    config = TrainConfig(**tiny).resolved()
    with pytest.raises(ConfigError, match="--batch is 4, must be a multiple of the 3 processes"):
        loop.run_phases(config, data.load(config.data, config.shape.context), phases(config), print, group)


def test_shares_are_everything_once() -> None:
    windows = torch.arange(7)
    group = Processes()
    group.size = 3
    parts = []
    for group.rank in range(3):
        parts.append(group.share(windows))
    assert sorted(torch.cat(parts).tolist()) == windows.tolist()
    assert {len(part) for part in parts} == {2, 3}
