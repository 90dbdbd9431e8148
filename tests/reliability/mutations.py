"""Files that are damaged, of another program, or forged. Each must be refused by name, or be read as what it says.

Each target runs in its own process, so that a crash is a failure of the case that was being read. A case also fails if
it computes for `LIMIT` seconds, does not end within `PATIENCE` seconds, needs more than `ROOM` bytes more than the
cases before it, unpickles, starts a program or opens a connection.
"""

from __future__ import annotations

import os
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from multiprocessing import shared_memory
from pathlib import Path
from typing import Any

from .runner import Campaign, Wrong

CASES = 10_000
LIMIT, PATIENCE = 20, 600
ROOM = 256 << 20
_FORBIDDEN = ("pickle.find_class", "subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "socket.connect")


class _Watch:
    """Raises an error if the process does something forbidden while it reads a file."""

    def __init__(self) -> None:
        self.seen: list[str] = []
        self.on = False
        self.may_unpickle: tuple[str, ...] = ()
        sys.addaudithook(self._hook)
        limit = _status("VmSize") + (8 << 30)
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))

    def _hook(self, event: str, arguments: Any) -> None:
        if self.on and event in _FORBIDDEN:
            frame = sys._getframe()
            while event == "pickle.find_class" and frame is not None:
                if frame.f_globals.get("__name__") in self.may_unpickle:
                    return
                frame = frame.f_back  # type: ignore[assignment]
            self.seen.append(event)
            raise Wrong(f"{event} {arguments!r:.100}")

    def __enter__(self) -> None:
        Path("/proc/self/clear_refs").write_text("5")  # reset the peak of the resident memory
        self.before, self.asked = _status("VmRSS"), _status("VmPeak")
        self.on = True
        signal.setitimer(signal.ITIMER_PROF, LIMIT)
        signal.alarm(PATIENCE)

    def __exit__(self, *_: object) -> None:
        signal.alarm(0)
        signal.setitimer(signal.ITIMER_PROF, 0)
        self.on = False
        if self.seen:
            raise Wrong(f"forbidden: {self.seen.pop()}")
        for name, before in (("VmHWM", self.before), ("VmPeak", self.asked)):
            if (more := _status(name) - before) > ROOM:
                raise Wrong(f"{name} rose by {more >> 20} MiB")


def _status(name: str) -> int:
    """Return a field of /proc/self/status in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) << 10
    raise KeyError(name)


def _try(campaign: Campaign, name: str, target: Any, case: int, watch: _Watch) -> str:
    """Run one case and return how it ended: refused or right; raise Wrong otherwise."""
    draw = campaign.draw(name, case)
    content = draw.choice(target.ways)(target.original, draw)
    target.file.write_bytes(content)
    found: Any = None
    caught: BaseException | None = None
    with watch:
        try:
            found = target.read(case)
        except Wrong:
            raise
        except Exception as error:
            caught = error
    if caught is None:
        return target.right(content, found) or "right"
    if not isinstance(caught, target.errors):
        where = traceback.extract_tb(caught.__traceback__)[-1]
        raise Wrong(f"{type(caught).__name__} at {Path(where.filename).name}:{where.lineno}: {str(caught)!r:.200}")
    if not any(text in str(caught) for text in target.names):
        raise Wrong(f"the error does not name the file: {str(caught)!r:.300}")
    if isinstance(caught.__cause__, MemoryError) or "allocate" in str(caught):
        raise Wrong(f"much memory was asked for: {str(caught)!r:.200}")
    return "refused"


def _work(campaign: Campaign, name: str, kind: type[Any], first: int, cases: int, counts: Any) -> None:
    """Run the reading process: count the cases in shared memory, and print failures."""
    import torch

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    folder = Path(tempfile.mkdtemp(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None))
    failed = os.fdopen(os.open(campaign.failed, os.O_WRONLY | os.O_APPEND), "w")  # type: ignore[attr-defined]
    try:
        target = kind(folder)
        watch = _Watch()
        watch.may_unpickle = target.may_unpickle
        for case in campaign.numbers(name, cases) if first == 0 else range(first, cases):
            counts[0] = case + 1
            try:
                counts[1 if _try(campaign, name, target, case, watch) == "refused" else 2] += 1
            except Wrong as wrong:
                failed.write(f"{case} {' '.join(str(wrong).split())}\n")
                failed.flush()
                counts[3] += 1
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def run(campaign: Campaign, targets: dict[str, type[Any]] | None = None) -> None:
    """Run the cases of the given targets, or of all."""
    if targets is None:
        from .targets import TARGETS, warm

        warm()
        targets = dict(TARGETS)
    kinds = targets
    campaign.each(kinds, lambda name: _target(campaign, name, kinds[name]))


def _target(campaign: Campaign, name: str, kind: type[Any]) -> dict[str, Any]:
    began, cases = time.monotonic(), campaign.cases or CASES
    room = shared_memory.SharedMemory(create=True, size=64)
    counts = room.buf.cast("q")
    counts[:4] = memoryview(bytearray(32)).cast("q")
    descriptor, campaign.failed = tempfile.mkstemp()  # type: ignore[attr-defined]
    os.close(descriptor)
    crashes, first = 0, campaign.case or 0
    try:
        while True:
            sys.stdout.flush()
            if (pid := os.fork()) == 0:
                code = 1
                try:
                    signal.signal(signal.SIGALRM, signal.SIG_DFL)
                    _work(campaign, name, kind, 0 if campaign.case is not None else first, cases, counts)
                    code = 0
                except BaseException:
                    traceback.print_exc()
                finally:
                    sys.stdout.flush()
                    sys.stderr.flush()
                    os._exit(code)
            status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            done = counts[0]
            for line in Path(campaign.failed).read_text().splitlines():  # type: ignore[attr-defined]
                case, why = line.split(" ", 1)
                campaign.fail(name, int(case), why)
            Path(campaign.failed).write_text("")  # type: ignore[attr-defined]
            if status == 0:
                break
            crashes += 1
            how = signal.Signals(-status).name if status < 0 else f"exit code {status}"
            campaign.fail(
                name,
                done - 1,
                f"the process ended with {how}" + (", too slow" if how in ("SIGALRM", "SIGPROF") else ""),
            )
            first = done
            if campaign.case is not None or crashes > 20 or done == 0:
                break
        seconds = time.monotonic() - began
        return {
            "cases": counts[1] + counts[2] + counts[3] + crashes, "refused": counts[1], "right": counts[2],
            "wrong": counts[3] + crashes, "seconds": round(seconds, 1),
        }  # fmt: skip
    finally:
        counts.release()
        room.close()
        room.unlink()
        os.unlink(campaign.failed)  # type: ignore[attr-defined]
