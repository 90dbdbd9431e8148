"""The tests of ops on sanitizer and debug builds of the extension: `.ci/fault-builds`, with figures of each.

``address``: AddressSanitizer and UndefinedBehaviorSanitizer. ``debug``: -O0 and the assertions of the C++ library.
``lto``: link-time optimization, where two definitions of a name that differ are an error. ``thread``: ThreadSanitizer
on eight Python threads that use all kernels and the pool at once (`threads.py`). torch and Python are not instrumented:
their own memory accesses are not checked, but their locks count. The environment variable ISAS ("avx2|avx512") builds
only some ISAs, and TREE names a folder that keeps the builds, as in `.ci/fault-builds`.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from .runner import Campaign

ROOT = Path(__file__).parents[2]
KINDS = ("address", "debug", "lto", "thread")


def run(campaign: Campaign) -> None:
    """Make and test each build."""
    campaign.each(KINDS, lambda kind: _tested(campaign, kind))


def _tested(campaign: Campaign, kind: str) -> dict[str, Any]:
    tests = "tests/reliability/test_threads.py" if kind == "thread" else os.environ.get("TESTS", "tests/ops")
    environment = {**os.environ, "TESTS": tests, "PYTHON": sys.executable}
    environment["PATH"] = os.pathsep.join((str(Path(sys.executable).parent), environment.get("PATH", "")))
    environment.pop("PYTHONPATH", None)
    began = time.monotonic()
    command = [str(ROOT / ".ci" / "fault-builds"), kind]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    summary = re.findall(r"^(?:=+ )?(\d+ .*(?:passed|failed|error).* in [\d.]+s.*?)(?: =+)?$", done.stdout, re.M)
    reports = re.findall(r"(?:ERROR|WARNING|SUMMARY): \w+Sanitizer.*|runtime error: .*", done.stdout + done.stderr)
    if done.returncode or reports:
        said = (reports or (done.stdout + done.stderr).strip().splitlines() or ["nothing"])[-1]
        campaign.fail(kind, 0, f"exit code {done.returncode}: {said[:300]}")
    built = [
        "baseline",
        *filter(None, os.environ.get("ISAS", "avx2|avx512|avx512_vnni|avx512_icelake|avx512_bf16").split("|")),
    ]
    return {
        "isas": built, "tests": tests, "outcome": summary[-1] if summary else "", "reports": len(reports),
        "seconds": round(time.monotonic() - began, 1),
    }  # fmt: skip
