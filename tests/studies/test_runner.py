"""The runner: what runs, what is skipped, what a row holds, and what is refused; and every study at its smoke size."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from bench.journal import Journal, read
from studies.results import Case, Figures, Results
from studies.runner import Session, Study, UnavailableError, command, main, studies

ROOT = Path(__file__).parents[2]


class Toy:
    """A study that counts its runs: a width is chosen on seed 0 by the loss, and reported on seeds 1 and 2."""

    def __init__(self) -> None:
        self.ran: list[tuple[str, int]] = []
        self.scale = 1.0
        self.instead: dict[str, Callable[[], Figures]] = {}

    def study(self) -> Study:
        return Study("toy", {"cpu": (3, 1, 2), "smoke": (1,)}, self.cases, self.report, lambda s: {"scale": self.scale})

    def case(self, width: int, seed: int) -> Case:
        name = f"width-{width}"
        return Case(name, seed, {"width": width}, partial(self.run, name, width, seed))

    def run(self, name: str, width: int, seed: int) -> Figures:
        self.ran.append((name, seed))
        return self.instead.get(name, lambda: {"loss": 1 / width + seed})()

    def cases(self, session: Session) -> Iterator[Case]:
        tried = [self.case(width, 0) for width in session.size]
        yield from tried
        best = min(tried, key=lambda case: session.results.figures(case.name, 0)["loss"])
        for seed in (1, 2):
            yield self.case(best.settings["width"], seed)

    @staticmethod
    def report(results: Results, folder: Path) -> str:
        (folder / "picture.png").write_bytes(b"")
        return f"{len(results.rows)} rows"


@pytest.fixture
def toy() -> Toy:
    return Toy()


def names(out: Path) -> list[tuple[str, int]]:
    return [(row["case"], row["seed"]) for row in Results(out / "toy.jsonl").rows]


EVERYTHING = [("width-3", 0), ("width-1", 0), ("width-2", 0), ("width-3", 1), ("width-3", 2)]


def test_a_row_for_each_run(toy: Toy, tmp_path: Path) -> None:
    assert command(toy.study(), ["--out", str(tmp_path)]) == 0
    assert toy.ran == names(tmp_path) == EVERYTHING, "the widest has the lowest loss, and is reported"
    study, *rows = read(tmp_path / "toy.jsonl")
    assert study == {"kind": "study", "study": "toy", "size": "cpu", "settings": {"scale": 1.0}}
    for row in rows:
        assert row.keys() == {"kind", "case", "seed", "settings", "figures", "date", "machine", "git"}
        assert row["machine"].keys() == {"device", "threads", "load", "versions"}
        assert row["git"].keys() == {"commit", "dirty"}
    assert rows[3]["settings"] == {"width": 3}
    assert rows[3]["figures"] == {"loss": 1 / 3 + 1}


def test_finished_runs_are_skipped(toy: Toy, tmp_path: Path) -> None:
    assert command(toy.study(), ["--out", str(tmp_path)]) == 0
    lines = (tmp_path / "toy.jsonl").read_text().splitlines(keepends=True)
    # A kill in the middle of the last line.
    (tmp_path / "toy.jsonl").write_text("".join(lines[:-1]) + lines[-1][:20])
    toy.ran.clear()
    assert command(toy.study(), ["--out", str(tmp_path)]) == 0
    assert toy.ran == EVERYTHING[-1:]
    assert names(tmp_path) == EVERYTHING


def test_some_cases_and_seeds(toy: Toy, tmp_path: Path) -> None:
    here = ["--out", str(tmp_path)]
    assert command(toy.study(), [*here, "--only", "width-[12]", "--seeds", "0"]) == 2, "the choice needs width-3"
    assert toy.ran == [("width-1", 0), ("width-2", 0)]
    assert command(toy.study(), [*here, "--seeds", "0", "2"]) == 0
    assert names(tmp_path) == [EVERYTHING[i] for i in (1, 2, 0, 4)]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--seeds", "1"], "a choice depends on seed 0, width-3, which is not finished; run that first"),
        (["--report"], "has no results; run the study first"),
    ],
)
def test_too_early(toy: Toy, tmp_path: Path, arguments: list[str], words: str, capsys: Any) -> None:
    assert command(toy.study(), ["--out", str(tmp_path), *arguments]) == 2
    assert words in capsys.readouterr().err
    assert toy.ran == []


def test_no_such_case(toy: Toy, tmp_path: Path, capsys: Any) -> None:
    assert command(toy.study(), ["--out", str(tmp_path)]) == 0
    assert command(toy.study(), ["--out", str(tmp_path), "--only", "depth-*"]) == 2
    assert "names are width-3, width-1, width-2, seeds 0, 1, 2" in capsys.readouterr().err


def test_files_are_joined_by_cat(toy: Toy, tmp_path: Path) -> None:
    first, second, both = (tmp_path / name for name in ("first", "second", "both"))
    assert command(toy.study(), ["--out", str(first), "--seeds", "0"]) == 0
    second.mkdir()
    (second / "toy.jsonl").write_bytes((first / "toy.jsonl").read_bytes())
    for out, seed in ((first, "1"), (second, "2")):
        assert command(toy.study(), ["--out", str(out), "--seeds", seed]) == 0
    both.mkdir()
    (both / "toy.jsonl").write_bytes((first / "toy.jsonl").read_bytes() + (second / "toy.jsonl").read_bytes())
    toy.ran.clear()
    assert command(toy.study(), ["--out", str(both)]) == 0
    assert toy.ran == []
    assert names(both) == EVERYTHING


def test_other_settings_are_refused(toy: Toy, tmp_path: Path, capsys: Any) -> None:
    """Shared settings, the size and the settings of a case must match.

    A setting that only one version has is not a difference.
    """
    assert command(toy.study(), ["--out", str(tmp_path)]) == 0
    assert command(toy.study(), ["--out", str(tmp_path), "--smoke"]) == 2
    assert "with size = cpu, this run has smoke; give another --out" in capsys.readouterr().err
    toy.scale = 2.0
    assert command(toy.study(), ["--out", str(tmp_path)]) == 2
    assert "results of the study with scale = 1.0, this run has 2.0; give another --out" in capsys.readouterr().err
    toy.scale = 1.0
    path = tmp_path / "toy.jsonl"
    path.write_text(path.read_text().replace('"settings": {"width": 2}', '"settings": {"width": 7}'))
    assert command(toy.study(), ["--out", str(tmp_path)]) == 2
    assert "results of seed 0, width-2 with width = 7, this run has 2" in capsys.readouterr().err
    path.write_text(path.read_text().replace('"settings": {"width": 7}', '"settings": {"depth": 7}'))
    assert command(toy.study(), ["--out", str(tmp_path)]) == 0


def test_a_run_that_fails_does_not_stop_the_others(toy: Toy, tmp_path: Path, capsys: Any) -> None:
    def broken() -> Figures:
        raise RuntimeError("out of memory")

    toy.instead["width-2"] = broken
    study = Study("toy", {"cpu": (3, 1, 2)}, lambda s: iter([toy.case(w, 0) for w in (2, 1)]), toy.report)
    assert command(study, ["--out", str(tmp_path)]) == 1
    assert "RuntimeError: out of memory" in capsys.readouterr().err
    assert names(tmp_path) == [("width-1", 0)]
    toy.instead.clear()
    assert command(study, ["--out", str(tmp_path)]) == 0, "it is tried again"
    assert names(tmp_path) == [("width-1", 0), ("width-2", 0)]


def test_a_case_that_cannot_run_here(toy: Toy, tmp_path: Path, capsys: Any) -> None:
    def missing() -> Figures:
        raise UnavailableError("curvlinops is not installed")

    toy.instead["width-1"] = missing
    study = Study("toy", {"cpu": (3, 1, 2)}, lambda s: iter([toy.case(w, 0) for w in (1, 2)]), toy.report)
    assert command(study, ["--out", str(tmp_path)]) == 0
    assert "width-1: left out, curvlinops is not installed" in capsys.readouterr().out
    assert names(tmp_path) == [("width-2", 0)]


def test_minutes(toy: Toy, tmp_path: Path) -> None:
    assert command(toy.study(), ["--out", str(tmp_path), "--minutes", "0"]) == 3
    assert toy.ran == []


def test_figures_that_are_not_finite_are_null(toy: Toy, tmp_path: Path) -> None:
    toy.instead["width-1"] = lambda: {"loss": 2.0, "curve": [(1, float("nan")), (2, float("inf"))]}
    assert command(toy.study(), ["--out", str(tmp_path)]) == 0
    assert Results(tmp_path / "toy.jsonl").figures("width-1", 0) == {"loss": 2.0, "curve": [[1, None], [2, None]]}


def test_report(toy: Toy, tmp_path: Path, capsys: Any) -> None:
    assert command(toy.study(), ["--out", str(tmp_path)]) == 0
    toy.ran.clear()
    assert command(toy.study(), ["--out", str(tmp_path), "--report"]) == 0
    assert capsys.readouterr().out.endswith("5 rows\n")
    assert (tmp_path / "picture.png").exists()
    assert toy.ran == []


def test_a_journal_goes_on_after_half_a_line(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    Journal(path).write("row", {"a": 1})
    with path.open("a") as file:
        file.write('{"kind": "row", "a"')
    Journal(path).write("row", {"a": 2})
    assert [record["a"] for record in read(path)] == [1, 2]


def test_the_command_lists_the_studies(capsys: Any) -> None:
    assert main([]) == 0
    printed = capsys.readouterr().out
    for name, summary in studies().items():
        assert f"    {name:<16} {summary}" in printed
        assert summary
    assert main(["wing"]) == 2
    assert f"there is no study 'wing', must be one of {', '.join(studies())}" in capsys.readouterr().err


@pytest.mark.parametrize("name", studies())
def test_every_study_at_its_smoke_size(name: str, tmp_path: Path, request: Any, capsys: Any) -> None:
    """It runs, a second call runs nothing, and its report can be made."""
    data = request.getfixturevalue("reviews" if name == "squat" else "text")
    here = [name, "--out", str(tmp_path), "--data", str(data)]
    assert main([*here, "--smoke"]) == 0
    path = tmp_path / f"{name}.jsonl"
    before = path.read_bytes()
    assert json.loads(before.splitlines()[0])["size"] == "smoke"
    assert main([*here, "--smoke"]) == 0
    assert path.read_bytes() == before
    capsys.readouterr()
    assert main([*here, "--report"]) == 0
    assert "|" in capsys.readouterr().out or name == "spectra"


def test_the_module_is_a_command() -> None:
    command = [sys.executable, "-m", "studies", "plan_recovery", "--help"]
    printed = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True).stdout
    assert "Does the fitter of the loss law find planted coefficients" in printed
    assert "--report" in printed
