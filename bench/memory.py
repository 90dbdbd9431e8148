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


def peak(run: Run, device: torch.device) -> int | None:
    """Return the peak memory of a call minus the memory before it, in bytes. Outputs count.

    On a CPU it is the peak resident set size that Linux reports; None where that cannot be reset.
    """
    gc.collect()
    qatkernels.empty_cache()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return int(torch.cuda.max_memory_allocated() - before)
    _trim()
    try:
        _RESET.write_text("5")
    except OSError:
        return None
    before = _resident("VmRSS")
    run()
    return max(_resident("VmHWM") - before, 0)


def _trim() -> None:
    """Return glibc's free blocks to the system. A call that reused them would seem to need no memory."""
    with contextlib.suppress(AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def _resident(field: str) -> int:
    found = re.search(rf"{field}:\s*(\d+) kB", _STATUS.read_text())
    return int(found[1]) * 1024 if found else 0
