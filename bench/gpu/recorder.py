"""A pytest plugin that writes outcomes to the journal named by QATKERNELS_JOURNAL as they come in."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from ..journal import Journal

#: Outcomes after which the counts are written.
_BATCH = 50


class Recorder:
    """Failures at once, and counts now and then."""

    def __init__(self, path: Path) -> None:
        self.journal = Journal(path)
        self.counts = {"passed": 0, "failed": 0, "skipped": 0}
        self.slowest: list[tuple[float, str]] = []
        self.begun = time.monotonic()

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Count a test, and write down one that failed."""
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
    """Record where outcomes arrive: not in the processes that xdist starts."""
    if "QATKERNELS_JOURNAL" in os.environ and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Recorder(Path(os.environ["QATKERNELS_JOURNAL"])))
