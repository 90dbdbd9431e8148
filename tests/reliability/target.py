"""One kind of file that is mutated: how the library reads it, and which results are right for a changed file.

`read` returns the library's result for a file, or raises one of the documented errors. `right` raises :class:`Wrong` if
the result is not right: for a file with a digest only the original is right; for others, what an independent parser
finds in the changed bytes.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qatkernels import files
from qatkernels.trainer import (  # fmt: skip
    CheckpointError,
)

from . import mutate
from .runner import Wrong

Way = Callable[[bytes, random.Random], bytes]
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


class Target:
    """One file and its reader.

    Attributes:
        file: the file that is changed.
        errors: exceptions that reading may raise.
        names: texts; an error message must contain one of them, usually the name of the file.
        ways: functions that change it.
    """

    errors: tuple[type[Exception], ...] = (CheckpointError,)
    ways: tuple[Way, ...] = (mutate.mutated_bytes,)
    #: Modules that may unpickle, because they do not read the file.
    may_unpickle: tuple[str, ...] = ()
    file: Path

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.make()
        self.original = self.file.read_bytes()
        self.names: tuple[str, ...] = (str(self.file),)
        self.prepare()

    def make(self) -> None:
        """Write the file and everything else that its reader needs; set ``file``."""

    def prepare(self) -> None:
        """Read the original, for comparison."""
        self.wanted = self.read(0)

    def read(self, case: int) -> Any:
        """Read the file as the library does."""

    def right(self, content: bytes, found: Any) -> str | None:
        """Raise Wrong unless this is the original. Return how the case counts, if not as right."""
        if found != self.wanted:
            raise Wrong(f"read as something else: {difference(found, self.wanted)}")


def difference(found: Any, wanted: Any) -> str:
    """Return where two values differ, in a few words."""
    if isinstance(found, dict) and isinstance(wanted, dict):
        for key in [*wanted, *(key for key in found if key not in wanted)]:
            if (mine := found.get(key, "nothing")) != (theirs := wanted.get(key, "nothing")):
                return f"{key}: {difference(mine, theirs)}"
    return f"{found!r:.200} for {wanted!r:.200}"


def bits_of(tensors: dict[str, Any]) -> dict[str, str]:
    """Return a digest of each tensor: dtype, shape and bits."""
    return {name: files.digest({"": t.detach()}) for name, t in tensors.items() if isinstance(t, Tensor)}


def decoded(content: bytes) -> dict[str, Tensor]:
    """Read a safetensors file without its library."""
    header, data_ = mutate.split_safetensors(content)
    tensors = {}
    for name, entry in header.items():
        if name != "__metadata__":
            start, end = entry["data_offsets"]
            raw, dtype = bytearray(data_[start:end]), _DTYPES[entry["dtype"]]
            flat = torch.frombuffer(raw, dtype=dtype) if raw else torch.empty(0, dtype=dtype)
            tensors[name] = flat.reshape(entry["shape"])
    return tensors


def resealed(content: bytes, draw: random.Random) -> bytes:
    """Change the header of the package, or swap the contents of two tensors, and write a matching digest."""
    header, data_ = mutate.split_safetensors(content)
    about = json.loads(header["__metadata__"]["header"])
    about = mutate.mutated_value(about, draw)
    text = json.dumps(about)
    header["__metadata__"] = {
        "header": text, "sha256": files.digest(decoded(content), text)
    }  # fmt: skip
    return mutate.join_safetensors(header, data_)


def is_resealed(content: bytes, original: bytes) -> bool:
    """Return whether a file has a changed header and a matching digest."""
    try:
        mine = mutate.split_safetensors(content)[0]["__metadata__"]
        theirs = mutate.split_safetensors(original)[0]["__metadata__"]
        return bool(mine["header"] != theirs["header"] and mine["sha256"] != theirs["sha256"])
    except (ValueError, KeyError, TypeError):
        return False


TENSORS: tuple[Way, ...] = (
    mutate.mutated_bytes, mutate.mutated_bytes, mutate.swapped_tensors, mutate.crafted_header, resealed,
)  # fmt: skip
