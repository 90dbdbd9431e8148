"""Fault tolerance of a run: damaged files, a full disk, kills at any moment, a non-finite loss."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qatkernels import files
from qatkernels.trainer import CheckpointError, DivergedError, Interrupted, guard, report
from tests.passes import each_pass, signals_at

from .conftest import outcome, run

ROOT = Path(__file__).parents[2]


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def without_notes(found: dict[str, Any]) -> dict[str, Any]:
    return {**found, "log": [entry for entry in found["log"] if "note" not in entry]}


def notes(out: str) -> list[str]:
    return [entry["note"] for entry in outcome(out)["log"] if "note" in entry]


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_the_last_states_are_kept(tiny: dict[str, Any], keep: int) -> None:
    with signals_at(18), pytest.raises(Interrupted):
        run(tiny, keep_last=keep)
    found = sorted(p.name for p in (Path(tiny["out"]) / "fp").iterdir())
    assert found == [f"state-{step:08d}.safetensors" for step in (5, 10, 15, 18)[-keep:]]


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_a_kill_left_half_written_goes(tiny: dict[str, Any], kind: str) -> None:
    with signals_at(8), pytest.raises(Interrupted):
        run(tiny)
    left = Path(tiny["out"]) / "fp" / "state-00000007.safetensors.tmp"
    if kind == "file":
        left.write_bytes(b"half")
    else:
        left.with_name("state-00000007.tmp").mkdir()
    run(tiny)
    assert outcome(tiny["out"]).keys() == {"fp", "w2", "log"}


@pytest.mark.parametrize("damaged", [1, 2])
def test_a_damaged_state_costs_steps_only(tiny: dict[str, Any], tmp_path: Path, damaged: int) -> None:
    """The one before it serves; if all of them are damaged the phase starts over. The result is the same."""
    run(tiny, out=str(tmp_path / "whole"))
    with signals_at(18), pytest.raises(Interrupted):
        run(tiny)
    newest = sorted((Path(tiny["out"]) / "fp").iterdir(), reverse=True)
    assert len(newest) == 2
    for path in newest[:damaged]:
        damage(path)
    said: list[str] = []
    run(tiny, said)
    for path in newest[:damaged]:
        resumed = "resuming from the checkpoint before it, or from the start of fp"
        line = f"{path} is damaged (its digest does not match): {resumed}"
        assert line in said
        assert line in notes(tiny["out"])
    assert any("15 steps were done before" in line for line in said) == (damaged == 1)
    assert without_notes(outcome(tiny["out"])) == outcome(str(tmp_path / "whole"))


@pytest.mark.parametrize("name", ["fp/model.safetensors", "fp/phase.json", "w2/model.safetensors"])
def test_a_damaged_result_is_made_again(tiny: dict[str, Any], name: str) -> None:
    run(tiny)
    before = outcome(tiny["out"])
    damage(Path(tiny["out"]) / name)
    if name.endswith("json"):
        (Path(tiny["out"]) / name).write_text("{")
    said: list[str] = []
    run(tiny, said, bits=(2, 1))
    phase = name.split("/")[0]
    line = re.compile(rf"{re.escape(tiny['out'])}/{name} is damaged \(.*\): training {phase} again")
    assert any(line.fullmatch(text) for text in said)
    assert any(line.fullmatch(text) for text in notes(tiny["out"]))
    after = outcome(tiny["out"])
    assert (after["fp"], after["w2"]) == (before["fp"], before["w2"])


@pytest.mark.parametrize("sealed", [True, False])
def test_a_number_that_changed_in_a_result(tiny: dict[str, Any], sealed: bool) -> None:
    """It has a digest. A file of an earlier version has none and is compared with the header of the model."""
    report = run(tiny)
    path = Path(tiny["out"]) / "w2" / "phase.json"
    stored = json.loads(path.read_text())
    stored["result"]["bits_per_byte"] += 1
    path.write_text(json.dumps(stored if sealed else {k: v for k, v in stored.items() if k != "digest"}))
    said: list[str] = []
    assert run(tiny, said)["rows"][0]["qat"] == report["rows"][0]["qat"]
    assert any(line.startswith(f"{path} is damaged (") and line.endswith("training w2 again") for line in said)


def test_a_setting_that_changed_in_run_json(tiny: dict[str, Any]) -> None:
    run(tiny)
    path = Path(tiny["out"]) / "run.json"
    path.write_text(path.read_text().replace('"lr": 0.002', '"lr": 0.003'))
    with pytest.raises(CheckpointError, match=r"run\.json is damaged \(its digest does not match.*--restart"):
        run(tiny)


def test_lines_of_the_log_that_are_no_entries(tiny: dict[str, Any]) -> None:
    run(tiny)
    path = Path(tiny["out"]) / "log.jsonl"
    before = outcome(tiny["out"])["log"]
    path.write_bytes(path.read_bytes() + b'17\n{"phase": 3, "step": 1}\n{"phase": "w2"}\n\xff\xfe{}\n' + b"[" * 10**5)
    assert report.Log(path).entries() == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"step": 25}, "step is 25, must be at most 24"),
        ({"step": "5"}, "step is '5', must be a whole number"),
        ({"held_out": None}, "held_out is None, must be a number"),
        ({"surprise": 1}, "unexpected keyword argument 'surprise'"),
    ],
)
def test_a_state_of_another_kind(tiny: dict[str, Any], change: dict[str, Any], message: str) -> None:
    """Its digest matches, but no version of this package wrote it."""
    with signals_at(8), pytest.raises(Interrupted):
        run(tiny)
    path = sorted((Path(tiny["out"]) / "fp").glob("state-*"))[-1]
    tensors, header = files.load(path)
    files.save(path, tensors, {**header, **change})
    with pytest.raises(CheckpointError, match="is not a checkpoint that this version knows") as caught:
        run(tiny)
    assert str(path) in str(caught.value)
    assert message in str(caught.value)


def test_a_kill_before_states_are_deleted(tiny: dict[str, Any], tmp_path: Path) -> None:
    """The phase is finished, and what it no longer needs goes with the next call."""
    with signals_at(18), pytest.raises(Interrupted):
        run(tiny)
    folder, states = Path(tiny["out"]) / "fp", tmp_path / "states"
    states.mkdir()
    for path in folder.glob("state-*"):
        shutil.copy(path, states)
    run(tiny)
    assert not list(folder.glob("state-*"))
    shutil.copytree(states, folder, dirs_exist_ok=True)
    assert len(list(folder.glob("state-*"))) == 2
    run(tiny)
    assert outcome(tiny["out"]).keys() == {"fp", "w2", "log"}


def test_a_full_disk(tiny: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error says what is left, and with room again the run ends as if nothing had been."""
    run(tiny, out=str(tmp_path / "whole"))
    sync, left = os.fsync, [0]

    def filling(descriptor: int) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(28, "No space left on device")
        sync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", filling)
        for room in (5, 12):
            left[0] = room
            with pytest.raises(CheckpointError, match="cannot be written: No space left on device"):
                run(tiny)
            assert not list(Path(tiny["out"]).glob("**/*.tmp")), "it takes room and is of no use"
    states = sorted((Path(tiny["out"]) / "fp").glob("state-*"))
    assert states
    for path in states:
        files.load(path)
    run(tiny)
    assert outcome(tiny["out"]) == outcome(str(tmp_path / "whole"))


