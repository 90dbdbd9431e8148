from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
import torch

from qatkernels import files
from qatkernels.files import CheckpointError
from qatkernels.trainer import run_folder

TENSORS = {
    "weight": torch.randn(3, 5),
    "step": torch.tensor(7.0),
    "half": torch.randn(4).bfloat16(),
    "transposed": torch.arange(6).reshape(2, 3).t(),
    "empty": torch.empty(0),
}


def test_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "x.safetensors"
    files.save(path, TENSORS, {"step": 7, "loss": 0.1})
    tensors, header = files.load(path)
    assert header == {"step": 7, "loss": 0.1}
    assert tensors.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert tensors[name].dtype == tensor.dtype
        assert torch.equal(tensors[name], tensor)
    assert [p.name for p in path.parent.iterdir()] == ["x.safetensors"]


def test_tied_tensors_are_saved(tmp_path: Path) -> None:
    weight = torch.randn(2, 2)
    files.save(tmp_path / "x.safetensors", {"a": weight, "b": weight})
    assert torch.equal(files.load(tmp_path / "x.safetensors")[0]["b"], weight)


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_a_file_cut_short_is_named(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "x.safetensors"
    files.save(path, TENSORS)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"x\.safetensors is damaged"):
        files.load(path)


def test_a_flipped_bit_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    files.save(path, TENSORS)
    content = bytearray(path.read_bytes())
    content[-3] ^= 4
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="digest does not match"):
        files.load(path)


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.json"
    files.write_json(path, {"n": 1})

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match=r"x\.json cannot be written: No space left"):
        files.write_json(path, {"n": 2})
    assert files.read_json(path) == {"n": 1}


def test_a_write_leaves_nothing_but_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever fails, and whatever the user has there."""
    path, mine = tmp_path / "x.json", tmp_path / "x.json.tmp"
    mine.write_text("mine")
    files.write_json(path, {"n": 1})
    (tmp_path / "y").touch()
    assert path.stat().st_mode == (tmp_path / "y").stat().st_mode, "as any new file"
    (tmp_path / "folder").mkdir()
    with pytest.raises(CheckpointError, match=r"cannot be written: Is a directory"):
        files.write(tmp_path / "folder", b"x")

    def stopped(*arguments: object) -> None:
        raise KeyboardInterrupt

    for name in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, stopped)
            with pytest.raises(KeyboardInterrupt):
                files.write_json(path, {"n": 2})
    assert files.read_json(path) == {"n": 1}
    assert mine.read_text() == "mine"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["folder", "x.json", "x.json.tmp", "y"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL")
def test_what_a_kill_left_is_swept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = [tmp_path / "x.json.tmp", tmp_path / "notes.tmp", tmp_path / "w2" / "x.12345678.bak"]
    kept[-1].parent.mkdir()
    for path in kept:
        path.write_text("mine")
    for folder in (tmp_path, tmp_path / "w2"):
        if (pid := os.fork()) == 0:
            monkeypatch.setattr(os, "replace", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
            files.write_json(folder / "x.json", {"n": 1})
            os._exit(1)
        assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGKILL
    assert len(list(tmp_path.rglob("*.tmp"))) == 4
    with run_folder.exclusive(tmp_path):
        assert sorted(p for p in tmp_path.rglob("*") if p.is_file()) == sorted([*kept, tmp_path / ".lock"])


@pytest.mark.parametrize(
    ("content", "message"), [("{", "is damaged"), ("[1]", "must be a JSON object"), (None, "cannot be read")]
)
def test_bad_json(tmp_path: Path, content: str | None, message: str) -> None:
    path = tmp_path / "x.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(CheckpointError, match=message):
        files.read_json(path)


def test_a_number_that_changed_is_noticed(tmp_path: Path) -> None:
    """Rewritten with other spaces and another order of fields it is the same; without a digest it is what it says."""
    path, value = tmp_path / "x.json", {"loss": 1.25, "bits": (4, 2), "of": {"b": None, "a": "é"}}
    files.write_json(path, value, sealed=True)
    text = path.read_text()
    read = {"loss": 1.25, "bits": [4, 2], "of": {"b": None, "a": "é"}}
    assert files.read_json(path) == read
    stored = json.loads(text)
    path.write_text(json.dumps(dict(reversed(stored.items()))))
    assert files.read_json(path) == read
    for changed in (text.replace("1.25", "1.26"), text.replace('"loss"', '"lass"'), text.replace("null", "0")):
        path.write_text(changed)
        with pytest.raises(CheckpointError, match=r"x\.json is damaged \(its digest does not match"):
            files.read_json(path)
    del stored["digest"]
    path.write_text(json.dumps({**stored, "loss": 3}))
    assert files.read_json(path)["loss"] == 3


def test_json_has_no_nan(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        files.write_json(tmp_path / "x.json", {"loss": float("nan")})


def test_a_folder_serves_one_run_at_a_time(tmp_path: Path) -> None:
    with run_folder.exclusive(tmp_path):
        second = run_folder.exclusive(tmp_path)
        with pytest.raises(CheckpointError, match="in use by another run"):
            second.__enter__()
    with run_folder.exclusive(tmp_path):
        pass


def test_what_is_of_a_run(tmp_path: Path) -> None:
    own = ("fp", "fp1200", "cooled900", "w2", "w1.58", "w1a8-1200-both-600-0.2")
    for name in (*own, "fp16-llama", "weights", "w", "fpx"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "phase.json").write_text("{}")
    assert {path.parent.name for path in run_folder.files_of_run(tmp_path)} == set(own)


def test_remove_run_deletes_nothing_else(tmp_path: Path) -> None:
    kept = [tmp_path / "notes.txt", tmp_path / "w2" / "mine.txt", tmp_path / "other" / "phase.json"]
    gone = [tmp_path / "fp" / "phase.json", tmp_path / "w1.58" / "state.safetensors", tmp_path / "log.jsonl"]
    gone.append(tmp_path / "w2" / "step-000050.safetensors")
    for path in kept + gone:
        path.parent.mkdir(exist_ok=True)
        path.write_text("x")
    run_folder.remove_run(tmp_path)
    assert all(path.exists() for path in kept + gone), "without a run.json it is not a run"
    (tmp_path / "run.json").write_text(json.dumps({}))
    run_folder.remove_run(tmp_path)
    assert all(path.exists() for path in kept)
    assert not any(path.exists() for path in gone)
    assert not (tmp_path / "run.json").exists()
