"""Smoke checks: every op on every backend once (`qatkernels/testing/checks.py`), with a journal line for each."""

from __future__ import annotations

import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from ..case import reason
from ..codes import DOOMED
from ..journal import Journal, Record, read
from ..machine import alive

#: Fields that identify a check in a journal.
KEY = ("op", "name", "backend", "under")


def main(journal: Path, *, dry: bool = False, backend: str | None = None, every: int = 1, again: Path | None = None,
         under: str = "") -> int:  # fmt: skip
    """Run the checks.

    Args:
        journal: gets a line for each; checks that have one are left out.
        dry: on the CPU.
        backend: this backend's alone.
        every: every n-th of them.
        again: only those that failed according to this journal.
        under: the tool that watches this process; a part of what the checks are called.

    Returns:
        0; 1 if any failed; :data:`bench.codes.DOOMED` if the GPU answers no longer.
    """
    from tests import implementations

    if not dry and not implementations.HAS_GPU:
        raise SystemExit("torch finds no CUDA device; --dry runs the checks on the CPU")
    done = outcomes(journal)
    wanted = None if again is None else {key[:3] for key, r in outcomes(again).items() if r["status"] != "ok"}
    out, failed, count = Journal(journal), 0, 0
    for check, name, implementation in list(_calls(dry, backend))[::every]:
        key = (check.op, check.name, name, under)
        if key in done or (wanted is not None and key[:3] not in wanted):
            continue
        record = dict(zip(KEY, key, strict=True))
        # Written before the check: if the check kills this process, the next process skips it.
        out.write("smoke", record | {"status": "begun"})
        record |= _outcome(check, implementation)
        out.write("smoke", record)
        count += 1
        if record["status"] != "ok":
            failed += 1
            print(f"FAILED: {check.op} {check.name} on {name}: {record['note']}", flush=True)
            if not alive(torch.device("cpu" if dry else "cuda")):
                return DOOMED
    print(f"smoke: {count} checks, {failed} failed", flush=True)
    return 1 if failed else 0


def outcomes(journal: Path) -> dict[tuple[str, ...], Record]:
    """Return the last record of each check in a journal. If that is its beginning, the check killed its process."""
    return outcomes_of(read(journal, "smoke"))


def outcomes_of(records: Sequence[Record]) -> dict[tuple[str, ...], Record]:
    """Return the last record of each check among the records of a journal."""
    return {tuple(r[k] for k in KEY): r for r in records if r["kind"] == "smoke"}


def _calls(dry: bool, wanted: str | None) -> Iterator[tuple[Any, str, Any]]:
    from qatkernels.testing.checks import every_check
    from tests.implementations import GPU, implementations

    for check in every_check(torch.device("cpu") if dry else GPU):
        for backend, implementation, device in implementations(check.op):
            # A dry run checks the CPU's backend, whatever --backend says.
            if device.type == ("cpu" if dry else "cuda") and backend not in check.refused_by and (
                dry or wanted in (None, backend)
            ):  # fmt: skip
                yield check, backend, implementation


def _outcome(check: Any, implementation: Any) -> dict[str, Any]:
    start = time.perf_counter()
    try:
        check.run(implementation)
    except Exception as problem:  # an op that fails does not stop the others
        traceback.print_exc()
        return {"status": "failed", "note": reason(problem), "seconds": round(time.perf_counter() - start, 3)}
    return {"status": "ok", "seconds": round(time.perf_counter() - start, 3)}