@pytest.mark.skipif(sys.platform != "linux", reason="needs RLIMIT_FSIZE")
def test_a_file_that_finds_no_room(tiny: dict[str, Any]) -> None:
    """The operating system itself refuses: a state is larger than the limit, which run.json and the log are not."""
    import resource

    with signals_at(5), pytest.raises(Interrupted):
        run(tiny)
    (state,) = (Path(tiny["out"]) / "fp").iterdir()
    before, limits = state.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limits[1]))
    try:
        with pytest.raises(CheckpointError) as caught:
            run(tiny, save_every=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert str(caught.value) == (
        f"{state.with_name('state-00000006.safetensors')} cannot be written: File too large; {state} is whole; "
        "once this is fixed, the same command resumes from there"
    )
    assert [p.name for p in state.parent.iterdir()] == [state.name]
    assert state.read_bytes() == before


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 900 kB: enough for two states of the tiny model and not for three."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=900k", "tmpfs", str(folder)]
    if sys.platform != "linux" or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_that_is_really_full(tiny: dict[str, Any], tmp_path: Path, disk: Path) -> None:
    run(tiny, out=str(tmp_path / "whole"))
    settings = {**tiny, "out": str(disk / "run"), "keep_last": 9}
    with pytest.raises(CheckpointError, match=r"cannot be written: No space left on device; .* is whole"):
        run(settings)
    states = sorted((disk / "run" / "fp").iterdir())
    assert len(states) >= 2
    for path in states:
        files.load(path)
    subprocess.run(["mount", "-o", "remount,size=20m", str(disk)], check=True)
    run(settings)
    assert outcome(settings["out"]) == outcome(str(tmp_path / "whole"))


