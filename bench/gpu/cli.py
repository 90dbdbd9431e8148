"""The command line: ``python -m bench.gpu``. It imports torch only where needed: calls only start processes."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from .calls import MORE, SUITE_SECONDS
from .target import FOLDER, LAST, MOST_BYTES, PACK, PARTS, ROOT

#: Seconds that each call may take, and how many more the machine allows before it kills the command.
SECONDS = {"call1": 440.0, "call2": 300.0, "again": 180.0}
_MARGIN = 20
_DRY_SECONDS = 1800.0
#: Longest command line that a GPU machine may take.
_MOST_CHARACTERS = 2000


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code."""
    options = _options(argv)
    return int(globals()[f"_{options.command}"](options) or 0)


def _pack(options: argparse.Namespace) -> int:
    from . import pack

    return pack.make(options.seconds, options.jobs, tuple(options.parts))


def _warm(options: argparse.Namespace) -> int:
    from . import warm

    return warm.main(options.part, options.seconds, options.share, compiling=not options.count)


def _command(options: argparse.Namespace) -> int:
    seconds = SECONDS[options.call] if options.seconds is None else options.seconds
    line = f"python3 -m bench.gpu {options.call} --out {options.out} --seconds {seconds:.0f}"
    assert len(line) <= _MOST_CHARACTERS
    carried = [path for path in (PACK, LAST) if path.exists() and (path == PACK or options.call != "call1")]
    print(f"command:   {line}")
    print(f"time:      {seconds + _MARGIN:.0f} s")
    for path in carried:
        print(f"take along: {path.relative_to(ROOT)} ({path.stat().st_size / 2**20:.1f} MiB)")
    if PACK not in carried:
        print(f"nothing to take along: `python -m bench.gpu pack` makes {PACK.relative_to(ROOT)}")
    print(f"comes back: {options.out}, which `python -m bench.gpu import` takes")
    return 1 if sum(path.stat().st_size for path in carried) > MOST_BYTES else 0


def _call(options: argparse.Namespace) -> int:
    from . import calls
    from .results import summary
    from .steps import Call

    # A dry run does not measure time, and the machine may be busy.
    seconds = options.seconds or (_DRY_SECONDS if options.dry else SECONDS[options.command])
    call = Call(options.out, seconds, options.dry)

    def killed(number: int, frame: Any) -> NoReturn:
        call.stop()
        raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, killed)
    try:
        if options.command == "call1":
            calls.first(call)
        elif options.command == "again":
            calls.again(call, options.after, options.suites, options.then)
        else:
            calls.second(call, options.after)
    finally:
        call.stop()
        text = summary(call.folder)
        (call.folder / "summary.txt").write_text(text + "\n")
        print(f"\n{text}", flush=True)
    return 0


_call1 = _call2 = _again = _call


def _smoke(options: argparse.Namespace) -> int:
    from . import smoke

    return smoke.main(options.journal, dry=options.dry, backend=options.backend, every=options.every,
                      again=options.again, under=options.under)  # fmt: skip


def _profile(options: argparse.Namespace) -> int:
    from . import profile

    return profile.main(options.kernel, dry=options.dry)


def _tune(options: argparse.Namespace) -> int:
    from . import tune

    return tune.main(options.journal, options.seconds)


def _host(options: argparse.Namespace) -> int:
    from . import host

    return host.main()


def _probe(options: argparse.Namespace) -> int:
    from . import pack

    return pack.probe()


def _summary(options: argparse.Namespace) -> int:
    from .results import summary

    print(summary(options.folder))
    return 0


def _import(options: argparse.Namespace) -> int:
    from ..markdown import DOCS
    from .results import bring_home

    for path in bring_home(options.folders, options.results, options.docs or DOCS, options.last):
        print(path)
    return 0


def _docs(options: argparse.Namespace) -> int:
    from ..markdown import DOCS
    from .tables import update

    update(DOCS, ROOT / "bench/results")
    return 0


