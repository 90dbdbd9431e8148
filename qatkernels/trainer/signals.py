"""Delays SIGINT and SIGTERM to the end of a training step."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any


class Interrupted(Exception):
    """A signal stopped the run after a checkpoint was written."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.number = number


class Stop:
    """Stores SIGINT and SIGTERM in a flag, which the loop reads between steps. A second signal acts at once.

    Attributes:
        number: the signal that arrived, or None.
    """

    def __enter__(self) -> Stop:
        self.number: int | None = None
        self._before: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():
            self._before = {s: signal.signal(s, self._store) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def _store(self, number: int, frame: FrameType | None) -> None:
        self.number = number
        signal.signal(number, self._before[number])

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
