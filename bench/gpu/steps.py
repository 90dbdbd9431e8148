"""A call: steps that run one after the other. Each is a process with a time limit; a journal records the outcome."""

from __future__ import annotations

import collections
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from ..codes import DOOMED
from ..journal import Journal, Record
from .target import CACHE, ROOT

#: How many last lines of a failed step's output its record has.
_TAIL = 25
#: Seconds between asking a process to stop and ending it, and below which a step is not begun.
_GRACE, _LEAST = 5, 5
_LOG = "log.txt"


@dataclass(frozen=True)
class Step:
    """One process.

    Attributes:
        name: what the summary calls it.
        command: program and arguments, run in the root of the checkout.
        limit: seconds after which it is ended.
        env: what is added to the environment.
        log: file in the call's folder that gets its output; all steps share one by default.
    """

    name: str
    command: Sequence[str]
    limit: float
    env: Mapping[str, str] = field(default_factory=dict)
    log: str = _LOG


class Call:
    """What a call has: a folder for results, a journal in it, and a time by which it is over.

    Args:
        folder: gets the journal, the logs and the summary.
        seconds: how long the call may take.
        dry: whether this is a run on a machine without a GPU, to see that everything would run.
    """

    def __init__(self, folder: Path, seconds: float, dry: bool) -> None:
        self.folder, self.dry = folder.resolve(), dry
        self.journal = Journal(self.folder / "journal.jsonl")
        self._begun, self._end = time.monotonic(), time.monotonic() + seconds
        self._running: list[subprocess.Popen[str]] = []

    def left(self) -> float:
        """Return the seconds that are left."""
        return self._end - time.monotonic()

    def note(self, kind: str, record: Record) -> None:
        """Write to the journal."""
        self.journal.write(kind, record)

    def skip(self, name: str, why: str) -> None:
        """Record that a step is not run, and why."""
        print(f"== {name}: not run: {why}", flush=True)
        self.note("step", {"name": name, "status": "not run", "seconds": 0.0, "note": why})

    def run(self, step: Step) -> int | None:
        """Run a step and return its exit code; None where there was no time for it or it was ended."""
        # A dry run only shows that everything runs. The machine may be busy, so its time does not count.
        limit = min(step.limit * (5 if self.dry else 1), self.left())
        if limit < _LEAST:
            self.skip(step.name, "out of time")
            return None
        return self._finished(step, self._started(step), limit)

    def persist(self, step: Step, reserve: float = 0, attempts: int = 6) -> int | None:
        """Run a step; when its process loses the GPU, start it again. It continues after the case that caused that."""
        for attempt in range(1, attempts + 1):
            named = step if attempt == 1 else replace(step, name=f"{step.name}, process {attempt}")
            limit = min(step.limit, self.left() - reserve)
            if limit < _LEAST:
                self.skip(named.name, "out of time")
                return None
            code = self.run(replace(named, limit=limit))
            if code != DOOMED:
                return code
        return DOOMED

    def run_together(self, steps: Sequence[Step]) -> None:
        """Run steps at the same time."""
        begun = [(step, self._started(step)) for step in steps]
        for step, process in begun:
            self._finished(step, process, min(step.limit, max(self.left(), 1)))

    def run_under(self, step: Step, tool: Sequence[str]) -> int | None:
        """Run a step under a tool. A dry run runs it without the tool."""
        if self.dry:
            return self.run(replace(step, name=f"{step.name} (without {tool[0]})"))
        if shutil.which(tool[0]) is None:
            self.skip(step.name, f"{tool[0]} is not installed")
            return None
        return self.run(replace(step, command=(*tool, *step.command)))

    def stop(self) -> None:
        """Kill the processes that are running."""
        for process in self._running:
            _signal(process, signal.SIGKILL)

    def _started(self, step: Step) -> subprocess.Popen[str]:
        print(f"== {step.name} (at {time.monotonic() - self._begun:.0f} s)", flush=True)
        environment = {
            **os.environ, "PYTHONUNBUFFERED": "1", "TRITON_CACHE_DIR": str(CACHE),
            "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))), **step.env,
        }  # fmt: skip
        process = subprocess.Popen(
            step.command, cwd=ROOT, env=environment, text=True, errors="replace", stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            preexec_fn=os.setpgrp,  # its own process group, so that the time limit also kills what the step started
        )  # fmt: skip
        self._running.append(process)
        return process

    def _finished(self, step: Step, process: subprocess.Popen[str], limit: float) -> int | None:
        began, late = time.monotonic(), threading.Event()

        def end() -> None:
            late.set()
            _signal(process, signal.SIGINT)
            time.sleep(_GRACE)
            _signal(process, signal.SIGKILL)  # also the processes that the step started, which keep its output open

        watchdog = threading.Timer(limit, end)
        watchdog.daemon = True
        watchdog.start()
        tail: collections.deque[str] = collections.deque(maxlen=_TAIL)
        assert process.stdout is not None
        with (self.folder / step.log).open("a") as log:
            log.write(f"== {step.name}\n")
            for line in process.stdout:
                log.write(line)
                log.flush()
                tail.append(line.rstrip())
                if step.log == _LOG:
                    sys.stdout.write(line)
                    sys.stdout.flush()
        code = process.wait()
        watchdog.cancel()
        _signal(process, signal.SIGKILL)
        self._running.remove(process)
        status = "ended at its limit" if late.is_set() else "ok" if code == 0 else "failed"
        record = {"name": step.name, "status": status, "code": code, "seconds": round(time.monotonic() - began, 1)}
        self.note("step", record if code == 0 else record | {"note": "\n".join(tail)[-3000:]})
        return None if late.is_set() else code


def _signal(process: subprocess.Popen[str], number: int) -> None:
    """Send a signal to the remaining processes of a group."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)
