"""An append-only file of JSON lines. Every record is on disk when `write` returns, so a killed run loses nothing."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path
from typing import Any

Record = dict[str, Any]


class Journal:
    """A file of JSON lines. Several processes may append to it.

    Args:
        path: the file. It is created, with its folder, if it does not exist.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._file = path.open("a")
        if _has_open_line(path):
            self._file.write("\n")
        self._lock = threading.Lock()

    def write(self, kind: str, record: Record) -> None:
        """Append a record, and wait until it is on disk."""
        line = json.dumps({"kind": kind, **record}, allow_nan=False)
        with self._lock:
            self._file.write(line + "\n")
            self._file.flush()
            os.fsync(self._file.fileno())


def _has_open_line(path: Path) -> bool:
    """Whether a killed process left a line without its end, which would swallow the next record."""
    with path.open("rb") as file:
        if file.seek(0, os.SEEK_END) == 0:
            return False
        file.seek(-1, os.SEEK_END)
        return file.read(1) != b"\n"


def read(path: Path, *kinds: str) -> list[Record]:
    """Return the records of the given kinds, or all of them.

    An incomplete line is skipped: a process was killed while it wrote it. A file that does not exist has no records.
    """
    if not path.exists():
        return []
    records = []
    for line in path.read_text(errors="replace").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and (not kinds or record.get("kind") in kinds):
            records.append(record)
    return records
