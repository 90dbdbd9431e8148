"""kill -9 at random moments, then the same command again. The final result must be that of an undisturbed run.

One process imports everything and forks the others, so that a case takes no longer than its training. It starts no
threads, since a fork would copy their locks. Each case has its own folder and is killed one to three times, in turn in
three ways: at a random moment within the time of an undisturbed run; while an unfinished file exists; or by the process
itself, at a random call of those that write, rename, flush and delete.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import tiny
from .runner import Campaign, Wrong

CASES = 100
#: A command counts as hung if it takes longer than this many times its undisturbed time plus a minute.
PATIENCE = 20
_CALLS = ("fsync", "replace", "unlink", "open", "mkdir")
#: Ways to kill a command, used in rotation, so that a few cases include each way.
_WAYS = ("call", "moment", "file", "moment")


@dataclass
class Command:
    """A command that is killed.

    Attributes:
        arguments: of the command line, with the folder of the case.
        outcome: the results that must be the same in the end, by name.
        ranks: number of processes.
    """

    arguments: Callable[[Path], list[str]]
    outcome: Callable[[Path], dict[str, Any]]
    ranks: int = 1
    before: Callable[[Path], None] = lambda folder: None


def trained(folder: Path) -> dict[str, Any]:
    """Return the results of a run: weights, log and report, without times."""
    from qatkernels import files

    out = folder / "run"
    left: dict[str, Any] = {}
    for phase in sorted(path for path in out.iterdir() if path.is_dir()):
        if (names := sorted(p.name for p in phase.iterdir())) != ["model.safetensors", "phase.json"]:
            raise Wrong(f"{phase.name} holds {names}")
        tensors, _ = files.load(phase / "model.safetensors")
        left[phase.name] = {name: files.digest({"": tensor}) for name, tensor in tensors.items()}
    left["log"] = (out / "log.jsonl").read_text()
    report = files.read_json(out / "report.json")
    for row in report["rows"]:
        row.pop("seconds")
        row.pop("tokens_per_second")
    left["report"] = {name: report[name] for name in ("rows", "curves", "starts", "text")}
    left["files"] = sorted(p.name for p in out.iterdir() if p.name != ".lock")
    return left


def contents(*names: str) -> Callable[[Path], dict[str, Any]]:
    """Return a function that reads the bytes of files, including the standard output."""
    return lambda folder: {name: (folder / name).read_bytes() for name in names}


def analysed(folder: Path) -> dict[str, Any]:
    """Return the results of `spectrum`."""
    from qatkernels import files

    out = folder / "spectrum"
    report = files.read_json(out / "report.json")
    report.pop("machine")
    return {
        "report": report, "files": sorted(str(p.relative_to(out)) for p in out.rglob("*") if p.name != ".lock"),
        **{p.name: p.read_bytes() for p in (out / "ritz").iterdir()},
    }  # fmt: skip


def commands(shared: Path) -> dict[str, Command]:
    """Return the commands by name. ``shared`` has the text, and for the last ones a trained model and a table."""
    settings = {**tiny.SETTINGS, "data": str(shared / "text.txt")}

    def training(ranks: int = 1, **changes: Any) -> Command:
        return Command(
            lambda folder: ["train", *tiny.options({**settings, **changes, "out": str(folder / "run")})], trained, ranks
        )

    model = shared / "model" / "run"
    return {
        "train": training(),
        "winq": training(method="winq", reset_every=2, stats_every=1),
        "squat": training(method="squat", stats_every=2, act_bits=8),
        "pair": training(2, parallel="ddp", method="winq", reset_every=2),
        "sharded": training(2, parallel="fsdp"),
        "pack": Command(
            lambda folder: ["pack", str(model / "w2"), str(folder / "packed.safetensors")],
            contents("packed.safetensors"),
        ),
        "spectrum": Command(
            lambda folder: ["spectrum", str(model / "fp"), str(model / "w2"), "--probes", "2", "--steps", "6",
                            "--windows", "2", "--device", "cpu", "--out", str(folder / "spectrum")],
            analysed,
        ),
        "plan": Command(
            lambda folder: ["plan", "--params", "100M", "--tokens", "10B", "--bits", "2", "--runs",
                            str(shared / "runs.csv"), "--resamples", "8", "--save", str(folder / "law.json"),
                            "--html", str(folder / "plan.html")],
            contents("law.json", "plan.html", "output"),
        ),
    }  # fmt: skip


def warm() -> None:
    """Import what the commands import, without a thread."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    import torch
    import torch._dynamo
    import torch.distributed.checkpoint
    import torch.distributed.fsdp

    from qatkernels.trainer import generate, loop, spectra  # noqa: F401
    from studies import plan_recovery  # noqa: F401

    torch.set_num_threads(1)
    if (threads := len(os.listdir("/proc/self/task"))) > 1:
        raise RuntimeError(f"{threads} threads before the first fork, must be one: set OMP_NUM_THREADS=1")


