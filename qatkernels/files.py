"""Files that a kill at any moment leaves whole: tensors as safetensors, the rest as JSON, never pickle.

A file is written beside its destination, flushed to the disk and renamed over it, so that a reader finds the old file
or the new one. What belongs to the tensors (the step, say) travels in the same file, in its header, with a digest of
tensors and header. JSON that is read again has a digest too, as one of its fields: a bit that flips in a number leaves
JSON that is as good as any.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import secrets
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


class CheckpointError(RuntimeError):
    """A file or folder cannot be read, written or used; the message says which and what to do."""


class DamagedError(CheckpointError):
    """The content of a file is not what was written."""

    def __init__(self, path: Path, why: object) -> None:
        self.what = f"{path} is damaged ({why})"
        super().__init__(f"{self.what}; delete it and make it again")


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield the path of a new file beside another one, which it replaces, durably, when the context ends.

    If the context ends by an error, the new file is deleted and the other one stays.

    Raises:
        CheckpointError: if the folder cannot be written to or the disk is full.
    """
    # A name that nobody has: what a user calls OUT.tmp is the user's.
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
    with explained("written", path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            with open(temporary, "r+b") as file:
                os.fsync(file.fileno())
            rename(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)  # on a full disk it is what takes the room
            raise


def write(path: Path, content: bytes) -> None:
    """Replace a file's content atomically and durably, creating its folder.

    Raises:
        CheckpointError: if the folder cannot be written to or the disk is full.
    """
    with replacing(path) as temporary, open(temporary, "xb") as file:
        file.write(content)


_TEMPORARY = re.compile(r".+\.[0-9a-f]{8}\.tmp")


def sweep(folder: Path) -> None:
    """Delete what kills left of :func:`write` in a folder and the folders in it; nobody may be writing there.

    Raises:
        CheckpointError: if a file cannot be deleted.
    """
    with explained("deleted", folder):
        for path in (*folder.glob("*.tmp"), *folder.glob("*/*.tmp")):
            if _TEMPORARY.fullmatch(path.name) and path.is_file():
                path.unlink()


def rename(temporary: Path, path: Path) -> None:
    """Give a file or folder that is on the disk its name, durably.

    Raises:
        CheckpointError: if that is not possible.
    """
    with explained("written", path):
        os.replace(temporary, path)
        if os.name == "posix":
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)


#: The field of a JSON file that holds the digest of its others.
_SEAL = "digest"


def write_json(path: Path, value: Any, *, sealed: bool = False, indent: int | None = 2) -> None:
    """Write JSON like :func:`write`.

    Args:
        path: destination.
        value: a JSON-able value.
        sealed: whether to add a digest, which :func:`read_json` holds the file against; ``value`` is a mapping then.
        indent: as for ``json.dumps``.
    """
    if sealed:
        value = {**value, _SEAL: _digest_of_json(value)}
    write(path, (json.dumps(value, indent=indent, allow_nan=False) + "\n").encode())


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; its digest, if it has one, is checked and left out.

    Raises:
        CheckpointError: if it is missing, unreadable or damaged.
    """
    with explained("read", path):
        text = path.read_bytes()
    try:
        value = json.loads(text)
        if isinstance(value, dict) and _SEAL in value and value.pop(_SEAL) != _digest_of_json(value):
            raise DamagedError(path, "its digest does not match: it is not what was written")
    except (ValueError, RecursionError) as error:
        raise DamagedError(path, error) from error
    if not isinstance(value, dict):
        raise DamagedError(path, f"it holds {type(value).__name__}, must be a JSON object")
    return value


def _digest_of_json(value: Any) -> str:
    """Return the SHA-256 of a value as it is read again, whatever the order of its fields and the space between."""
    return hashlib.sha256(json.dumps(json.loads(json.dumps(value)), sort_keys=True).encode()).hexdigest()


def save(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, Any] | None = None) -> None:
    """Write tensors, and a JSON-able header with them, in one file.

    Args:
        path: destination, a ``.safetensors`` file.
        tensors: tensors by name, on any device.
        header: whatever must never be apart from the tensors.

    Raises:
        CheckpointError: if it cannot be written.
    """
    from safetensors.torch import save as to_bytes

    tensors = {name: t.detach().to("cpu", copy=True).contiguous() for name, t in tensors.items()}
    text = json.dumps(dict(header or {}))
    write(path, to_bytes(tensors, {"header": text, "sha256": digest(tensors, text)}))


def load(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what :func:`save` wrote.

    Returns:
        Tensors by name, on the CPU, and the header.

    Raises:
        CheckpointError: if the file is missing, unreadable, cut short, changed, or not from here.
    """
    with open_tensors(path) as file:
        metadata = file.metadata() or {}
        if not {"header", "sha256"} <= metadata.keys():
            raise CheckpointError(f"{path} is not a file of qatkernels: it has no header, or no digest of it")
        # Cloned: a mapped file may be replaced or truncated under its tensors.
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    if metadata["sha256"] != digest(tensors, metadata["header"]):
        raise DamagedError(path, "its digest does not match")
    return tensors, _parsed(path, metadata["header"])


def header(path: Path) -> dict[str, Any]:
    """Read the header that :func:`save` wrote, without the tensors and hence without their digest.

    Raises:
        CheckpointError: if the file is missing, unreadable, cut short, or not from here.
    """
    with open_tensors(path) as file:
        return _parsed(path, (file.metadata() or {}).get("header", "null"))


@contextlib.contextmanager
def open_tensors(path: Path) -> Iterator[Any]:
    """Open any safetensors file to read, as ``safetensors.safe_open`` does.

    Raises:
        CheckpointError: if it is missing or unreadable.
        DamagedError: if it is no such file.
    """
    from safetensors import SafetensorError, safe_open  # here: who only trains needs torch alone

    try:
        with explained("read", path), safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise DamagedError(path, error) from error


def _parsed(path: Path, text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DamagedError(path, error) from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} has a header that is {type(value).__name__}, must be a JSON object")
    return value


def digest(tensors: Mapping[str, Tensor], text: str = "") -> str:
    """Return the SHA-256 of tensors on the CPU (names, dtypes, shapes and bits) and a text, in hexadecimal."""
    found = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        found.update(f"{name} {tensors[name].dtype} {tuple(tensors[name].shape)}\n".encode())
        found.update(tensors[name].reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


@contextlib.contextmanager
def explained(verb: str, path: Path) -> Iterator[None]:
    """Turn an operating system's error into a CheckpointError that names the path."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"{path} cannot be {verb}: {error.strerror or error}") from error
