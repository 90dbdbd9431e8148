"""A pytest plugin that writes outcomes at once to the journal that QATKERNELS_JOURNAL names."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from ..journal import Journal

#: The counts are written after so many outcomes.
_BATCH = 50


class Recorder:
    """Writes each failure at once, and the counts from time to time."""

    def __init__(self, path: Path) -> None:
        self.journal = Journal(path)
        self.counts = {"passed": 0, "failed": 0, "skipped": 0}
        self.slowest: list[tuple[float, str]] = []
        self.begun = time.monotonic()

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Count a test, and write a record if it failed."""
        if report.when != "call" and report.outcome == "passed":
            return
        self.counts[report.outcome] += 1
        self.slowest = sorted([*self.slowest, (round(report.duration, 2), report.nodeid)], reverse=True)[:10]
        if report.outcome == "failed":
            self.journal.write("test", {"id": report.nodeid, "note": str(report.longrepr)[-1500:]})
        if sum(self.counts.values()) % _BATCH == 0:
            self.write(finished=False)

    def pytest_sessionfinish(self) -> None:
        """Write the last counts."""
        self.write(finished=True)

    def write(self, *, finished: bool) -> None:
        """Write the counts."""
        seconds = round(time.monotonic() - self.begun, 1)
        self.journal.write("tests", {**self.counts, "seconds": seconds, "finished": finished, "slowest": self.slowest})


def pytest_configure(config: Any) -> None:
    """Register the recorder in the main process only, not in the workers of xdist."""
    if "QATKERNELS_JOURNAL" in os.environ and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Recorder(Path(os.environ["QATKERNELS_JOURNAL"])))
