"""What is known, on disk the moment it is known: one JSON object a line, so that a killed run loses nothing."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path
from typing import Any

Record = dict[str, Any]


class Journal:
    """A file of JSON lines that several processes write one after the other.

    Args:
        path: the file; made, with its folder, if it is not there.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._file = path.open("a")
        self._lock = threading.Lock()

    def write(self, kind: str, record: Record) -> None:
        """Append a record and wait until it is on the disk."""
        line = json.dumps({"kind": kind, **record}, allow_nan=False)
        with self._lock:
            self._file.write(line + "\n")
            self._file.flush()
            os.fsync(self._file.fileno())


def read(path: Path, *kinds: str) -> list[Record]:
    """Return the records of some kinds, all of them by default.

    A line that ends in the middle is what a killed process was writing; it is left out. No file has no records.
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
