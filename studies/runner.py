"""The one command of all studies.

    python -m studies                             the studies
    python -m studies NAME                        run what is not finished
    python -m studies NAME --only 'w1-*' --seeds 1
    python -m studies NAME --report               print the tables and draw the pictures of what is finished
    python -m studies NAME --report --page PAGE   and write the tables into a page of the documents, between its marks

A study writes into one folder, ``--out``:

    <out>/<name>.jsonl    the results: a row for each run, written when the run is finished (studies/results.py)
    <out>/work/           checkpoints. They let an interrupted run resume, and later runs start from earlier ones.

The command can be stopped at any time. The same command continues: it skips every case that has a row.
"""

from __future__ import annotations

import argparse
import ast
import fnmatch
import importlib
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from bench.markdown import MarksError, write_between
from qatkernels.files import CheckpointError
from qatkernels.options import ConfigError
from qatkernels.trainer import run_folder
from qatkernels.trainer.data import DataError
from qatkernels.trainer.signals import Interrupted

from .results import Case, Results, StudyError

if TYPE_CHECKING:
    from qatkernels.trainer.data import Corpus

#: Exit codes: a run failed; the arguments cannot be used (as argparse); cases are left because --minutes are over.
FAILED, UNUSABLE, LEFT = 1, 2, 3


class UnavailableError(StudyError):
    """A case cannot run on this machine, because a package or a device is missing. It is left out."""


@dataclass
class Session:
    """What the functions of a study are given.

    Attributes:
        size: the value of the chosen entry of :attr:`Study.sizes`.
        results: what is finished. A study that chooses a setting reads the runs that decide here.
        work: folder for checkpoints.
        data: what ``--data`` says, None if it is not given.
    """

    size: Any
    results: Results
    work: Path
    data: str | None = None
    _texts: dict[int, Corpus] = field(default_factory=dict)

    def text(self, context: int) -> Corpus:
        """Return the text of ``--data``, this Python's standard library by default, for windows of so many tokens."""
        if context not in self._texts:
            from qatkernels.trainer import data

            self._texts[context] = data.load(self.data, context)
        return self._texts[context]

    def text_settings(self, context: int) -> dict[str, Any]:
        """Return what identifies the text, as a setting that all cases share."""
        corpus = self.text(context)
        return {"sha256": corpus.sha256, "train_bytes": corpus.train_bytes, "held_out_bytes": corpus.held_out_bytes}