def breaking(model: nn.Module, backward: bool) -> None:
    """Make what a layer in the middle gives no number, in the forward or in the backward pass."""

    def hook(module: nn.Module, inputs: Any, y: Tensor) -> Tensor:
        if not backward:
            return y * float("nan")
        y.register_hook(lambda g: g * float("nan"))
        return y

    model.blocks[1].mlp.down.register_forward_hook(hook)  # type: ignore[index, union-attr]


@pytest.mark.parametrize(
    ("backward", "where"),
    [
        (False, "the output of blocks.1.mlp.down"),
        (True, "the gradient at blocks.1.mlp.down"),
    ],
)
def test_where_it_diverged(tiny: dict[str, Any], backward: bool, where: str) -> None:
    """The step, the module and the last good checkpoint are named; the checkpoint is from before the step."""
    step, seen = 13, []

    def act(number: int, model: nn.Module) -> None:
        seen.append(torch.initial_seed())
        if number == step:
            breaking(model, backward)

    with each_pass(act), pytest.raises(DivergedError) as caught:
        run(tiny, depth=2, log_every=8, save_every=5)
    message = str(caught.value)
    assert f"at step {step} of fp" in message
    assert where in message
    assert message.endswith(f"the last good checkpoint is {tiny['out']}/fp/state-00000010.safetensors")
    assert "\n" not in message
    assert seen[-1] == seen[step - 1], "the step that was run again is another one"
    tensors, header = files.load(Path(tiny["out"]) / "fp" / "state-00000010.safetensors")
    assert header["step"] == 10
    assert all(tensor.isfinite().all() for tensor in tensors.values())
    log = [json.loads(line) for line in (Path(tiny["out"]) / "log.jsonl").read_text().splitlines()]
    assert log[-1] == {"phase": "fp", "step": step, "note": message}


@pytest.mark.parametrize(
    ("method", "passes"),
    [
        ({"method": "winq", "reset_every": 3}, [1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1]),
        ({"method": "squat", "minibatch": "next"}, [2, 1, 2, 1, 2, 1, 2, 1, 2, 1, 2]),
    ],
)
def test_a_method_stands_still_after_a_bad_step(
    tiny: dict[str, Any], method: dict[str, Any], passes: list[int]
) -> None:
    """No reset comes until the bad step is noticed, and what is run again has the objective of that step."""
    weights: list[Tensor] = []
    seeds: list[int] = []
    bad = sum(passes[:4])  # passes of QAT before its fifth step

    def act(number: int, model: nn.Module) -> None:
        if number <= tiny["steps"]:
            return
        weights.append(model.blocks[0].mlp.down.weight.detach().clone())  # type: ignore[index, union-attr]
        seeds.append(torch.initial_seed())
        if len(weights) == bad + 1:
            model.register_forward_hook(lambda module, inputs, logits: logits * float("nan"))

    with each_pass(act), pytest.raises(DivergedError, match="at step 5 of w2"):
        run(tiny, log_every=11, save_every=12, eval_every=12, **method)
    again = len(weights) - sum(passes)
    assert again == passes[4]
    assert seeds[-again:] == seeds[bad : bad + again]
    assert not torch.equal(weights[0], weights[bad])
    assert all(torch.equal(later, weights[bad]) for later in weights[bad + passes[4] :])


def test_the_guard_keeps_the_weights_of_before() -> None:
    model = nn.Linear(3, 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    watch = guard.Guard(optimizer, "cpu")
    weights = []
    for step, factor in enumerate((1.0, 1.0, float("nan"), 1.0, float("inf")), start=1):
        optimizer.zero_grad()
        loss = (model(torch.ones(2, 3)) * factor).sum()
        loss.backward()
        watch.observe(step, loss, nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None]))
        optimizer.step()
        weights.append(model.weight.detach().clone())
        assert (watch.first_bad_step() is None) == (step < 3)
    assert not torch.equal(weights[0], weights[1])
    assert all(torch.equal(weights[1], later) for later in weights[2:])
    found = watch.first_bad_step()
    assert found is not None
    assert found[0] == 3
    assert all(tensor.isfinite().all() for state in optimizer.state.values() for tensor in state.values())
