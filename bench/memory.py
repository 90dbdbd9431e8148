"""The peak memory of a call."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import re
from pathlib import Path

import torch

import qatkernels

from .clock import Run

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def peak(run: Run, device: torch.device, *, since: int | None = None) -> int | None:
    """Return the peak memory of a call minus the memory before it, in bytes. Outputs count.

    On a CPU it is the peak resident set size that Linux reports; None where that cannot be reset.

    Args:
        run: the call.
        device: where its tensors are.
        since: what :func:`in_use` returned earlier, to be subtracted in place of the memory before the call.
    """
    before = in_use(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        most = torch.cuda.max_memory_allocated()
    else:
        try:
            _RESET.write_text("5")
        except OSError:
            return None
        run()
        most = _resident("VmHWM")
    return max(most - (before if since is None else since), 0)


def in_use(device: torch.device) -> int:
    """Return the memory that is in use now, in bytes, after what is cached has been freed."""
    gc.collect()
    qatkernels.empty_cache()
    if device.type == "cuda":
        torch.cuda.synchronize()
        return int(torch.cuda.memory_allocated())
    _trim()
    return _resident("VmRSS")


def _trim() -> None:
    """Return glibc's free blocks to the system. A call that reused them would seem to need no memory."""
    with contextlib.suppress(AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def _resident(field: str) -> int:
    status = _STATUS.read_text() if _STATUS.exists() else ""
    found = re.search(rf"{field}:\s*(\d+) kB", status)
    return int(found[1]) * 1024 if found else 0
