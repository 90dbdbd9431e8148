"""Processes of one gloo group that run the jobs of many tests. torch is imported and the group is made only once.

A test takes the fixture `pair` and sends it a job, a function at the top level of a module:

    def job(rank, folder):
        ...

    def test_two_processes(pair, tmp_path):
        of_rank_0, of_rank_1 = pair.run(job, tmp_path)

Both processes import the job by its name and call it with their rank. The default process group exists, and the
environment is that of torchrun. Every job starts with the same seeds, working directory, environment and warning
filters. Arguments and results of a job must be picklable. Where each process has a GPU of its own, the group also has
NCCL, and jobs that keep their model on :func:`device_of` run there. A test that needs another number of processes makes
:class:`Group` itself.
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

#: A job that takes more seconds than this counts as hung.
LIMIT = 300.0
#: Seconds that a process may continue after the other one failed. It may wait for the other in a collective.
GRACE = 10.0


def device_of(size: int) -> str:
    """Return where processes of a group can have sharded models: "cuda", by NCCL, if each has a GPU, else "cpu"."""
    import torch
    import torch.distributed as dist

    return "cuda" if dist.is_nccl_available() and torch.cuda.device_count() >= size else "cpu"


def on_cpu(value: Any) -> Any:
    """Return tensors (in lists, tuples, dicts) whole and on the CPU: those of a job, for a comparison."""
    import torch
    from torch.utils import _pytree

    def moved(leaf: Any) -> Any:
        full = leaf.full_tensor() if hasattr(leaf, "full_tensor") else leaf
        return full.detach().cpu() if isinstance(full, torch.Tensor) else full

    return _pytree.tree_map(moved, value)


class JobFailed(Exception):
    """A job raised an exception, hung, or killed its process. The message has the rank and the stack."""


class Group:
    """Processes of one group. They start with the first job, and again with the first job after a failure."""

    def __init__(self, size: int = 2) -> None:
        self.size = size
        self._ranks: list[_Rank] = []
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def run(self, job: Callable[..., Any], *args: Any, limit: float = LIMIT) -> list[Any]:
        """Call ``job(rank, *args)`` in every process and return what each returned, by rank.

        Args:
            job: a function at the top level of a module.
            args: for the job; picklable.
            limit: a job that takes more seconds than this counts as hung.

        Raises:
            JobFailed: if a process raised, hung or ended. The next job gets new processes.
        """
        message = sys.path, pickle.dumps((job, args))  # sent separately: without the path the job cannot be unpickled
        if not self._ranks:
            self._folder = tempfile.TemporaryDirectory()
            self._ranks = [_Rank(number, self.size, Path(self._folder.name)) for number in range(self.size)]
        for rank in self._ranks:
            with contextlib.suppress(BrokenPipeError):  # the process has ended; `_collect` reports it
                rank.connection.send(message)
        self._collect(limit)
        if problems := [f"rank {rank.number} {rank.problem}" for rank in self._ranks if rank.problem]:
            self.close()
            name = f"{job.__module__}.{job.__qualname__}"
            raise JobFailed("\n".join([f"{name} failed; the next job gets {self.size} new processes", *problems]))
        return [pickle.loads(rank.result) for rank in self._ranks]

    def close(self) -> None:
        """End the processes."""
        for rank in self._ranks:
            rank.connection.close()  # a process that waits for a job then ends
        for rank in self._ranks:
            rank.process.join(0 if rank.problem else GRACE)
            rank.process.kill()
            rank.process.join()
        self._ranks = []
        if self._folder is not None:
            self._folder.cleanup()

    def _collect(self, limit: float) -> None:
        """Wait until all processes have answered, or for GRACE seconds after one has failed."""
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

    def __init__(self, number: int, size: int, folder: Path) -> None:
        context = multiprocessing.get_context("spawn")
        self.number, self.stacks = number, folder / f"stacks-{number}"
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(number, size, theirs, folder, self.stacks), daemon=True)
        self.process.start()
        theirs.close()  # so that the connection ends when the process ends
        self.result, self.problem = b"", ""

    def receive(self) -> None:
        """Receive the answer, or record how the process ended."""
        try:
            self.result, self.problem = self.connection.recv()
        except (EOFError, OSError):
            self.process.join(GRACE)
            code = self.process.exitcode or 0
            self.problem = "ended " + (f"by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}")

    def kill(self) -> None:
        """Kill a process that hangs, and keep the stacks of its threads."""
        os.kill(self.process.pid or 0, signal.SIGUSR1)
        time.sleep(1)
        self.process.kill()
        where = self.stacks.read_text() if self.stacks.exists() else ""
        self.problem = f"did not end in time and was killed. It was here:\n{where}"


def _serve(number: int, size: int, connection: Connection, folder: Path, stacks: Path) -> None:
    """Join the group, and run jobs until the connection is closed."""
    with stacks.open("w") as dump:
        faulthandler.register(signal.SIGUSR1, dump)
        os.environ.update(RANK=str(number), LOCAL_RANK=str(number), WORLD_SIZE=str(size), LOCAL_WORLD_SIZE=str(size))
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29500", OMP_NUM_THREADS="1")
        import torch
        import torch.distributed as dist

        torch.set_num_threads(1)
        # They rendezvous through a file, since a port could be in use.
        if device_of(size) == "cuda":
            torch.cuda.set_device(number)
        backends = "cpu:gloo,cuda:nccl" if device_of(size) == "cuda" else "gloo"
        dist.init_process_group(backends, init_method=f"file://{folder}/group", rank=number, world_size=size)
        with contextlib.suppress(EOFError, OSError):
            while True:
                sys.path[:], job = connection.recv()
                connection.send(_answer(number, job))
    # Skip the interpreter's shutdown: a gloo thread that takes the GIL during it would abort the process.
    os._exit(0)


def _answer(number: int, message: bytes) -> tuple[bytes, str]:
    """Run a job; return its pickled result, or the error."""
    import torch
    import torch.distributed as dist

    folder, environment = os.getcwd(), dict(os.environ)
    random.seed(0)
    torch.manual_seed(0)
    try:
        with warnings.catch_warnings():
            job, args = pickle.loads(message)
            result = pickle.dumps(job(number, *args))
        dist.barrier()  # all have finished, also writing files, and the group still works
        return result, ""
    except BaseException:  # pytest's own exceptions are not subclasses of Exception
        return b"", f"raised\n{traceback.format_exc()}"
    finally:
        os.chdir(folder)
        os.environ.clear()
        os.environ.update(environment)
