"""Two processes of one gloo group that do the jobs of many tests: torch is imported once, the group is made once.

A test takes the fixture `pair` and sends it a job, a function at the top level of a module:

    def job(rank, folder):
        ...

    def test_two_processes(pair, tmp_path):
        of_rank_0, of_rank_1 = pair.run(job, tmp_path)

Both processes import the job by its name and call it with their rank. The default group is there, the environment is
that of torchrun, and every job starts with the same seeds, working directory, environment and filters of warnings.
What a job takes and returns has to be picklable.
"""

from __future__ import annotations

import contextlib
import faulthandler
import multiprocessing
import os
import pickle
import random
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

SIZE = 2
#: Seconds until a job counts as hung.
LIMIT = 300.0
#: Seconds that a process has left when the other one failed: it may be waiting for it in a collective.
GRACE = 10.0


class JobFailed(Exception):
    """A job raised, hung or took its process along; the message says in which rank, and where."""


class Pair:
    """Two processes, started at the first job, and anew at the first one after a failure."""

    def __init__(self) -> None:
        self._ranks: list[_Rank] = []
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def run(self, job: Callable[..., Any], *args: Any, limit: float = LIMIT) -> list[Any]:
        """Call ``job(rank, *args)`` in both processes and return what each returned, by rank.

        Args:
            job: a function at the top level of a module.
            args: for the job; picklable.
            limit: seconds after which the job counts as hung.

        Raises:
            JobFailed: if a process raised, hung or ended. The next job gets two new processes.
        """
        message = sys.path, pickle.dumps((job, args))  # apart: without the path the job may not be found
        if not self._ranks:
            self._folder = tempfile.TemporaryDirectory()
            self._ranks = [_Rank(number, Path(self._folder.name)) for number in range(SIZE)]
        for rank in self._ranks:
            with contextlib.suppress(BrokenPipeError):  # it has ended, which `_collect` will see
                rank.connection.send(message)
        self._collect(limit)
        if problems := [f"rank {rank.number} {rank.problem}" for rank in self._ranks if rank.problem]:
            self.close()
            name = f"{job.__module__}.{job.__qualname__}"
            raise JobFailed("\n".join([f"{name} failed; the next job gets two new processes", *problems]))
        return [pickle.loads(rank.result) for rank in self._ranks]

    def close(self) -> None:
        """End the processes."""
        for rank in self._ranks:
            rank.connection.close()  # a process that waits for a job ends
        for rank in self._ranks:
            rank.process.join(0 if rank.problem else GRACE)
            rank.process.kill()
            rank.process.join()
        self._ranks = []
        if self._folder is not None:
            self._folder.cleanup()

    def _collect(self, limit: float) -> None:
        """Wait until each process has answered, or for GRACE after one that failed."""
        waiting = {rank.connection: rank for rank in self._ranks}
        end = time.monotonic() + limit
        while waiting:
            ready = wait(list(waiting), max(0.0, end - time.monotonic()))
            if not ready:
                for rank in waiting.values():
                    rank.kill()
                return
            for connection in ready:
                rank = waiting.pop(connection)  # type: ignore[arg-type, call-overload]
                rank.receive()
                if rank.problem:
                    end = min(end, time.monotonic() + GRACE)


class _Rank:
    """One of the processes, seen from the test."""

    def __init__(self, number: int, folder: Path) -> None:
        context = multiprocessing.get_context("spawn")
        self.number, self.stacks = number, folder / f"stacks-{number}"
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(number, theirs, folder, self.stacks), daemon=True)
        self.process.start()
        theirs.close()  # so that the process's end is the end of the connection
        self.result, self.problem = b"", ""

    def receive(self) -> None:
        """Take the answer, or learn how the process ended."""
        try:
            self.result, self.problem = self.connection.recv()
        except (EOFError, OSError):
            self.process.join(GRACE)
            code = self.process.exitcode or 0
            self.problem = "ended " + (f"by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}")

    def kill(self) -> None:
        """End a process that hangs, and keep the stacks of its threads."""
        os.kill(self.process.pid or 0, signal.SIGUSR1)
        time.sleep(1)
        self.process.kill()
        where = self.stacks.read_text() if self.stacks.exists() else ""
        self.problem = f"did not end in time and was killed. It was here:\n{where}"


def _serve(number: int, connection: Connection, folder: Path, stacks: Path) -> None:
    """Join the group, and do jobs until the other side is gone."""
    with stacks.open("w") as dump:
        faulthandler.register(signal.SIGUSR1, dump)
        os.environ.update(RANK=str(number), LOCAL_RANK=str(number), WORLD_SIZE=str(SIZE), LOCAL_WORLD_SIZE=str(SIZE))
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29500", OMP_NUM_THREADS="1")
        import torch
        import torch.distributed as dist

        torch.set_num_threads(1)
        # They meet in a file: a port could be taken.
        dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=number, world_size=SIZE)
        with contextlib.suppress(EOFError, OSError):
            while True:
                sys.path[:], job = connection.recv()
                connection.send(_answer(number, job))
    # Without the interpreter's end: a thread of gloo that asks for its lock then aborts the process.
    os._exit(0)


def _answer(number: int, message: bytes) -> tuple[bytes, str]:
    """Do a job; return its pickled result, and what went wrong."""
    import torch
    import torch.distributed as dist

    folder, environment = os.getcwd(), dict(os.environ)
    random.seed(0)
    torch.manual_seed(0)
    try:
        with warnings.catch_warnings():
            job, args = pickle.loads(message)
            result = pickle.dumps(job(number, *args))
        dist.barrier()  # both are done, files written included, and the group is whole
        return result, ""
    except BaseException:  # pytest's own are no Exception
        return b"", f"raised\n{traceback.format_exc()}"
    finally:
        os.chdir(folder)
        os.environ.clear()
        os.environ.update(environment)
