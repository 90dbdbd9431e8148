"""Two processes with DDP and FSDP2 train what one process trains, and are taken up again bit for bit."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from qatkernels import files
from qatkernels.trainer import ConfigError, TrainConfig, checkpoints, data, loop, train
from qatkernels.trainer.parallel import ParallelError, Processes, joined
from qatkernels.trainer.phases import phases

from .conftest import TINY, options, outcome

pytestmark = pytest.mark.skipif(sys.platform != "linux" or not dist.is_gloo_available(), reason="needs fork and gloo")

ROOT = Path(__file__).parents[2]

#: What two processes and one do alike, and how: the losses may differ by the order of sums, which a code that flips
#: makes visible.
WAYS: dict[str, dict[str, Any]] = {
    "ddp": {"parallel": "ddp"},
    "ddp-winq": {"parallel": "ddp", "method": "winq", "reset_every": 4, "stats_every": 3},
    "ddp-squat": {"parallel": "ddp", "method": "squat", "accumulate": 2, "act_bits": 8},
    "fsdp": {"parallel": "fsdp", "tokens": 60 * 4 * 32, "qat_fraction": 0.3, "schedule": "fused", "accumulate": 2},
    "fsdp-winq": {"parallel": "fsdp", "method": "winq", "reset_every": 4, "stats_every": 3, "two_sided": True},
    "fsdp-squat": {"parallel": "fsdp", "method": "squat", "target": "latent", "minibatch": "next", "stats_every": 2},
}

#: Ways that are also taken up again, and the passes over a batch in a step of their QAT.
AGAIN = {"ddp-winq": 1, "fsdp-winq": 2, "fsdp-squat": 2}

#: What torchrun starts twice: trains one configuration after another and prints how each ended.
_RANK = """
import json, os, signal, sys, torch
from qatkernels import cli
from qatkernels.trainer import Interrupted, TrainConfig, loop, train
from qatkernels.trainer.parallel import leave
import torch.distributed as dist
rank = int(os.environ["RANK"])
todo = json.load(open(sys.argv[1]))
if todo[0][0] == "command line":  # it joins the processes and leaves them, for good: the store remembers who was there
    os.write(1, f"end {json.dumps(['command line', rank, cli.main(todo[0][1])])}\\n".encode())
    leave(0)
dist.init_process_group("gloo")
learn = loop.accumulated
for name, way in todo:
    taken = 0
    def failing(*arguments):
        global taken
        taken += 1
        if taken == way.get("stop") and rank == 1:
            signal.raise_signal(signal.SIGTERM)
        if taken == way.get("gone"):
            raise RuntimeError("the machine is gone")
        return learn(*arguments)
    loop.accumulated = failing
    if "damage" in way and rank == 0:
        open(way["damage"], "w").write("{}")
    dist.barrier()
    try:
        train(TrainConfig(**way["config"]), say=lambda line: os.write(1, f"{name} {line}\\n".encode()))
        end = "done"
    except (Interrupted, RuntimeError) as error:
        end = str(error)
    os.write(1, f"end {json.dumps([name, rank, end])}\\n".encode())