@dataclass(frozen=True)
class Study:
    """A study.

    Attributes:
        name: name of its module and of its file of results.
        sizes: what ``--size`` offers, by name; the first is the default. ``smoke`` takes seconds and tests the study.
            The values are the study's own.
        cases: yields the cases in the order in which they run. It is advanced only after the case before is finished,
            so later cases may depend on :attr:`Session.results`. It raises :class:`MissingError` if they depend on a
            case that was left out.
        report: draws pictures into a folder and returns tables as Markdown. It must accept unfinished results.
        settings: returns the settings that all cases share, as JSON.
        data: what ``--data`` means, for the help.
    """

    name: str
    sizes: Mapping[str, Any]
    cases: Callable[[Session], Iterator[Case]]
    report: Callable[[Results, Path], str]
    settings: Callable[[Session], Mapping[str, Any]] = lambda session: {}
    data: str = "text to train on, a file or folder (default: this Python's standard library)"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the study that the first argument names."""
    given = list(sys.argv[1:] if argv is None else argv)
    known = studies()
    if not given or given[0] in ("-h", "--help"):
        print(__doc__)
        print("\n".join(f"    {name:<16} {summary}" for name, summary in known.items()))
        return 0
    if given[0] not in known:
        print(f"there is no study {given[0]!r}, must be one of {', '.join(known)}", file=sys.stderr)
        return UNUSABLE
    return command(importlib.import_module(f"studies.{given[0]}").STUDY, given[1:])


def studies() -> dict[str, str]:
    """Return every study with the first line of its docstring. Nothing is imported."""
    found = {}
    for path in sorted(Path(__file__).parent.glob("*.py")):
        module = ast.parse(path.read_text(encoding="utf-8"))
        names = [t.id for node in module.body if isinstance(node, ast.Assign)
                 for t in node.targets if isinstance(t, ast.Name)]  # fmt: skip
        if "STUDY" in names:
            found[path.stem] = (ast.get_docstring(module) or "").partition("\n")[0]
    return found


def command(study: Study, argv: Sequence[str]) -> int:
    """Run a study, or report its results, and return the exit code."""
    parser = parser_of(study)
    options = parser.parse_args(argv)
    if options.page is not None and not options.report:
        parser.error("--page is given without --report: give both to write the tables of what is finished into a page")
    size = "smoke" if options.smoke else options.size
    out: Path = options.out or Path("runs") / f"{study.name}-{size}"
    path = out / f"{study.name}.jsonl"
    torch.set_num_threads(options.threads)
    try:
        if options.report:
            results = Results(path)
            if not results.rows:
                raise StudyError(f"{path} has no results; run the study first, or give the --out of one that was run")
            text = study.report(results, out)
            print(text)
            if options.page is not None:
                write_between(options.page, *marks(study.name), page_text(results, options.page, text))
            return 0
        with run_folder.exclusive(out):
            results = Results(path)
            session = Session(study.sizes[size], results, out / "work", options.data)
            results.begin(study.name, size, study.settings(session))
            return _run(study, session, options)
    except (StudyError, ConfigError, CheckpointError, DataError, MarksError) as error:
        print(f"python -m studies {study.name}: {error}", file=sys.stderr)
        return UNUSABLE
    except Interrupted as stop:
        print(f"{stop}; the same command continues", file=sys.stderr)
        return 128 + stop.number


def marks(name: str) -> tuple[str, str]:
    """Return the lines of a page between which the tables of a study are."""
    return f"<!-- tables of the study {name}: begin -->", f"<!-- tables of the study {name}: end -->"


def page_text(results: Results, page: Path, text: str) -> str:
    """Return what a page has of a study: a line that names the file of results, seeds and machines; and its report."""
    link = Path(os.path.relpath(results.path, page.parent)).as_posix()
    seeds = sorted({row["seed"] for row in results.rows})
    devices = sorted({row["machine"]["device"] for row in results.rows})
    return (
        f"[{results.path.name}]({link}): {len(results.rows)} runs, seeds {', '.join(map(str, seeds))}; "
        f"{', '.join(devices)}\n\n{text}"
    )


def parser_of(study: Study) -> argparse.ArgumentParser:
    """Return the command line of a study."""
    sizes = ", ".join(study.sizes)
    parser = argparse.ArgumentParser(
        prog=f"python -m studies {study.name}", description=sys.modules[study.cases.__module__].__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--report", action="store_true", help="do not run; print tables and draw pictures into --out")
    parser.add_argument("--page", type=Path, help="with --report: page of the documents to write the tables into")
    parser.add_argument("--size", choices=study.sizes, default=next(iter(study.sizes)),
                        help=f"{sizes} (default: the first)", metavar="SIZE")  # fmt: skip
    parser.add_argument("--smoke", action="store_true", help="the size smoke: seconds, to see that the study works")
    parser.add_argument("--only", nargs="+", metavar="CASE", help="run only these cases; * stands for any characters")
    parser.add_argument("--seeds", type=int, nargs="+", metavar="N", help="run only these seeds")
    parser.add_argument("--out", type=Path, help=f"folder (default: runs/{study.name}-SIZE)")
    parser.add_argument("--data", metavar="PATH", help=study.data)
    parser.add_argument("--minutes", type=float, default=float("inf"), metavar="M",
                        help="start no run after so many minutes; the exit code is then 3")  # fmt: skip
    parser.add_argument("--threads", type=int, default=1,
                        help="CPU threads (default: 1; sums in floating point depend on it)")  # fmt: skip
    return parser


def _run(study: Study, session: Session, options: argparse.Namespace) -> int:
    """Run the cases that are asked for and not finished."""
    results, began, failed, seen, picked = session.results, time.monotonic(), 0, [], 0
    for case in study.cases(session):
        seen.append(case)
        if not _picked(case, options):
            continue
        picked += 1
        if results.has(case):
            continue
        if time.monotonic() - began > 60 * options.minutes:
            print(f"{options.minutes:g} minutes are over; the same command continues")
            return LEFT
        failed += not _finished(case, results)
    if not picked:
        raise StudyError(
            f"--only and --seeds match no case; names are {_some(c.name for c in seen)}, "
            f"seeds {_some(c.seed for c in seen)}"
        )
    print(f"{results.path}: {len(results.rows)} runs" + (f", {failed} failed; the same command tries them again"
                                                        if failed else ""))  # fmt: skip
    return FAILED if failed else 0


def _finished(case: Case, results: Results) -> bool:
    """Run a case, and return whether it gave figures or cannot run here. One that fails does not stop the others."""
    name, began = f"seed {case.seed}, {case.name}", time.monotonic()
    try:
        results.add(case, case.run())
    except UnavailableError as error:
        print(f"{name}: left out, {error}", flush=True)
        return True
    except (StudyError, Interrupted):
        raise
    except Exception:
        print(f"{name}: failed\n{traceback.format_exc()}", file=sys.stderr, flush=True)
        return False
    print(f"{name}: {time.monotonic() - began:.1f} s", flush=True)
    return True


def _picked(case: Case, options: argparse.Namespace) -> bool:
    if options.seeds is not None and case.seed not in options.seeds:
        return False
    return options.only is None or any(fnmatch.fnmatchcase(case.name, pattern) for pattern in options.only)


def _some(values: Iterator[Any], most: int = 8) -> str:
    found = [str(value) for value in dict.fromkeys(values)]
    return ", ".join(found[:most]) + (f" and {len(found) - most} more" if len(found) > most else "")
