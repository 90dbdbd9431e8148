"""How much memory a call needs beyond what was there before it."""

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
    """Return the bytes that a call adds to the memory in use at its worst moment, outputs included.

    On a CPU this is the kernel's high-water mark of resident pages; None where it cannot be reset.
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
    """Give the system what glibc keeps of freed blocks: a call that takes those would seem to need nothing."""
    with contextlib.suppress(AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def _resident(field: str) -> int:
    found = re.search(rf"{field}:\s*(\d+) kB", _STATUS.read_text())
    return int(found[1]) * 1024 if found else 0
