"""Shared code of all parts of the campaign: command line, random numbers of a case, progress, failures, JSON file.

A case is identified by a part, a name within it, a seed and a number. All its random numbers depend only on these, so
the command that is printed for a failure reproduces it.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import random
import secrets
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

#: Parts by name: the module, and what it tests.
PARTS = {
    "mutations": ("mutations", "damaged, foreign and crafted files"),
    "kills": ("kills", "kill -9 at random moments, then the same command again"),
    "memory": ("memory", "memory over many steps of training"),
    "random": ("random_calls", "random calls of every op against float64 or exact results"),
    "threads": ("threads", "all kernels and the memory pool from eight threads at once"),
    "forks": ("forks", "forks of a process whose threads compute"),
    "sanitizers": ("sanitizers", "the op tests on builds that check themselves"),
}
_REPORT_EVERY = 15.0


class Wrong(AssertionError):
    """A case gave a wrong result; the message describes it."""


@dataclass
class Campaign:
    """One call of a part.

    Attributes:
        part: its name.
        seed: of everything random.
        cases: number of cases for each name; the default of the part if None.
        seconds: time for each name, instead of a number of cases.
        only: names to run; all if empty.
        case: the only case to run.
        out: file of the figures, written after each name.
        command: the command line, recorded in the file.
    """

    part: str
    seed: int = 0
    cases: int | None = None
    seconds: float | None = None
    only: tuple[str, ...] = ()
    case: int | None = None
    out: Path | None = None
    command: str = ""
    failures: list[dict[str, Any]] = field(default_factory=list)
    results: dict[str, Any] = field(default_factory=dict)
    began: float = field(default_factory=time.monotonic)

    def chosen(self, names: Iterable[str]) -> list[str]:
        """Return the names to run.

        Raises:
            SystemExit: if one was asked for that the part does not have.
        """
        names = list(names)
        if unknown := [name for name in self.only if name not in names]:
            raise SystemExit(f"{self.part} has no {unknown[0]!r}, must be of {', '.join(names)}")
        return list(self.only) or names

    def each(self, names: Iterable[str], work: Callable[[str], dict[str, Any]]) -> None:
        """Run the chosen names. After each, add its figures to the file."""
        about = {"command": self.command, "seed": self.seed, **machine()}
        for name in self.chosen(names):
            before = len(self.failures)
            self.results[name] = found = work(name)
            numbers = ", ".join(f"{key} {value}" for key, value in found.items() if not isinstance(value, (list, dict)))
            self.say(f"{self.part} {name}: {numbers}")
            if self.out:
                written = json.loads(self.out.read_text())["results"] if self.out.exists() else {}
                written[name] = {**found, "failures": self.failures[before:], "about": about}
                self.out.write_text(json.dumps({"part": self.part, "results": written}, indent=1) + "\n")

    def seconds_so_far(self) -> float:
        """Return the time since the campaign began."""
        return round(time.monotonic() - self.began, 1)

    def draw(self, name: str, case: int) -> random.Random:
        """Return the random generator of a case."""
        return random.Random(f"{self.seed} {self.part} {name} {case}")

    def numbers(self, name: str, cases: int) -> Iterator[int]:
        """Yield the numbers of the cases, and print the progress from time to time.

        Args:
            name: of what is run.
            cases: how many, unless the command line says otherwise.
        """
        if self.case is not None:
            yield self.case
            return
        most = self.cases if self.cases is not None else None if self.seconds is not None else cases
        began = said = time.monotonic()
        number, before = 0, len(self.failures)
        while most is None or number < most:
            now = time.monotonic()
            if self.seconds is not None and now - began >= self.seconds:
                break
            if now - said >= _REPORT_EVERY:
                wrong = len(self.failures) - before
                self.say(f"  {name}: {number} cases in {now - began:.0f} s, {wrong} wrong")
                said = now
            yield number
            number += 1

    def again(self, name: str, case: int) -> str:
        """Return the command that runs a single case."""
        return f"python -m tests.reliability {self.part} {name} --seed {self.seed} --case {case}"

    def fail(self, name: str, case: int, why: str) -> None:
        """Record a failure, and print at once the command that reproduces it."""
        again = self.again(name, case)
        self.failures.append({"name": name, "case": case, "why": why, "again": again})
        if sum(failure["name"] == name for failure in self.failures) <= 20:
            self.say(f"WRONG {name} {case}: {why}\n  {again}")

    @staticmethod
    def say(line: str) -> None:
        """Print a line without buffering."""
        print(line, flush=True)


def machine() -> dict[str, Any]:
    """Return the machine of the figures, as in the benchmarks, and the commit."""
    import torch

    from bench.machine import build_info, cpu_model, git_state, versions

    return {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_before": round(os.getloadavg()[0], 2),
        "versions": versions(),
        "build": build_info(),
        "git": git_state(),
    }


def run(campaign: Campaign) -> int:
    """Run a part; return 0 if nothing was wrong, 1 if something was."""
    campaign.say(f"{campaign.part}: seed {campaign.seed}")
    importlib.import_module(f"{__package__}.{PARTS[campaign.part][0]}").run(campaign)
    verdict = f"{len(campaign.failures)} WRONG" if campaign.failures else "nothing wrong"
    campaign.say(f"{campaign.part}: {verdict}, seed {campaign.seed}, {campaign.seconds_so_far()} s")
    return 1 if campaign.failures else 0


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return 0 if nothing was wrong, 1 if something was."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.reliability", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="parts:\n" + "\n".join(f"  {name:<11} {text}" for name, (_, text) in PARTS.items()),
    )  # fmt: skip
    parser.add_argument("part", choices=PARTS, metavar="PART", help="one of the parts below")
    parser.add_argument("names", nargs="*", metavar="NAME", help="what of it to run; all if not given")
    parser.add_argument("--cases", type=int, metavar="N", help="cases for each name")
    parser.add_argument("--seconds", type=float, metavar="T", help="time for each name, instead of --cases")
    parser.add_argument("--seed", type=int, metavar="S", help="seed; a new one if not given, and printed")
    parser.add_argument("--case", type=int, metavar="K", help="run this case alone")
    parser.add_argument("--out", type=Path, metavar="JSON", help="file to write figures to, or into")
    args = parser.parse_args(argv)
    seed = secrets.randbelow(2**32) if args.seed is None else args.seed
    command = "python -m tests.reliability " + " ".join(sys.argv[1:] if argv is None else argv)
    return run(Campaign(args.part, seed, args.cases, args.seconds, tuple(args.names), args.case, args.out, command))
