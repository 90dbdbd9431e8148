"""A short form of the kills: each way to train and each command, in a process without threads to fork from."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs fork and /proc")


def kills(tmp_path: Path, seed: int, cases: int, *names: str) -> dict[str, dict[str, int]]:
    """Run the part in a process of its own, which must find nothing wrong."""
    out = tmp_path / "out.json"
    done = subprocess.run(
        [sys.executable, "-m", "tests.reliability", "kills", *names, "--cases", str(cases), "--seed", str(seed),
         "--out", str(out)],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
        timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    results: dict[str, dict[str, int]] = json.loads(out.read_text())["results"]
    return results


def test_one_process(tmp_path: Path) -> None:
    results = kills(tmp_path, 14, 4, "train", "winq", "squat", "pack", "spectrum", "plan")
    assert all(found["kills"] > 0 for found in results.values())
    # Which kills at a moment come in time depends on the machine. Which calls a command makes does not.
    assert sum(found["call"] for found in results.values()) > 3


def test_two_processes(tmp_path: Path) -> None:
    results = kills(tmp_path, 14, 2, "pair", "sharded")
    assert all(found["kills"] > 0 for found in results.values())