def start(command: Command, folder: Path, dies: tuple[str, int] | None = None) -> list[int]:
    """Fork the processes of a command; return their ids.

    Args:
        command: what they do.
        folder: of the case.
        dies: a function of `os`, and the number of the call of it at which the first process kills itself.
    """
    port = _free_port() if command.ranks > 1 else 0
    sys.stdout.flush()
    return [_forked(command, folder, rank, port, dies if rank == 0 else None) for rank in range(command.ranks)]


def _forked(command: Command, folder: Path, rank: int, port: int, dies: tuple[str, int] | None) -> int:
    if pid := os.fork():
        return pid
    code = 99
    try:
        output = os.open(folder / "output", os.O_WRONLY | os.O_CREAT | (os.O_TRUNC if rank == 0 else 0))
        errors = os.open(folder / f"errors{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output if rank == 0 else errors, 1)
        os.dup2(errors, 2)
        if command.ranks > 1:
            os.environ |= {
                "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(command.ranks),
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo",
            }  # fmt: skip
        if dies:
            _die_at(*dies)
        from qatkernels import cli

        code = cli.main(command.arguments(folder))
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 98
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _die_at(name: str, left: int) -> None:
    """Kill this process right after a given call of a function of `os` (for ``open`` the built-in one)."""
    import builtins

    where: Any = builtins if name == "open" else os
    function = getattr(where, name)

    def counting(*arguments: Any, **named: Any) -> Any:
        nonlocal left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        result = function(*arguments, **named)
        if left == 1 and name != "open":  # after the call, so that its effect is there
            left = 0
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(where, name, counting)


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def finish(pids: list[int], patience: float, grace: float | None = None) -> list[int]:
    """Wait for processes, and return their exit codes.

    Args:
        pids: the processes.
        patience: seconds after which they count as hung.
        grace: if one fails, the others are killed after so many seconds, as torchrun does.

    Raises:
        Wrong: if they hang.
    """
    codes: dict[int, int] = {}
    until, hung = time.monotonic() + patience, False
    while len(codes) < len(pids):
        for pid in pids:
            if pid not in codes and (ended := os.waitpid(pid, os.WNOHANG))[0]:
                codes[pid] = os.waitstatus_to_exitcode(ended[1])
                if codes[pid] and grace is not None:
                    until = min(until, time.monotonic() + grace)
        if time.monotonic() > until:
            hung = grace is None or not codes
            for pid in pids:
                if pid not in codes:
                    os.kill(pid, signal.SIGKILL)
            until = float("inf")
        time.sleep(0.0005)
    if hung:
        raise Wrong(f"it had not ended after {patience:.0f} s")
    return [codes[pid] for pid in pids]


def whole(command: Command, folder: Path, patience: float) -> dict[str, Any]:
    """Run a command, which must succeed, and return the outcome."""
    codes = finish(start(command, folder), patience)
    if any(codes):
        said = " ".join(" ".join((folder / f"errors{rank}").read_text().split()) for rank in range(command.ranks))
        raise Wrong(f"exit codes {codes}: {said[-400:]}")
    # `pack` and `plan` do not delete unfinished files in their folder: other processes may be writing there.
    left = [str(path.relative_to(folder)) for path in folder.rglob("*.tmp")]
    if left and command.outcome in (trained, analysed):
        raise Wrong(f"it left {left[0]}")
    return command.outcome(folder)


def kill(command: Command, folder: Path, way: str, draw: random.Random, seconds: float, counts: dict[str, int]) -> None:
    """Start a command and kill it in one of `_WAYS`. It does not count if the command ends before."""
    if way == "call":
        call = draw.choice(_CALLS)
        # Early calls are more likely than late ones, since a short command makes few calls.
        dies = call, draw.randint(1, draw.choice((1, 3, 10)))
        codes = finish(start(command, folder, dies), PATIENCE * seconds + 60, grace=2)
        counts[way if -signal.SIGKILL in codes else "over before"] += 1
        return
    pids = start(command, folder)
    wait, began = draw.uniform(0, seconds), time.monotonic()
    alive = True
    while alive:
        late = time.monotonic() - began > wait
        if late and (way == "moment" or any(folder.rglob("*.tmp")) or time.monotonic() - began > 4 * seconds):
            break
        alive = _alive(pids[0])
        time.sleep(0.0002 if late else 0.001)
    if alive:
        for pid in pids if draw.random() < 0.5 else [draw.choice(pids)]:
            os.kill(pid, signal.SIGKILL)
        counts["while a file was written" if any(folder.rglob("*.tmp")) else "moment"] += 1
    else:
        counts["over before"] += 1
    finish(pids, PATIENCE * seconds + 60, grace=0.5)


def _alive(pid: int) -> bool:
    """Return whether a child still runs, without reaping it."""
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None


def run(campaign: Campaign) -> None:
    """Kill each command many times."""
    warm()
    # In memory if possible: the effect of SIGKILL does not depend on the disk, which would take most of the time.
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None) as name:
        shared = Path(name)
        tiny.text(shared)
        known = commands(shared)
        chosen = campaign.chosen(known)
        if {"pack", "spectrum"} & set(chosen):
            (shared / "model").mkdir()
            whole(known["train"], shared / "model", 120)
        if "plan" in chosen:
            _write_table(shared / "runs.csv")
        campaign.each(known, lambda name: _killed(campaign, name, known[name], shared))


