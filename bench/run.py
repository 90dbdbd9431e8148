"""Runs a case and returns rows. Every call is checked first; only calls with correct results are timed."""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from typing import Any

import torch

from qatkernels.dtypes import dtype_name

from .case import Call, Case, Missing, reason
from .clock import Clock, Run, captured, race
from .exact import errors
from .machine import Machine, copy_of
from .memory import peak

#: A row of the JSON file. `status` is "ok", "wrong", "failed" or "missing"; only "ok" rows have times.
Row = dict[str, Any]

#: How many calls are launched together to time a launch. They must be few, so that the driver's queue does not fill up;
#: the second number is the time that the GPU may take for them.
_HOST_CALLS, _HOST_MS = 20, 20.0

COPY, FRESH_COPY = "copy_", "copy into fresh memory"


def run_case(suite: str, case: Case, machine: Machine, budget: float) -> list[Row]:
    """Check and time one case.

    Args:
        suite: name of the suite.
        case: the case.
        machine: the device and its ceilings.
        budget: seconds of timing.

    Returns:
        One row for each implementation and way of timing it.
    """
    rows: list[Row] = []
    racing: list[tuple[Row, Call]] = []
    for call in (*_baselines(case, machine), *case.calls):
        row = _judged(suite, case, call)
        if case.memory and call in case.calls and row["status"] == "ok":
            row["peak_bytes"] = peak(call.run, machine.device)  # type: ignore[union-attr]
        rows.append(row)
        if isinstance(call, Call) and row["status"] == "ok":
            racing.append((row, call))
    replays = [({**row, "timing": "graph"}, call) for row, call in racing] if machine.cuda else []
    rows += [row for row, _ in replays]
    _timed(racing, case, machine, budget, machine.clock)
    if replays:
        _timed(_graphs(replays, case), case, machine, budget, machine.replay_clock)
    return rows


def _baselines(case: Case, machine: Machine) -> list[Call]:
    """Return copies that move as many bytes as the case."""
    runs = ((COPY, "out", False), (FRESH_COPY, "fresh", True))
    return [
        Call(name, copy_of(case.bytes, machine.device, fresh=fresh), "baseline", output, unchecked="a copy")  # type: ignore[arg-type]
        for name, output, fresh in runs
    ]


def _judged(suite: str, case: Case, call: Call | Missing) -> Row:
    """Run a call once, compare it with the expected outputs, and return its row."""
    row: Row = {
        "suite": suite,
        "case": case.title,
        "op": case.op,
        "shape": list(case.shape),
        "dtype": dtype_name(case.dtype),
        "grid": case.grid,
        "granularity": case.granularity,
        "variant": case.variant,
        "bytes": case.bytes,
        "flops": case.flops,
        "implementation": call.name,
        "timing": "call",
    }
    if isinstance(call, Missing):
        return row | {"status": "missing", "note": call.reason}
    row |= {"kind": call.kind, "output": call.output, "note": call.note, "unchecked": call.unchecked}
    return row | {"tolerances": list(case.tolerances)} | _checked(call, call.run, case)


def _checked(call: Call, run: Run, case: Case) -> Row:
    """Run a call once; return its status, and its errors or the reason of a failure."""
    try:
        outputs = run()
        wanted = call.expected() if call.expected else case.right
        found = [] if call.unchecked else errors(outputs, wanted)
    except Exception as problem:  # any exception goes into the row of the implementation; the others continue
        return {"status": "missing" if call.kind == "peer" else "failed", "note": reason(problem)}
    right = all(error <= allowed for error, allowed in zip(found, case.tolerances, strict=False))
    # JSON has no infinity.
    return {"status": "ok" if right else "wrong", "errors": [min(error, sys.float_info.max) for error in found]}


def _graphs(replays: list[tuple[Row, Call]], case: Case) -> list[tuple[Row, Call]]:
    """Return the calls as replays of CUDA graphs, each checked again."""
    racing = []
    for row, call in replays:
        if not call.graph:
            row |= {"status": "missing", "note": "cannot be captured in a CUDA graph"}
            continue
        recorded: list[Run] = []

        def first(call: Call = call, recorded: list[Run] = recorded) -> Any:
            recorded.append(captured(call.run))
            return recorded[0]()

        row |= _checked(call, first, case)
        if row["status"] == "ok":
            racing.append((row, replace(call, run=recorded[0])))
    return racing


def _host_us(run: Run, milliseconds: float) -> float:
    """Return the microseconds that a call takes on the CPU. The GPU works on it for ``milliseconds``."""
    # A call that takes longer than this has launched thousands of kernels: one is enough.
    calls = max(1 if milliseconds > 10 * _HOST_MS else 3, min(_HOST_CALLS, int(_HOST_MS / milliseconds)))
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        run()
    spent = time.perf_counter() - start
    torch.cuda.synchronize()
    return round(1e6 * spent / calls, 2)


def _timed(racing: list[tuple[Row, Call]], case: Case, machine: Machine, budget: float, clock: Clock) -> None:
    """Time the calls in turn, and add the times to their rows."""
    runs: dict[str, Run] = {f"{i}": call.run for i, (_, call) in enumerate(racing)}
    times = race(runs, clock, budget)
    by_call = [(row, call, times[f"{i}"]) for i, (row, call) in enumerate(racing)]
    # The floor is the time of a copy of as many bytes in the same race, or of the matrix products if that is longer.
    floor = next(t.median for _, call, t in by_call if call.name == COPY)
    if case.flops:
        floor = max(floor, 1e3 * case.flops / machine.products(case.product_dtype or case.dtype))
    others = {f"{c.name} ({c.output})": t.median for _, c, t in by_call if c.kind != "ours"}
    for row, call, t in by_call:
        if machine.cuda and row["timing"] == "call":
            row["host_us"] = _host_us(call.run, t.median)
        # Checked again: a result may be right in fresh memory, and wrong in memory that is reused.
        if call.kind == "ours" and (again := _checked(call, call.run, case))["status"] != "ok":
            row |= again
            continue
        row |= {
            "median_ms": round(t.median, 6),
            "quantiles_ms": t.summary,
            "repetitions": len(t.samples),
            "floor_ms": round(floor, 6),
            "fraction_of_floor": round(floor / t.median, 4),
        }
        if call.kind == "ours":
            row["speedup_over"] = {name: float(f"{median / t.median:.4g}") for name, median in others.items()}