dist.barrier()
leave(0)
"""


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def torchrun(folder: Path, todo: list[tuple[str, Any]]) -> tuple[dict[str, list[Any]], str, str]:
    """Train with two processes; return how each configuration ended in each, and what was said."""
    (folder / "todo.json").write_text(json.dumps(todo))
    (folder / "rank.py").write_text(_RANK)
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_port()),
         str(folder / "rank.py"), str(folder / "todo.json")],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    ends: dict[str, list[Any]] = {}
    for line in done.stdout.splitlines():
        if line.startswith("end "):
            name, _, end = json.loads(line[4:])
            ends.setdefault(name, []).append(end)
    return ends, done.stdout, done.stderr


def losses(out: Path) -> list[tuple[str, int, str, float]]:
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    names = ("train", "held_out", "winq/resets", "winq/distance", "squat/sharpness")
    return [(e["phase"], e["step"], n, e[n]) for e in log for n in names if n in e]


Results = tuple[Path, dict[str, list[Any]], str, str]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory, text: Path) -> Results:
    """Runs of two processes: each way whole, and some of them stopped, broken off and damaged in between."""
    folder = tmp_path_factory.mktemp("pair")
    tiny = {**TINY, "data": str(text), "log_every": 1, "eval_windows": 7}

    def config(name: str, out: str) -> dict[str, Any]:
        return {**tiny, **WAYS[name], "out": str(folder / out)}

    todo: list[tuple[str, Any]] = [(name, {"config": config(name, name)}) for name in WAYS]
    for name, calls in AGAIN.items():
        again = config(name, f"{name}-again")
        for way, change in (("stopped", {"stop": 8}), ("gone", {"gone": 16 + 3 * calls}), ("again", {})):
            todo.append((f"{name}-{way}", {"config": again, **change}))
    todo += [(name, {"config": config("fsdp", name), "stop": 18}) for name in ("half", "damaged")]
    path = folder / "damaged" / "fp42" / "state-00000018" / "state.json"
    todo.append(("damaged-again", {"config": config("fsdp", "damaged"), "damage": str(path)}))
    command = options({**tiny, "out": str(folder / "command"), "parallel": "fsdp", "steps": 6, "qat_steps": 6})
    ends, said, warned = torchrun(folder, [("command line", ["train", *command])])
    more = torchrun(folder, todo)
    return folder, {**ends, **more[0]}, said + more[1], warned + more[2]


@pytest.mark.parametrize("name", WAYS)
def test_two_processes_are_one(results: Results, text: Path, name: str) -> None:
    folder, ends, *_ = results
    assert ends[name] == ["done", "done"]
    alone = {**TINY, **WAYS[name], "parallel": "none", "data": str(text), "log_every": 1, "eval_windows": 7}
    # Parts of a batch draw noise of their own: what two processes see in two parts, one sees in two parts.
    train(TrainConfig(**alone, out=str(folder / f"{name}-alone")), say=lambda line: None)
    found, wanted = losses(folder / name), losses(folder / f"{name}-alone")
    assert [entry[:3] for entry in found] == [entry[:3] for entry in wanted]
    for (phase, step, kind, value), (*_, other) in zip(found, wanted, strict=True):
        # Sums in another order, and now and then a code that flips because of that.
        assert value == pytest.approx(other, rel=1e-6 if phase != "w2" else 1e-3), (phase, step, kind)
    tensors, others = (files.load(folder / run / "w2" / "model.safetensors")[0] for run in (name, f"{name}-alone"))
    assert {n: t.shape for n, t in tensors.items()} == {n: t.shape for n, t in others.items()}


@pytest.mark.parametrize("name", AGAIN)
def test_taken_up_again(results: Results, name: str) -> None:
    """A signal to one process and the loss of the machine in QAT: weights and log are the same, bit for bit."""
    folder, ends, said, _ = results
    assert ends[f"{name}-stopped"] == ["stopped by SIGTERM"] * 2
    assert ends[f"{name}-gone"] == ["the machine is gone"] * 2
    assert ends[f"{name}-again"] == ["done"] * 2
    assert f"{name}-gone fp     8 steps were done before" in said
    assert f"{name}-again w2     " in said
    assert outcome(str(folder / f"{name}-again")) == outcome(str(folder / name))


def test_a_sharded_state(results: Results, text: Path) -> None:
    """It is safetensors, the last two are kept, and one process can go on from it."""
    folder, ends, *_ = results
    assert ends["half"] == ["stopped by SIGTERM"] * 2
    kept = checkpoints.newest_first(folder / "half" / "fp42")
    assert [path.name for path in kept] == ["state-00000018", "state-00000015"]
    files = sorted(path.name for path in kept[0].iterdir())
    assert len(files) == 3
    assert files[-1] == "state.json"
    assert all(name.endswith(".safetensors") for name in files[:2])
    alone = {**TINY, **WAYS["fsdp"], "parallel": "none", "data": str(text), "log_every": 1, "eval_windows": 7}
    said: list[str] = []
    train(TrainConfig(**alone, out=str(folder / "half")), say=said.append)
    assert any("18 steps were done before" in line for line in said)
    found, wanted = losses(folder / "half"), losses(folder / "fsdp")
    assert [entry[:3] for entry in found] == [entry[:3] for entry in wanted]
    assert [entry[3] for entry in found] == pytest.approx([entry[3] for entry in wanted], rel=1e-3)


def test_a_damaged_sharded_state(results: Results) -> None:
    folder, ends, said, _ = results
    assert ends["damaged-again"] == ["done"] * 2
    path = folder / "damaged" / "fp42" / "state-00000018"
    assert f"damaged-again {path} is damaged (its digests do not match): going on from the checkpoint before" in said
    assert "damaged-again fp42   15 steps were done before" in said
    found = outcome_of(folder / "damaged")
    assert found == outcome_of(folder / "fsdp")


def outcome_of(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for path in sorted(out.glob("*/model.safetensors")):
        tensors, _ = files.load(path)
        found[path.parent.name] = files.digest(tensors)
    return found


def test_the_command_line(results: Results) -> None:
    """Both processes end well, and one of them talks."""
    _, ends, said, errors = results
    assert ends["command line"] == [0, 0]
    assert said.count("Bits per byte on held-out text") == 1
    assert errors.count("w2     done") == 1


def test_what_is_refused(tiny: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ParallelError, match="--parallel is ddp, which needs torchrun"):
        train(TrainConfig(**tiny, parallel="ddp"), say=lambda line: None)
    with pytest.raises(ConfigError, match="--target is quantized, must be latent with --parallel fsdp"):
        TrainConfig(**tiny, parallel="fsdp", method="squat")
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
