"""The processes that train together: a single one, or those that torchrun started, with torch's DDP or FSDP2.

Every process draws the whole batch of a step and uses its share of the windows. All processes draw the same noise. So
the losses do not depend on the number of processes, except for the order in which gradients are added.
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

#: Ways to train with several processes, by their names on the command line.
MODES = ("none", "ddp", "fsdp")
#: Process groups that this process has created. Their threads outlive them.
_groups = 0


class ParallelError(ValueError):
    """The processes cannot train together in the way that the configuration says."""


class Processes:
    """The group of processes that this process trains in.

    Attributes:
        mode: one of ``MODES``.
        rank: rank of this process.
        size: number of processes.
    """

    def __init__(self, mode: str = "none") -> None:
        self.mode = mode
        self.rank, self.size = (0, 1) if mode == "none" else (dist.get_rank(), dist.get_world_size())

    @property
    def first(self) -> bool:
        """Whether this is the process that writes files and prints."""
        return self.rank == 0

    @property
    def sharded(self) -> bool:
        """Whether each process holds a shard of every parameter."""
        return self.mode == "fsdp"

    def wrap(self, model: nn.Module) -> nn.Module:
        """Return the module to call instead of the model. FSDP2 makes the model's parameters DTensors, in place."""
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
        """Reduce gradients over the processes in the last backward pass of a step only."""
        if self.mode == "fsdp":
            wrapped.set_requires_gradient_sync(last)  # type: ignore[operator]
        no_sync = self.mode == "ddp" and not last
        with wrapped.no_sync() if no_sync else contextlib.nullcontext():  # type: ignore[operator]
            yield

    def share(self, windows: Tensor) -> Tensor:
        """Return this process's share of the windows. The sizes of two shares differ by at most one."""
        return windows[self.rank :: self.size]

    def mean(self, value: Tensor) -> Tensor:
        """Return the mean of a tensor over the processes, on the tensor's device."""
        if self.size > 1:
            dist.all_reduce(value)
            value /= self.size
        return value

    def sums(self, *values: float) -> list[float]:
        """Return the sum of each value over the processes."""
        if self.size == 1:
            return list(values)
        totals = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(totals)
        return [float(value) for value in totals]

    def means(self, values: dict[str, float]) -> dict[str, float]:
        """Return the mean of each value over the processes."""
        if self.size == 1:
            return values
        return {name: total / self.size for name, total in zip(values, self.sums(*values.values()), strict=True)}

    def any(self, number: int) -> int:
        """Return the largest ``number`` of all processes, in every process: not 0 if any process has one."""
        if self.size == 1:
            return number
        largest = torch.tensor(number)
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        return int(largest)

    def gathered(self, value: Any) -> list[Any]:
        """Return the value of each process, ordered by rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def wait(self) -> None:
        """Block until all processes have called this."""
        if self.size > 1:
            self.any(0)


@contextlib.contextmanager
def joined(mode: str, device: str) -> Iterator[Processes]:
    """Join the processes that torchrun started, and leave the group at the end.

    If this process is in a group already, that group is used and kept.

    Args:
        mode: one of ``MODES``.
        device: ``"cpu"`` or ``"cuda"``. Each process uses the GPU with the number of its local rank.

    Raises:
        ParallelError: if torchrun did not start this process, or if it did and ``mode`` is ``"none"``.
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
    creates_group = not dist.is_initialized()
    if creates_group:
        # gloo carries flags and JSON-able values, NCCL carries tensors on a GPU.
        _init_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo")
        global _groups
        _groups += 1
    try:
        yield Processes(mode)
        if creates_group:
            dist.barrier()
    finally:
        if creates_group:
            dist.destroy_process_group()


def _init_group(backend: str) -> None:
    """Create the default group of the processes that torchrun started.

    torchrun keeps its store when it starts the processes again (``--max-restarts``), with the addresses of those that
    are gone, and a process that reads such an address cannot connect (torch 2.13). So each attempt gets keys of its
    own. Several hosts count attempts differently: they need ``TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1``.
    """
    from torch.distributed.rendezvous import rendezvous

    store, rank, size = next(iter(rendezvous("env://")))
    if int(os.environ.get("LOCAL_WORLD_SIZE", "0")) == size:
        store = dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=size)


def has_joined() -> bool:
    """Whether this process has created a process group, so that :func:`leave` must end it."""
    return _groups > 0


def leave(code: int) -> NoReturn:
    """End a process that trained with others, without finalizing the interpreter.

    Functions of :mod:`atexit` run and output is flushed, as at a normal end. The interpreter is not finalized because
    threads of gloo take the GIL when they free the tensors of a collective. A thread that takes the GIL during
    finalization aborts the process. These threads outlive their group: under FSDP2 torch's caches keep it alive.
    """
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # the pipe is broken, or the stream is closed
            stream.flush()
    os._exit(code)
