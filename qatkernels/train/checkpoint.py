"""Checkpoints that a kill at any moment leaves whole: tensors as safetensors, the rest as JSON, never pickle.

A file is written beside its destination, flushed to the disk and renamed over it, so that a reader finds the old file
or the new one. What belongs to the tensors (the step, say) travels in the same file, in its header, with a digest of
all bytes.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor

try:
    import fcntl
except ModuleNotFoundError:  # Windows
    fcntl = None  # type: ignore[assignment]


class CheckpointError(RuntimeError):
    """A checkpoint or folder cannot be read, written or used; the message says which and what to do."""


def write(path: Path, content: bytes) -> None:
    """Replace a file's content atomically and durably, creating its folder.

    Raises:
        CheckpointError: if the folder cannot be written to or the disk is full.
    """
    temporary = path.with_name(f"{path.name}.tmp")
    with explained("written", path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        if os.name == "posix":
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)


def write_json(path: Path, value: Any) -> None:
    """Write JSON like :func:`write`."""
    write(path, (json.dumps(value, indent=2, allow_nan=False) + "\n").encode())


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        CheckpointError: if it is missing, unreadable or damaged.
    """
    with explained("read", path):
        text = path.read_bytes()
    try:
        value = json.loads(text)
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged ({error}); delete it to start that part again") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds {type(value).__name__}, must be a JSON object")
    return value


def save(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, Any] | None = None) -> None:
    """Write tensors, and a JSON-able header with them, in one file.

    Args:
        path: destination, a ``.safetensors`` file.
        tensors: tensors by name, on any device.
        header: whatever must never be apart from the tensors.

    Raises:
        CheckpointError: if it cannot be written.
    """
    tensors = {name: t.detach().to("cpu", copy=True).contiguous() for name, t in tensors.items()}
    metadata = {"header": json.dumps(dict(header or {})), "sha256": _digest(tensors)}
    write(path, to_bytes(tensors, metadata))


def load(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what :func:`save` wrote.

    Returns:
        Tensors by name, on the CPU, and the header.

    Raises:
        CheckpointError: if the file is missing, unreadable, cut short or changed.
    """
    try:
        with explained("read", path), safe_open(path, framework="pt") as file:
            # Cloned: a mapped file may be replaced or truncated under its tensors.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
            metadata = file.metadata() or {}
    except SafetensorError as error:
        raise CheckpointError(f"{path} is damaged ({error}); delete it to start that part again") from error
    if metadata.get("sha256") != _digest(tensors):
        raise CheckpointError(f"{path} is damaged (its digest does not match); delete it to start that part again")
    return tensors, json.loads(metadata["header"])


def _digest(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].dtype} {tuple(tensors[name].shape)}\n".encode())
        digest.update(tensors[name].reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


@contextlib.contextmanager
def explained(verb: str, path: Path) -> Iterator[None]:
    """Turn an operating system's error into a CheckpointError that names the path."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"{path} cannot be {verb}: {error.strerror or error}") from error


@contextlib.contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Create a folder and keep other processes that ask the same out of it; a kill frees it.

    Raises:
        CheckpointError: if it is in use or cannot be created.
    """
    with explained("written", folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / ".lock", "w")  # noqa: SIM115
    with lock:
        if fcntl is not None:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise CheckpointError(
                    f"{folder} is in use by another run; wait for it or give another --out"
                ) from error
        yield


def remove_run(out: Path) -> None:
    """Delete the checkpoints and the log of the run in a folder, and nothing else.

    Raises:
        CheckpointError: if a file cannot be deleted.
    """
    if not (out / "run.json").exists():
        return
    with explained("deleted", out):
        for name in ("config.json", "model.safetensors", "state.safetensors"):
            for path in (*out.glob(f"fp*/{name}"), *out.glob(f"cooled*/{name}"), *out.glob(f"w*/{name}")):
                path.unlink()
        (out / "log.jsonl").unlink(missing_ok=True)
        # Last: without it the phases would be taken for finished ones of whatever run comes next.
        (out / "run.json").unlink()