def _write_table(path: Path) -> None:
    """Write a table in a separate process, so that numpy starts no threads in this one."""
    if (pid := os.fork()) == 0:
        code = 1
        try:
            from .other_targets import write_table

            write_table(path)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    if os.waitpid(pid, 0)[1]:
        raise Wrong("the table of runs was not written; the reason is above")


def _killed(campaign: Campaign, name: str, command: Command, shared: Path) -> dict[str, Any]:
    first, seconds = shared / f"{name}-whole", float("inf")
    for _ in range(2):  # twice, since the machine may be busy
        first.mkdir()
        began = time.monotonic()
        wanted = whole(command, first, 300)
        seconds = min(seconds, time.monotonic() - began)
        shutil.rmtree(first)
    counts = {"moment": 0, "while a file was written": 0, "call": 0, "over before": 0}
    cases = 0
    began = time.monotonic()
    for case in campaign.numbers(name, CASES):
        folder, draw = shared / f"{name}-{case}", campaign.draw(name, case)
        folder.mkdir()
        cases += 1
        try:
            for again in range(draw.choice((1, 1, 2, 3))):
                kill(command, folder, _WAYS[(case + again) % len(_WAYS)], draw, seconds, counts)
            found = whole(command, folder, PATIENCE * seconds + 60)
            _compare(found, wanted)
        except Wrong as wrong:
            campaign.fail(name, case, str(wrong))
        except Exception as error:
            campaign.fail(name, case, f"{type(error).__name__}: {error}")
        shutil.rmtree(folder)
    kills = sum(counts.values()) - counts["over before"]
    took = round(time.monotonic() - began, 1)
    return {"cases": cases, "kills": kills, **counts, "undisturbed seconds": round(seconds, 2), "seconds": took}


def _compare(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    if found != wanted:
        odd = next(key for key in {**wanted, **found} if found.get(key) != wanted.get(key))
        raise Wrong(f"{odd} is not that of an undisturbed run: {found.get(odd)!r:.200} for {wanted.get(odd)!r:.200}")
