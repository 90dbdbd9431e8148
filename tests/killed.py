"""The command `qatkernels` under torchrun, killed by SIGKILL in the middle of training.

    torchrun --nproc-per-node 2 --max-restarts 3 -m tests.killed 1:7 train ...

The first argument is the rank that dies in the first attempt of torchrun (``*``: any), and the forward pass of training
in which it does. Later attempts run to their end. ``-`` in place of both: none dies.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

from qatkernels.cli import run
from tests.passes import each_pass


def main() -> int:
    """Run the command of the other arguments, and die where the first one says so."""
    rank, _, dies = sys.argv.pop(1).partition(":")
    attempt, own = int(os.environ["TORCHELASTIC_RESTART_COUNT"]), int(os.environ["RANK"])

    def die(number: int, model: Any) -> None:
        if attempt == 0 and rank in ("*", str(own)) and str(number) == dies:
            print(f"attempt 0: rank {own} is killed in pass {number}", file=sys.stderr, flush=True)
            os.kill(os.getpid(), signal.SIGKILL)

    if attempt and own == 0:
        print(f"attempt {attempt}", file=sys.stderr, flush=True)
    with each_pass(die):
        return run()


if __name__ == "__main__":
    sys.exit(main())
