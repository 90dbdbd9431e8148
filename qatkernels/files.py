"""Crash-safe file I/O: tensors as safetensors, everything else as JSON, never pickle.

A file is written to a temporary file beside its destination, flushed to the disk (fsync) and renamed over it. So a
reader finds either the old or the new content, even if the process is killed. A file of tensors also has a header with
values that belong to them, such as the step, and a digest of tensors and header. A JSON file that is read again has a
digest as one of its fields: JSON with a flipped bit in a number would still be valid JSON.
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
    """A file or folder cannot be read, written or used; the message names it and says what to do."""


class DamagedError(CheckpointError):
    """A file is damaged: its content is not what was written."""

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
    # A random name, so that no file of the user, such as OUT.tmp, is overwritten.
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
    with explained("written", path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            with open(temporary, "r+b") as file:
                os.fsync(file.fileno())
            rename(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)  # especially on a full disk
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
    """Delete temporary files of :func:`write`, left by killed processes, in a folder and its direct subfolders.

    No process may be writing there.

    Raises:
        CheckpointError: if a file cannot be deleted.
    """
    with explained("deleted", folder):
        for path in (*folder.glob("*.tmp"), *folder.glob("*/*.tmp")):
            if _TEMPORARY.fullmatch(path.name) and path.is_file():
                path.unlink()


def rename(temporary: Path, path: Path) -> None:
    """Rename a file or folder to its final name, durably. Its content must be on the disk already.

    Raises:
        CheckpointError: if it cannot be renamed.
    """
    with explained("written", path):
        os.replace(temporary, path)
        if os.name == "posix":
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)


#: The field of a JSON file with the digest of its other fields.
_SEAL = "digest"


def write_json(path: Path, value: Any, *, sealed: bool = False, indent: int | None = 2) -> None:
    """Write JSON with :func:`write`.

    Args:
        path: destination.
        value: a JSON-able value.
        sealed: whether to add a digest, which :func:`read_json` checks; ``value`` must then be a mapping.
        indent: as for ``json.dumps``.
    """
    if sealed:
        value = {**value, _SEAL: _digest_of_json(value)}
    write(path, (json.dumps(value, indent=indent, allow_nan=False) + "\n").encode())


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object. Its digest, if it has one, is checked and not returned.

    Raises:
        CheckpointError: if the file is missing, unreadable or damaged.
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
    """Return the SHA-256 of a JSON-able value, independent of the order of fields and of white space."""
    return hashlib.sha256(json.dumps(json.loads(json.dumps(value)), sort_keys=True).encode()).hexdigest()


def save(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, Any] | None = None) -> None:
    """Write tensors, and a JSON-able header with them, in one file.

    Args:
        path: destination, a ``.safetensors`` file.
        tensors: tensors by name, on any device.
        header: values that are stored in the same file.

    Raises:
        CheckpointError: if the file cannot be written.
    """
    from safetensors.torch import save as to_bytes

    tensors = {name: t.detach().to("cpu", copy=True).contiguous() for name, t in tensors.items()}
    text = json.dumps(dict(header or {}))
    write(path, to_bytes(tensors, {"header": text, "sha256": digest(tensors, text)}))


def load(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a file of :func:`save`.

    Returns:
        Tensors by name, on the CPU, and the header.

    Raises:
        CheckpointError: if the file is missing, unreadable or damaged, or :func:`save` did not write it.
    """
    with open_tensors(path) as file:
        metadata = file.metadata() or {}
        if not {"header", "sha256"} <= metadata.keys():
            raise CheckpointError(f"{path} is not a file of qatkernels: it has no header, or no digest of it")
        tensors = _read(path, file)
    if metadata["sha256"] != digest(tensors, metadata["header"]):
        raise DamagedError(path, "its digest does not match")
    return tensors, _parsed(path, metadata["header"])


def _read(path: Path, file: Any) -> dict[str, Tensor]:
    """Return the tensors of an open safetensors file, in memory of their own, which is all that this takes.

    ``file.get_tensor`` maps the file into memory: what is read counts as memory of the process until it is closed, and
    replacing or truncating the file would change the tensors.
    """
    kinds = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    kinds |= {"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8}
    kinds |= {"U8": torch.uint8, "BOOL": torch.bool}
    tensors: dict[str, Tensor] = {}
    with explained("read", path), open(path, "rb") as data:
        length = int.from_bytes(data.read(8), "little")
        entries = json.loads(data.read(length))
        for name in file.keys():  # noqa: SIM118
            entry = entries[name]
            if entry["dtype"] not in kinds:
                tensors[name] = file.get_tensor(name).clone()
                continue
            tensors[name] = tensor = torch.empty(entry["shape"], dtype=kinds[entry["dtype"]])
            begin, end = entry["data_offsets"]
            data.seek(8 + length + begin)
            if data.readinto(tensor.view(-1).view(torch.uint8).numpy().data) != end - begin:
                raise DamagedError(path, "it ends too early")
    return tensors


def header(path: Path) -> dict[str, Any]:
    """Read the header of a file of :func:`save`. Tensors are not read, so the digest is not checked.

    Raises:
        CheckpointError: if the file is missing or unreadable, or :func:`save` did not write it.
    """
    with open_tensors(path) as file:
        return _parsed(path, (file.metadata() or {}).get("header", "null"))


@contextlib.contextmanager
def open_tensors(path: Path) -> Iterator[Any]:
    """Open any safetensors file for reading, as ``safetensors.safe_open`` does.

    Raises:
        CheckpointError: if the file is missing or unreadable.
        DamagedError: if it is not a valid safetensors file.
    """
    from safetensors import SafetensorError, safe_open  # imported here, so that training needs torch alone

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
    """Return the SHA-256 of CPU tensors (names, dtypes, shapes and bits) and a text, in hexadecimal."""
    sha256 = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        sha256.update(f"{name} {tensors[name].dtype} {tuple(tensors[name].shape)}\n".encode())
        sha256.update(tensors[name].reshape(-1).view(torch.uint8).numpy().data)
    return sha256.hexdigest()


@contextlib.contextmanager
def explained(verb: str, path: Path) -> Iterator[None]:
    """Turn an OSError into a CheckpointError that names the path.

    Args:
        verb: what is done with the path, as a participle such as ``"written"``.
        path: the path.
    """
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"{path} cannot be {verb}: {error.strerror or error}") from error
