"""torchrun starts a job again after SIGKILL, and it ends with the bits of a job that was not killed."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from tests.pair import Group

from .conftest import options, outcome
from .test_parallel import train_one_of_two

pytestmark = pytest.mark.skipif(sys.platform != "linux" or not dist.is_gloo_available(), reason="needs gloo")

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(("parallel", "rank"), [("ddp", 0), ("fsdp", 1)])
def test_killed_and_started_again(pair: Group, tiny: dict[str, Any], tmp_path: Path, parallel: str, rank: int) -> None:
    settings = {**tiny, "parallel": parallel}
    assert [end for end, _ in pair.run(train_one_of_two, settings)] == ["done", "done"]
    draw = random.Random(rank if os.environ.get("CI") else None)
    death = f"{rank}:{draw.randint(1, tiny['steps'] + tiny['qat_steps'])}"
    again = str(tmp_path / "again")
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "3",
         "-m", "tests.killed", death, "train", *options({**settings, "out": again})],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, f"{death}\n{done.stderr}"
    # A second attempt is enough: it reads no address of the first one's processes.
    attempts = [line for line in done.stderr.splitlines() if line.startswith("attempt ")]
    assert attempts == [f"attempt 0: rank {death.replace(':', ' is killed in pass ')}", "attempt 1"], done.stderr
    assert outcome(again) == outcome(settings["out"]), death
