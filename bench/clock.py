"""Timing. The calls of a case are timed in rotation, so that noise from other processes affects all of them alike."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

Run = Callable[[], object]
#: Returns the milliseconds of one call.
Clock = Callable[[Run], float]

_FEWEST, _ENOUGH, _MOST = 3, 15, 1000
#: Stop when the relative standard error of every median is below this.
_PRECISION = 0.01
#: Bytes read to evict the L2 cache: several times the largest L2 cache.
_FLUSH_BYTES = 512 * 2**20


@dataclass(frozen=True)
class Times:
    """Repetitions of one call in milliseconds, ascending."""

    samples: tuple[float, ...]

    def quantile(self, q: float) -> float:
        """Return a quantile, interpolated linearly."""
        position = q * (len(self.samples) - 1)
        low = int(position)
        high = min(low + 1, len(self.samples) - 1)
        return self.samples[low] + (position - low) * (self.samples[high] - self.samples[low])

    @property
    def median(self) -> float:
        """The middle repetition."""
        return self.quantile(0.5)

    @property
    def summary(self) -> dict[str, float]:
        """Quantiles by name."""
        points = {"min": 0.0, "p10": 0.1, "p25": 0.25, "p50": 0.5, "p75": 0.75, "p90": 0.9, "max": 1.0}
        return {name: round(self.quantile(q), 6) for name, q in points.items()}

    @property
    def converged(self) -> bool:
        """Whether the median is precise enough to stop."""
        n = len(self.samples)
        spread = (self.quantile(0.75) - self.quantile(0.25)) / max(self.median, 1e-9)
        return n >= _ENOUGH and 0.93 * spread / n**0.5 < _PRECISION


def wall(run: Run) -> float:
    """Return the milliseconds of one call on the CPU, including the release of its outputs."""
    start = time.perf_counter_ns()
    run()
    return (time.perf_counter_ns() - start) * 1e-6


class Events:
    """Milliseconds of one call on a CUDA device, with a cold L2 cache."""

    def __init__(self) -> None:
        self.flush = torch.ones(_FLUSH_BYTES // 4, device="cuda")
        self.total = torch.zeros((), device="cuda")

    def __call__(self, run: Run, *, launch: bool = True) -> float:
        """Time one call.

        Args:
            run: the call.
            launch: whether to wait until the device is idle before the call. Then launch latency counts. Otherwise the
                device is still evicting the cache while kernels are launched, and launch latency does not count.
        """
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        # A read, not a write: dirty cache lines would be written back during the timed call.
        torch.sum(self.flush, dim=0, out=self.total)
        if launch:
            torch.cuda.synchronize()
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        return float(start.elapsed_time(end))


def captured(run: Run) -> Run:
    """Return the replay of a CUDA graph of one call.

    Raises:
        RuntimeError: if the call cannot be captured.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = run()

    def replay() -> object:
        graph.replay()
        return outputs

    return replay


def race(runs: Mapping[str, Run], clock: Clock, budget: float) -> dict[str, Times]:
    """Time calls in turn until all medians are precise enough, or the budget is spent.

    Args:
        runs: the calls by name. Each must have run once before (warm-up).
        clock: returns the milliseconds of one call.
        budget: seconds for all calls together. A call stops when it has used its equal share, but runs at least three
            times.
    """
    samples: dict[str, list[float]] = {name: [] for name in runs}
    share = 1e3 * budget / max(len(runs), 1)
    collecting = gc.isenabled()
    gc.disable()
    try:
        deadline, racing = time.perf_counter() + budget, list(runs)
        for turn in range(1, _MOST + 1):
            for name in racing:
                samples[name].append(clock(runs[name]))
            if turn < _FEWEST:
                continue
            racing = [name for name in racing if sum(samples[name]) < share]
            done = time.perf_counter() > deadline or not racing
            if done or (turn % _ENOUGH == 0 and all(_times(samples[name]).converged for name in racing)):
                break
    finally:
        if collecting:
            gc.enable()
    return {name: _times(values) for name, values in samples.items()}


def _times(values: list[float]) -> Times:
    return Times(tuple(sorted(values)))
