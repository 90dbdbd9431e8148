"""The command line: ``python -m bench``."""

from __future__ import annotations

import argparse
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from .case import Case, Settings, reason
from .codes import DOOMED
from .journal import Journal, read
from .machine import Machine, alive
from .page import page
from .report import RESULTS, document, show, write
from .run import Row, run_case
from .suites import SUITES

#: More cases than any suite has.
_MOST_CASES = 1000
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the suites.

    Returns:
        0; 1 if any result was wrong or any implementation of ours failed; :data:`bench.codes.DOOMED`.
    """
    options = _options(argv)
    if options.threads:
        torch.set_num_threads(options.threads)
    dtypes = tuple(_DTYPES[name] for name in options.dtype)
    settings = Settings(torch.device(options.device), dtypes, options.peers, options.quick)
    budget = options.budget or (0.05 if options.quick else 2.0 if options.device == "cuda" else 8.0)
    machine = Machine(settings)
    print(f"{machine.name}, {torch.get_num_threads()} threads, copies at {machine.bandwidth * 1e-9:.4g} GB/s")
    recorded = {"suites": list(options.suite), "budget_s": budget} | {
        key: getattr(options, key) for key in ("dtype", "peers", "quick")
    }
    run = _Run(settings, machine, budget, options.journal, options.again, options.case_seconds)
    run.note("machine", {"settings": recorded, **machine.describe()})
    everything: list[Row] = []
    end = time.monotonic() + (options.seconds or float("inf"))
    for name, seconds in options.suite.items():
        part = "" if set(options.dtype) == {"fp32", "bf16"} else "-" + "-".join(options.dtype)
        target = options.out or RESULTS / f"{name}{part}-{machine.slug}.json"
        earlier = everything if options.out else []

        def keep(
            rows: list[Row], name: str = name, target: Path = target, earlier: list[Row] = earlier,
            shown: list[Row] = everything,
        ) -> None:  # fmt: skip
            # Written after every case, so a killed run loses at most one.
            if options.out or not (options.quick or options.journal):
                suites = list(options.suite) if options.out else [name]
                write([*earlier, *rows], machine, {**recorded, "suites": suites}, target)
            if options.html:
                options.html.parent.mkdir(parents=True, exist_ok=True)
                options.html.write_bytes(page([document([*shown, *rows], machine.describe(), recorded)]))

        rows = run.suite(name, min(end, time.monotonic() + seconds), keep)
        everything = [*everything, *rows]
        if run.doomed:
            return DOOMED
    run.note("machine", {"settings": recorded, **machine.describe()})  # now with the rates of products
    return _verdict(everything)


class _Run:
    """Runs cases one after the other, and writes each result to the journal at once."""

    def __init__(
        self, settings: Settings, machine: Machine, budget: float, journal: Path | None, again: Path | None,
        case_seconds: float | None,
    ) -> None:  # fmt: skip
        self.settings, self.machine, self.budget, self.case_seconds = settings, machine, budget, case_seconds
        self.journal = Journal(journal) if journal else None
        self.begun = {r["key"] for r in read(journal, "begin")} if journal else set()
        self.again = None if again is None else failed_cases(again)
        self.doomed = False

    def note(self, kind: str, record: Row) -> None:
        """Append a record to the journal, if there is one."""
        if self.journal:
            self.journal.write(kind, record)

    def suite(self, name: str, until: float, keep: Callable[[list[Row]], None]) -> list[Row]:
        """Run the cases of a suite until a time. After each case ``keep`` is called with all rows so far."""
        rows: list[Row] = []
        for index, build in enumerate(SUITES[name](self.settings)):
            key = f"{name} {index}"
            if key in self.begun or (self.again is not None and key not in self.again):
                continue
            if time.monotonic() > until:
                print(f"{name}: out of time before case {index}", flush=True)
                self.note("cut", {"suite": name, "before": index})
                break
            rows += self._case(name, key, build)
            keep(rows)
            if self.doomed:
                break
        return rows

    def _case(self, name: str, key: str, build: Callable[[], Case]) -> list[Row]:
        self.note("begin", {"key": key})
        watchdog = threading.Timer(self.case_seconds or 0, self._stuck, (key,))
        watchdog.daemon = True
        if self.case_seconds:
            watchdog.start()
        try:
            found = run_case(name, build(), self.machine, self.budget)
            show(found)
        except Exception as problem:  # A case that cannot be built does not stop the others.
            found = [{"suite": name, "case": key, "implementation": "", "timing": "", "status": "failed"}]
            found[0] |= {"kind": "ours", "note": reason(problem)}
            print(f"\n{key}: {reason(problem)}", flush=True)
        watchdog.cancel()
        for row in found:
            self.note("row", {"key": key, "row": row})
        if any(row["status"] == "failed" for row in found):
            self.doomed = not alive(self.machine.device)
        return found

    def _stuck(self, key: str) -> None:
        print(f"{key}: not done after {self.case_seconds} s", flush=True)
        row = {"status": "failed", "kind": "ours", "note": f"not done after {self.case_seconds} s"}
        self.note("row", {"key": key, "row": row})
        os._exit(DOOMED)  # only this ends a process whose call waits for a kernel


def failed_cases(journal: Path) -> set[str]:
    """Return the keys of the cases in a journal that were wrong, failed, did not finish, or had no time left."""
    records = read(journal, "begin", "row", "cut")
    bad = {r["key"] for r in records if r["kind"] == "row" and r["row"]["status"] in ("wrong", "failed")}
    finished = {r["key"] for r in records if r["kind"] == "row"}
    bad |= {r["key"] for r in records if r["kind"] == "begin" and r["key"] not in finished}
    cut = [r for r in records if r["kind"] == "cut"]
    return bad | {f"{r['suite']} {index}" for r in cut for index in range(r["before"], _MOST_CASES)}


def _verdict(rows: Sequence[Row]) -> int:
    bad = [row for row in rows if row["status"] in ("wrong", "failed")]
    for row in bad:
        print(f"{row['status'].upper()}: {row['case']}: {row['implementation']} ({row['timing']})", file=sys.stderr)
    return 1 if bad else 0


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench", description="Check the results of every op and its peers, then time them."
    )
    parser.add_argument("suite", nargs="*", help=f"{', '.join(SUITES)}; all by default. NAME:SECONDS limits its time")
    parser.add_argument(
        "--peers", action="store_true", help="also time other libraries; the report names those that are not installed"
    )
    parser.add_argument("--quick", action="store_true", help="tiny shapes, for tests; recorded only with --out")
    parser.add_argument("--out", type=Path, help="one JSON file for all rows instead of one per suite")
    parser.add_argument("--html", type=Path, help="also show all rows as a page: one file that needs no network")
    parser.add_argument(
        "--journal", type=Path, help="append JSON lines to this file instead; cases that it already has are skipped"
    )
    parser.add_argument("--again", type=Path, help="run only the cases that failed or had no time left in this journal")
    parser.add_argument("--dtype", nargs="+", choices=_DTYPES, default=["fp32", "bf16"], help="dtypes of the weights")
    parser.add_argument("--threads", type=int, help="CPU threads")
    parser.add_argument("--budget", type=float, help="seconds of timing per case (8, or 2 on CUDA)")
    parser.add_argument("--seconds", type=float, help="start no case after so many seconds")
    parser.add_argument("--case-seconds", type=float, help=f"exit with {DOOMED} if a case takes longer")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(argv)
    try:
        options.suite = dict(_limited(text) for text in options.suite or SUITES)
    except ValueError as error:
        parser.error(str(error))
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device is cuda, but torch finds no CUDA device")
    for name in ("threads", "budget", "seconds", "case_seconds"):
        given = getattr(options, name)
        if given is not None and given <= 0:
            parser.error(f"--{name.replace('_', '-')} is {given}, must be positive")
    return options


def _limited(text: str) -> tuple[str, float]:
    """Return a suite's name and its seconds."""
    name, _, seconds = text.partition(":")
    if name not in SUITES:
        raise ValueError(f"suite is {name!r}, must be one of {', '.join(SUITES)}")
    try:
        return name, float(seconds or "inf")
    except ValueError:
        raise ValueError(f"suite is {text!r}, must be NAME or NAME:SECONDS") from None