def _share(text: str) -> tuple[int, int]:
    number, _, of = text.partition("/")
    return int(number), int(of)


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)

    def add(name: str, text: str) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=text, description=text)

    _here(add)
    for name, text in (
        ("call1", "On the GPU machine: import, doctor, smoke, rows, tests."),
        ("call2", "On the GPU machine: what failed in call 1, sanitizers, profiler, a real model."),
        ("again", "On the GPU machine, after a change: smoke, some suites, the tests that failed."),
    ):
        call = add(name, text)
        call.add_argument("--out", type=Path, required=True, help="folder for the journal, the logs and the summary")
        call.add_argument("--seconds", type=float, help=f"when to be done ({SECONDS[name]:.0f})")
        call.add_argument("--dry", action="store_true", help="on a CPU with tiny shapes, to see that everything runs")
        call.add_argument("--after", type=Path, default=LAST, help="call2, again: journal of an earlier call")
        call.add_argument("--then", nargs="+", default=[], choices=MORE, help="again: what to run besides")
        call.add_argument(
            "--suites",
            nargs="+",
            default=["lowbit", "linear"],
            choices=SUITE_SECONDS,
            help="again: suites that run as a whole",
        )
    _parts(add)
    return parser.parse_args(argv)


def _here(add: Any) -> None:
    """Add the commands that run here, not on the GPU machine."""
    pack = add("pack", f"Make what is taken along: the extension and Triton's cache, in {PACK.relative_to(ROOT)}.")
    pack.add_argument("--seconds", type=float, default=float("inf"), help="when to stop compiling a part's kernels")
    pack.add_argument("--jobs", type=int, default=1, help="processes that compile at once")
    pack.add_argument("--parts", nargs="+", default=["smoke", "rows", "tests"], choices=PARTS)
    command = add("command", "Print the command line of a call, and what must be taken along.")
    command.add_argument("call", choices=SECONDS)
    command.add_argument("--out", default="out", help="folder that comes back, as the command line names it")
    command.add_argument("--seconds", type=float, help="when the call is to be done")
    summary = add("summary", "Print the summary of a call from its journal.")
    summary.add_argument("folder", type=Path)
    home = add("import", "Write the rows of calls to bench/results and the tables of docs/benchmarks.md.")
    home.add_argument("folders", type=Path, nargs="+", help="folders of calls, the earliest first")
    home.add_argument("--results", type=Path, default=ROOT / "bench/results", help="where the JSON goes")
    home.add_argument("--docs", type=Path, help="page whose tables are made (docs/benchmarks.md)")
    home.add_argument("--last", type=Path, default=FOLDER / "last.jsonl", help="copy of the journal, for call2")
    add("docs", "Make the tables of docs/benchmarks.md from bench/results.")


def _parts(add: Any) -> None:
    """Add the commands that calls and packs start."""
    warm = add("warm", "Compile, or count, the Triton kernels that a part of the calls needs. No GPU is needed.")
    warm.add_argument("part", choices=PARTS)
    warm.add_argument("--seconds", type=float, default=float("inf"), help="when to stop")
    warm.add_argument("--share", type=_share, default=(0, 1), help="I/N: every N-th call from the I-th on")
    warm.add_argument("--count", action="store_true", help="compile nothing")
    smoke = add("smoke", "Check every op on every backend of the GPU once.")
    smoke.add_argument("--journal", type=Path, required=True, help="gets a line for each check")
    smoke.add_argument("--dry", action="store_true", help="on the CPU")
    smoke.add_argument("--backend", help="this backend's alone")
    smoke.add_argument("--every", type=int, default=1, help="every n-th check")
    smoke.add_argument("--again", type=Path, help="only what failed according to this journal")
    smoke.add_argument("--under", default="", help="the tool that watches")
    profile = add("profile", "Run one kernel for a profiler.")
    profile.add_argument("kernel", choices=("gemv", "decode", "backward"))
    profile.add_argument("--dry", action="store_true", help="on the CPU")
    tune = add("tune", "Time tile sizes of the Triton kernels.")
    tune.add_argument("--journal", type=Path, required=True, help="gets a line for each candidate")
    tune.add_argument("--seconds", type=float, default=float("inf"), help="when to stop")
    add("probe", "Say whether Triton finds in its cache what the pack brought.")
    add("host", "Time what calls cost on the host; without a GPU with a runtime that launches nothing.")


if __name__ == "__main__":
    sys.exit(main())
