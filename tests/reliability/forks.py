"""Forks of a process whose threads compute, as data loaders and worker pools do.

The child is forked while other threads of the parent call kernels, and calls every kernel itself. Its results must have
the parent's bits, and it must end: a lock that a parent's thread held at the fork stays locked in the child. torch's
own thread pool does not survive a fork, so the child computes with one thread, as torch requires.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from typing import Any

import torch

import qatkernels as qk

from .runner import Campaign
from .threads import calls, outcome

CASES = 200
#: A child that takes more seconds than this counts as hung.
PATIENCE = 60


def run(campaign: Campaign) -> None:
    """Run the only name of this part."""
    campaign.each(["forks"], lambda name: repeatedly(campaign))


def repeatedly(campaign: Campaign) -> dict[str, Any]:
    """Fork many times while two threads allocate blocks from the pool and free them."""
    torch.set_num_threads(1)
    torch.manual_seed(campaign.seed)
    todo = calls(campaign.seed)
    wanted = [outcome(op, args) for op, args in todo]
    over, busy = threading.Event(), [0]

    def work() -> None:
        while not over.is_set():
            for op, args in todo[:3]:
                outcome(op, args)
                busy[0] += 1
            qk.empty_cache()

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    cases, began = 0, time.monotonic()
    try:
        for case in campaign.numbers("forks", CASES):
            cases += 1
            if why := _forked(todo, wanted):
                campaign.fail("forks", case, why)
    finally:
        over.set()
        for thread in threads:
            thread.join()
    seconds = round(time.monotonic() - began, 1)
    return {"forks": cases, "calls in each child": len(todo), "calls meanwhile": busy[0], "seconds": seconds}


def _forked(todo: list[Any], wanted: list[Any]) -> str | None:
    """Fork, and return what went wrong in the child."""
    sys.stdout.flush()
    if (pid := os.fork()) == 0:
        code = 3
        try:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(PATIENCE)
            torch.set_num_threads(1)
            code = 0
            for (op, args), expected in zip(todo, wanted, strict=True):
                if any(not torch.equal(a, b) for a, b in zip(outcome(op, args), expected, strict=True)):
                    print(f"{op} has other bits in a child", flush=True)
                    code = 4
            qk.empty_cache()
        except BaseException as error:
            print(f"in a child: {type(error).__name__}: {error}", flush=True)
            code = 5
        finally:
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if code == -signal.SIGALRM:
        return f"a child hangs: it had not ended after {PATIENCE} s"
    return f"a child ended with {code}" if code else None
