"""The command line: ``python -m bench``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from .case import Settings
from .machine import Machine
from .report import RESULTS, show, write
from .run import Row, run_case
from .suites import SUITES

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the suites and return the exit code: 1 if any result was wrong or any implementation of ours failed."""
    options = _options(argv)
    if options.threads:
        torch.set_num_threads(options.threads)
    dtypes = tuple(_DTYPES[name] for name in options.dtype)
    settings = Settings(torch.device(options.device), dtypes, options.peers, options.quick)
    budget = options.budget or (0.05 if options.quick else 2.0 if options.device == "cuda" else 8.0)
    machine = Machine(settings)
    print(f"{machine.name}, {torch.get_num_threads()} threads, copies at {machine.bandwidth * 1e-9:.4g} GB/s")
    names = options.suite or list(SUITES)
    recorded = {"suites": names, "budget_s": budget} | {
        key: getattr(options, key) for key in ("dtype", "peers", "quick")
    }
    everything: list[Row] = []
    for name in names:
        rows: list[Row] = []
        for case in SUITES[name](settings):
            found = run_case(name, case, machine, budget)
            show(found)
            rows += found
        everything += rows
        if not options.out and not options.quick:
            part = "" if set(options.dtype) == {"fp32", "bf16"} else "-" + "-".join(options.dtype)
            write(rows, machine, {**recorded, "suites": [name]}, RESULTS / f"{name}{part}-{machine.slug}.json")
    if options.out:
        write(everything, machine, recorded, options.out)
    return _verdict(everything)


def _verdict(rows: Sequence[Row]) -> int:
    bad = [row for row in rows if row["status"] in ("wrong", "failed")]
    for row in bad:
        print(f"{row['status'].upper()}: {row['case']}: {row['implementation']} ({row['timing']})", file=sys.stderr)
    return 1 if bad else 0


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench", description="Check, then time, every op and its peers.")
    parser.add_argument("suite", nargs="*", help=f"{', '.join(SUITES)}; all of them by default")
    parser.add_argument("--peers", action="store_true", help="also time other libraries; those not installed are said")
    parser.add_argument("--quick", action="store_true", help="tiny shapes, for tests; recorded only with --out")
    parser.add_argument("--out", type=Path, help="one JSON file for all rows instead of one per suite")
    parser.add_argument("--dtype", nargs="+", choices=_DTYPES, default=["fp32", "bf16"], help="dtypes of the weights")
    parser.add_argument("--threads", type=int, help="CPU threads")
    parser.add_argument("--budget", type=float, help="seconds of timing per case (8, or 2 on CUDA)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(argv)
    unknown = [name for name in options.suite if name not in SUITES]
    if unknown:
        parser.error(f"suite is {unknown[0]!r}, must be one of {', '.join(SUITES)}")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device is cuda, but torch finds no CUDA device")
    for name in ("threads", "budget"):
        given = getattr(options, name)
        if given is not None and given <= 0:
            parser.error(f"--{name} is {given}, must be positive")
    return options
