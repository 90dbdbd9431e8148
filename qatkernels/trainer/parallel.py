"""The processes that train together: one alone, or torchrun's with torch's own DDP or FSDP2.

Every process draws the whole batch of a step and takes its own rows of it, and every process draws the same noise. The
losses of many are therefore those of one, up to the order in which gradients are added.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor, nn

#: Ways to train with several processes by the name on the command line.
MODES = ("none", "ddp", "fsdp")
_groups = 0  # that this process has made; those that it has left leave threads behind


class ParallelError(ValueError):
    """The processes cannot train together as the configuration asks."""


class Processes:
    """The group that this process trains in.

    Attributes:
        mode: one of ``MODES``.
        rank: number of this process.
        size: how many there are.
    """

    def __init__(self, mode: str = "none") -> None:
        self.mode = mode
        self.rank, self.size = (0, 1) if mode == "none" else (dist.get_rank(), dist.get_world_size())

    @property
    def first(self) -> bool:
        """Whether this process writes what is written once."""
        return self.rank == 0

    @property
    def sharded(self) -> bool:
        """Whether a parameter is spread over the processes."""
        return self.mode == "fsdp"

    def wrap(self, model: nn.Module) -> nn.Module:
        """Return what to call in place of the model; under FSDP2 its parameters become DTensors, in place."""
        if self.mode == "ddp":
            device = next(model.parameters()).device
            return nn.parallel.DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None)
        if self.mode == "fsdp":
            from torch.distributed.device_mesh import init_device_mesh
            from torch.distributed.fsdp import fully_shard

            mesh = init_device_mesh(next(model.parameters()).device.type, (self.size,))
            for blocks in [m for m in model.modules() if isinstance(m, nn.ModuleList)][:1]:
                for block in blocks:
                    fully_shard(block, mesh=mesh)
            fully_shard(model, mesh=mesh)
        return model

    @contextlib.contextmanager
    def synchronized(self, wrapped: nn.Module, last: bool) -> Iterator[None]:
        """Let backward passes add up gradients of other processes if this is the last one of a step."""
        if self.mode == "fsdp":
            wrapped.set_requires_gradient_sync(last)  # type: ignore[operator]
        apart = self.mode == "ddp" and not last
        with wrapped.no_sync() if apart else contextlib.nullcontext():  # type: ignore[operator]
            yield

    def share(self, windows: Tensor) -> Tensor:
        """Return this process's rows; as many as any other's, or one fewer."""
        return windows[self.rank :: self.size]

    def mean(self, value: Tensor) -> Tensor:
        """Return the mean of a value over the processes, on its device."""
        if self.size > 1:
            dist.all_reduce(value)
            value /= self.size
        return value

    def sums(self, *values: float) -> list[float]:
        """Return sums over the processes."""
        if self.size == 1:
            return list(values)
        found = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(found)
        return [float(value) for value in found]

    def means(self, values: dict[str, float]) -> dict[str, float]:
        """Return means over the processes."""
        if self.size == 1:
            return values
        return {name: total / self.size for name, total in zip(values, self.sums(*values.values()), strict=True)}

    def any(self, number: int) -> int:
        """Return the largest number that a process has; every process gets the same."""
        if self.size == 1:
            return number
        found = torch.tensor(number)
        dist.all_reduce(found, dist.ReduceOp.MAX)
        return int(found)

    def gathered(self, thing: Any) -> list[Any]:
        """Return what each process has, in order of their ranks."""
        if self.size == 1:
            return [thing]
        things: list[Any] = [None] * self.size
        dist.all_gather_object(things, thing)
        return things

    def wait(self) -> None:
        """Return when all processes are here."""
        if self.size > 1:
            self.any(0)


@contextlib.contextmanager
def joined(mode: str, device: str) -> Iterator[Processes]:
    """Join the processes that torchrun started, unless that was done before, and leave them at the end.

    Args:
        mode: one of ``MODES``.
        device: ``"cpu"`` or ``"cuda"``; of several GPUs a process takes the one that its local rank names.

    Raises:
        ParallelError: if this process was not started by torchrun, or was and trains alone.
    """
    started = "RANK" in os.environ or dist.is_initialized()
    if mode == "none":
        if started and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ParallelError("--parallel is none under torchrun, must be ddp or fsdp")
        yield Processes()
        return
    if not started:
        raise ParallelError(
            f"--parallel is {mode}, which needs torchrun: torchrun --nproc-per-node N -m qatkernels ..."
        )
    if device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    ours = not dist.is_initialized()
    if ours:
        # Flags and JSON-able values go over gloo, tensors on a GPU over NCCL.
        dist.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo")
        global _groups
        _groups += 1
    try:
        yield Processes(mode)
        if ours:
            dist.barrier()
    finally:
        if ours:
            dist.destroy_process_group()


def joined_any() -> bool:
    """Whether this process has trained with others, so that :func:`leave` has to end it."""
    return _groups > 0


def leave(code: int) -> NoReturn:
    """End a process that was one of several, without the interpreter's end.

    Functions of :mod:`atexit` run and the output is written, as at the interpreter's end.

    Threads of gloo need the interpreter's lock to drop a collective's tensors, and one that asks for it while the
    interpreter ends aborts the process. They do not end with their group: torch's caches keep that alive under FSDP2.
    """
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # a reader that left, a stream that was closed
            stream.flush()
    os._exit(code)
