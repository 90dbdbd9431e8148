from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch

from qatkernels.trainer import data


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for i in range(40):
        path = tmp_path / "text" / f"part{i % 3}" / f"{i}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"file {i} says: " + " ".join(str(i * j) for j in range(50)))
    return tmp_path / "text"


def test_files_are_held_out_whole(folder: Path) -> None:
    corpus = data.load(folder, 16)
    assert not set(corpus.train_files) & set(corpus.held_out_files)
    assert len(corpus.train_files) + len(corpus.held_out_files) == 40
    held_out = bytes(corpus.held_out.tolist())
    assert held_out == b"".join((folder / name).read_bytes() for name in corpus.held_out_files)
    assert all((folder / name).read_bytes() not in held_out for name in corpus.train_files)
    total = len(corpus.train) + len(corpus.held_out)
    assert 0.05 <= len(corpus.held_out) / total <= 0.05 + 1 / 20


def test_split_depends_on_content_alone(folder: Path, tmp_path: Path) -> None:
    before = data.load(folder, 16)
    shutil.copytree(folder, tmp_path / "elsewhere" / "deep")
    shutil.copy(folder / "part0" / "0.txt", tmp_path / "elsewhere" / "a copy.txt")
    (tmp_path / "elsewhere" / ".hidden").write_text("not read")
    after = data.load(tmp_path / "elsewhere", 16)
    assert after.sha256 == before.sha256
    assert torch.equal(after.train, before.train)
    (folder / "part0" / "0.txt").write_text("something else")
    assert data.load(folder, 16).sha256 != before.sha256


def test_standard_library() -> None:
    corpus = data.load(None, 128)
    assert len(corpus.train) > 4_000_000
    assert not set(corpus.train_files) & set(corpus.held_out_files)
    assert all(name.endswith(".py") for name in corpus.train_files)
    assert not any("test" in name.split("/")[:-1] for name in corpus.train_files)
    assert data.load(None, 128).sha256 == corpus.sha256


def test_single_file_is_cut_at_its_end(tmp_path: Path) -> None:
    file = tmp_path / "one.txt"
    file.write_bytes(bytes(range(200)) * 10)
    corpus = data.load(file, 16)
    assert bytes(corpus.train.tolist()) + bytes(corpus.held_out.tolist()) == file.read_bytes()
    assert len(corpus.held_out) == 100


def test_windows(folder: Path) -> None:
    corpus = data.load(folder, 16)
    windows = corpus.evaluation(10, 16)
    assert windows.shape == (10, 17)
    assert torch.equal(windows, corpus.evaluation(10, 16))
    assert torch.equal(windows[0], corpus.held_out[:17].long())
    assert torch.equal(windows[-1], corpus.held_out[-17:].long())
    torch.manual_seed(3)
    batch = corpus.batch(5, 16)
    torch.manual_seed(3)
    assert torch.equal(batch, corpus.batch(5, 16))
    assert batch.shape == (5, 17)
    text = bytes(corpus.train.tolist())
    assert all(bytes(row.tolist()) in text for row in batch)


def test_a_window_may_be_all_there_is(tmp_path: Path) -> None:
    file = tmp_path / "short.txt"
    file.write_bytes(b"abcdefgh" * 9)
    corpus = data.load(file, 16)
    assert len(corpus.held_out) == 34
    assert corpus.evaluation(512, 16).shape == (18, 17)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: None, "does not exist"),
        (lambda p: p.mkdir(), "holds no file"),
        (lambda p: p.write_bytes(b""), "is empty,"),
        (lambda p: [p.mkdir(), (p / "a").write_bytes(b"\0"), (p / "b").write_bytes(b"")], "is empty or binary,"),
        (lambda p: [p.mkdir(), (p / "a").write_bytes(b"\0" * 999)], "is empty or binary,"),
        (lambda p: p.write_bytes(b"too short"), r"leaves \d+ training bytes, must leave at least 34"),
    ],
)
def test_unusable_text(tmp_path: Path, make: object, message: str) -> None:
    path = tmp_path / "text"
    make(path)  # type: ignore[operator]
    with pytest.raises(data.DataError, match=message) as caught:
        data.load(path, 16)
    assert str(path) in str(caught.value)


def test_unreadable_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("text")

    def refuse(self: Path) -> bytes:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(data.DataError, match=r"a\.txt cannot be read: Permission denied"):
        data.load(tmp_path, 16)


def test_too_much_text(tmp_path: Path) -> None:
    """Nothing of it is read: a file with a hole is as good as one of so many bytes."""
    (tmp_path / "a.txt").touch()
    os.truncate(tmp_path / "a.txt", data.MAX_BYTES + 1)
    with pytest.raises(data.DataError, match=f"is {2**31 + 1} bytes, must be at most {2**31}"):
        data.load(tmp_path, 16)
