"""The machine that numbers are measured on: its name, versions, bandwidth and rate of matrix products."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import platform
import re
import subprocess
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import qatkernels
from qatkernels import backends
from qatkernels.dtypes import dtype_name

from .case import Settings
from .clock import Clock, Events, race, wall

#: Folders of results. Writing results does not make a checkout dirty.
RESULTS = ("bench/results", "docs/results")


class Machine:
    """The device, with its measured bandwidth and rates of matrix products."""

    def __init__(self, settings: Settings) -> None:
        self.device = settings.device
        self.quick = settings.quick
        self.cuda = settings.device.type == "cuda"
        self.budget = 0.05 if settings.quick else 2.0
        self.clock: Clock = wall
        self.replay_clock: Clock = wall
        if self.cuda:
            self.clock = events = Events()
            self.replay_clock = functools.partial(events, launch=False)
        #: Load average of the last minute, which shows whether other processes were running.
        self.load = os.getloadavg()[0]
        self._products: dict[str, float] = {}

    @property
    def name(self) -> str:
        """Model of the processor or GPU."""
        return torch.cuda.get_device_name(self.device) if self.cuda else cpu_model()

    @property
    def slug(self) -> str:
        """The name as a part of a file name."""
        return slug(self.name)

    @functools.cached_property
    def bandwidth(self) -> float:
        """Bytes per second of ``copy_`` between large tensors, bytes read plus bytes written."""
        size = 2**20 if self.quick else 2**30 if self.cuda else 2**28
        run = copy_of(size, self.device)
        run()
        return size / (race({"copy": run}, self.clock, self.budget)["copy"].median * 1e-3)

    def products(self, dtype: torch.dtype) -> float:
        """Floating point operations per second of a large square matrix product in a dtype."""
        key = dtype_name(dtype)
        if key not in self._products:
            n = 64 if self.quick else 8192 if self.cuda else 2048
            a, b = (torch.randn(n, n, device=self.device).to(dtype) for _ in range(2))
            out = torch.empty_like(a)
            torch.mm(a, b, out=out)
            times = race({"mm": lambda: torch.mm(a, b, out=out)}, self.clock, self.budget)
            self._products[key] = 2 * n**3 / (times["mm"].median * 1e-3)
        return self._products[key]

    def describe(self) -> dict[str, Any]:
        """Return what a reader needs to interpret the numbers, without names of hosts or folders."""
        return {
            "date": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
            "device": {"type": self.device.type, "name": self.name, "cpu": cpu_model()},
            "threads": torch.get_num_threads(),
            "load_before": round(self.load, 2),
            "versions": versions(),
            "build": build_info(),
            "git": git_state(),
            "bandwidth_gb_s": round(self.bandwidth * 1e-9, 3),
            "products_tflop_s": {name: round(rate * 1e-12, 4) for name, rate in self._products.items()},
        }


def alive(device: torch.device) -> bool:
    """Return whether a device still responds. After an illegal access this process cannot use its GPU any more."""
    try:
        if device.type == "cuda":
            torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


def slug(name: str) -> str:
    """Return a device's name as a part of a file name: "h100" for "NVIDIA H100 80GB HBM3"."""
    words = re.sub(r"\((r|tm)\)|[^a-z0-9]+", "-", name.lower()).strip("-").split("-")
    said = r"processor|cpu|with|"
    if words[0] == "nvidia":
        said = r"nvidia|geforce|tesla|laptop|gpu|\d+gb|hbm\d\w*|pcie|sxm\d*|nvl"
    return "-".join(word for word in words if not re.fullmatch(said, word))


def copy_of(size: int, device: torch.device, *, fresh: bool = False) -> Any:
    """Return a call that copies and moves ``size`` bytes (read plus written), into the same or into fresh memory."""
    source = torch.randn(max(size // 8, 1), device=device)
    if fresh:
        return source.clone
    destination = torch.ones_like(source)

    def run() -> Tensor:
        return destination.copy_(source)

    return run


@functools.cache
def cpu_model() -> str:
    """Return the processor's name, and "with AMX" if it has that: many virtual machines only say "Intel Xeon"."""
    try:
        described = Path("/proc/cpuinfo").read_text()
    except OSError:
        described = ""
    found = re.search(r"model name\s*:\s*(.+)", described)
    name = found[1].strip() if found else platform.processor() or platform.machine()
    return f"{name} with AMX" if re.search(r"^flags\s*:.* amx_tile\b", described, re.MULTILINE) else name


def versions() -> dict[str, str | None]:
    """Return the versions of Python, this package, torch, Triton, numpy and CUDA."""
    known: dict[str, str | None] = {"python": platform.python_version(), "qatkernels": qatkernels.__version__}
    known["torch"] = torch.__version__  # unlike the package metadata, this has the build label
    for package in ("triton", "numpy"):
        try:
            known[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            known[package] = None
    known["cuda"] = torch.version.cuda
    return known


def build_info() -> dict[str, Any] | None:
    """Return the build information of the compiled extension, or None without one."""
    compiled = backends.extension()
    return dict(compiled.build_info()) if compiled is not None else None


def git_state() -> dict[str, Any]:
    """Return the commit, and whether files other than results differ from it; None for both outside a checkout."""

    def git(*arguments: str) -> str | None:
        command = ("git", "-C", str(Path(__file__).parent), *arguments)
        try:
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            return None

    changes = git("status", "--porcelain", "--", ":/", *(f":(exclude,top){folder}" for folder in RESULTS))
    return {"commit": git("rev-parse", "HEAD"), "dirty": None if changes is None else bool(changes)}
