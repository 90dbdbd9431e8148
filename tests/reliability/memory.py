"""Memory leaks: after many training steps memory is as large as after the first thousand.

Bounds: the number of live tensors must not grow. The pool keeps no more than was in use at once (csrc/cpu/pool.h), so
its size is constant once all steps are alike. Resident memory may grow by less than 1 MiB, the smallest block of the
pool, over the second half of the run: 105 bytes a step with 20,000 steps.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import qatkernels as qk
from qatkernels.backends import extension
from qatkernels.hessian import HessianOperator
from qatkernels.methods import SQuAT, WinQ
from qatkernels.nn import QuantConfig, quantized_weights

from .runner import Campaign

CASES = 20_000
#: Number of figures of a run, and how many at its beginning are left out, while allocators warm up.
FIGURES, WARM = 20, 10
DRIFT = 1 << 20
WIDTH = 520


def model() -> nn.Module:
    """Return a model with a learned activation scale and two layers, one with results that come from the pool."""
    torch.manual_seed(0)
    made = nn.Sequential(nn.Linear(16, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, 4))
    return qk.quantize_model(made, QuantConfig(4, act_bits=8))


def _batch(step: int) -> Tensor:
    return torch.randn(4, 16, generator=torch.Generator().manual_seed(step))


def _qat() -> Callable[[int], None]:
    net = model()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-5)

    def step(number: int) -> None:
        optimizer.zero_grad()
        net(_batch(number)).square().mean().backward()
        optimizer.step()

    return step


def _winq() -> Callable[[int], None]:
    net = model()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-5)
    method = WinQ(net, reset_every=50, reset_weight=0.4, noise_std=1e-3)

    def step(number: int) -> None:
        def closure() -> Tensor:
            optimizer.zero_grad()
            loss: Tensor = net(_batch(number)).square().mean()
            loss.backward()
            return loss

        method.gradient(closure)
        optimizer.step()
        method.after_step()
        if number % 100 == 1:
            method.log()

    return step


def _squat() -> Callable[[int], None]:
    net = model()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-5)
    method = SQuAT(net, optimizer)

    def step(number: int) -> None:
        def closure() -> Tensor:
            optimizer.zero_grad()
            loss: Tensor = net(_batch(number)).square().mean()
            loss.backward()
            return loss

        method.gradient(closure)
        optimizer.step()
        method.after_step()
        if number % 100 == 1:
            method.log()

    return step


def _hvp() -> Callable[[int], None]:
    net = model()
    net(_batch(0))
    net.eval()
    params = list(quantized_weights(net))
    operators = [
        HessianOperator(net, lambda m, x: m(x).square().mean(), [_batch(0)], params, engine=engine)
        for engine in ("reverse", "forward")
    ]
    v = torch.randn(sum(p.numel() for p in params))

    def step(number: int) -> None:
        operators[number % 2].matvec(v)

    return step


WAYS: dict[str, Callable[[], Callable[[int], None]]] = {"qat": _qat, "winq": _winq, "squat": _squat, "hvp": _hvp}


def resident() -> int:
    """Return the resident memory of this process in bytes, without file pages and without malloc's free memory."""
    with contextlib.suppress(AttributeError):  # of glibc alone; it keeps none or all of the last tensors' memory
        ctypes.CDLL(None).malloc_trim(0)
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) << 10
    raise RuntimeError("/proc/self/status has no RssAnon: memory is measured on Linux only")


def live() -> int:
    """Return the number of live tensors."""
    gc.collect()
    return sum(issubclass(type(thing), Tensor) for thing in gc.get_objects())


def slope(xs: list[int], ys: list[int]) -> tuple[float, float]:
    """Return the slope of the least-squares line and its standard error."""
    x, y = (torch.tensor(v, dtype=torch.float64) for v in (xs, ys))
    dx = x - x.mean()
    rise = float((dx * y).sum() / dx.square().sum())
    rest = (y - y.mean() - rise * dx).square().sum() / max(len(xs) - 2, 1)
    return rise, math.sqrt(float(rest / dx.square().sum()))


def watch(step: Callable[[int], None], steps: int) -> dict[str, Any]:
    """Train, and return the figures after each part of the steps."""
    compiled, every = extension(), max(steps // FIGURES, 1)
    figures: dict[str, list[int]] = {"step": [], "resident": [], "tensors": [], "pool": []}
    began = time.monotonic()
    step(0)
    gc.collect()
    gc.freeze()  # of what is there already nothing is counted, or looked through twenty times
    for number in range(1, steps + 1):
        step(number)
        if number % every == 0:
            figures["tensors"].append(live())
            figures["resident"].append(resident())
            figures["pool"].append(compiled.cached_bytes() if compiled else 0)
            figures["step"].append(number)
    gc.unfreeze()
    later = {name: values[WARM:] for name, values in figures.items()}
    rise, error = slope(later["step"], later["resident"])
    return {
        "steps": steps, "bytes a step": round(rise, 2), "standard error": round(error, 2),
        "drift": round(rise * (later["step"][-1] - later["step"][0])),
        "tensors gained": later["tensors"][-1] - later["tensors"][0],
        "pool gained": max(later["pool"]) - later["pool"][0],
        "seconds": round(time.monotonic() - began, 1), "figures": figures,
    }  # fmt: skip


def wrong(found: dict[str, Any]) -> list[str]:
    """Return which figures exceed the bounds."""
    said = []
    if found["drift"] > DRIFT:
        said.append(f"resident memory drifts by {found['drift']} bytes, must be at most {DRIFT}")
    if found["tensors gained"] > 0:
        said.append(f"there are {found['tensors gained']} tensors more than after the first steps")
    if found["pool gained"] > 0:
        said.append(f"the pool keeps {found['pool gained']} bytes more than after the first steps")
    return said


def run(campaign: Campaign) -> None:
    """Train with each method."""
    torch.set_num_threads(1)
    campaign.each(WAYS, lambda name: watched(campaign, name))


def watched(campaign: Campaign, name: str) -> dict[str, Any]:
    """Train with one method, and compare the figures with their bounds."""
    qk.empty_cache()
    found = watch(WAYS[name](), campaign.cases or CASES)
    for why in wrong(found):
        campaign.fail(name, 0, why)
    return found
