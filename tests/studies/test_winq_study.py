"""The studies of WinQ at their smoke size: what is chosen where, that they resume, and what their reports say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from studies import winq, winq_report, winq_why
from studies.results import Results
from studies.runner import Session, command


@pytest.fixture(scope="module")
def out(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished study."""
    folder = tmp_path_factory.mktemp("study")
    assert command(winq.STUDY, ["--smoke", "--out", str(folder), "--data", str(text)]) == 0
    return folder


@pytest.fixture(scope="module")
def why(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished study of what decides."""
    folder = tmp_path_factory.mktemp("why")
    assert command(winq_why.STUDY, ["--smoke", "--out", str(folder), "--data", str(text)]) == 0
    return folder


def test_every_training_is_there(out: Path) -> None:
    rows = Results(out / "winq.jsonl").rows
    assert len(rows) == 5 + 2 * 2 * 4
    own = {(row["seed"], row["settings"]["act_bits"], row["settings"]["variant"]) for row in rows if row["seed"]}
    assert len(own) == 16


def test_a_seed_of_its_own_process(out: Path, text: Path, tmp_path: Path) -> None:
    """Seed 1 in another folder, with the rows of seed 0, which chose: the same curves."""
    lines = (out / "winq.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "winq.jsonl").write_text("".join(line for line in lines if json.loads(line).get("seed", 0) == 0))
    here = ["--smoke", "--data", str(text), "--out", str(tmp_path), "--seeds", "1"]
    assert command(winq.STUDY, here) == 0
    first, again = Results(out / "winq.jsonl"), Results(tmp_path / "winq.jsonl")
    for row in first.rows:
        if row["seed"] == 1:
            assert again.figures(row["case"], 1)["curve"] == row["figures"]["curve"]
    assert {row["seed"] for row in again.rows} == {0, 1}


def test_another_text_is_refused(out: Path, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "text.txt").write_text("".join(f"{n} and {n + 1} are {2 * n + 1}\n" for n in range(900)))
    here = ["--smoke", "--out", str(out), "--data", str(tmp_path / "text.txt")]
    assert command(winq.STUDY, here) == 2
    assert "results of the study, text with " in capsys.readouterr().err


def test_resets_are_chosen_on_a_seed_of_their_own(out: Path) -> None:
    results = Results(out / "winq.jsonl")
    both = [row for row in results.rows if row["settings"]["variant"] == "both"]
    tried = {row["settings"]["reset_weight"]: row["figures"]["loss"] for row in both if row["seed"] == 0}
    assert set(tried) == {0.2, 0.4}
    best = min(tried, key=lambda weight: tried[weight])
    assert {row["settings"]["reset_weight"] for row in both if row["seed"]} == {best}
    size = winq.SIZES["smoke"]
    assert winq.chosen(Session(size, results, out), size.choices[0], 1) == winq.Resets(0.5, best)


def test_variants_differ_and_share_their_start(out: Path) -> None:
    rows = [row for row in Results(out / "winq.jsonl").rows if row["seed"] == 1]
    for act_bits in (None, 8):
        own = [row["figures"]["curve"] for row in rows if row["settings"]["act_bits"] == act_bits]
        assert len(own) == 4
        assert len({curve[0][1] for curve in own}) == 1, "round-to-nearest is that of the seed"
        assert len({curve[-1][1] for curve in own}) > 1
    size = winq.SIZES["smoke"]
    case = winq.training(Session(size, Results(out / "none"), out), 1, 1, None, "plateau", winq.Resets(0.5, 0.4), 20)
    phase = winq.phase_of(size, size.config.resolved(), case.name, case.settings)
    assert (phase.method.winq.reset_every, phase.method.winq.noise_std) == (10, 0)
    assert phase.rate(15) == 1 > phase.rate(19), "the rate falls over the last fifth"


def test_report(out: Path, tmp_path: Path) -> None:
    cells = winq_report.cells(Results(out / "winq.jsonl"))
    assert list(cells) == [(1, None, 8), (1, 8, 8)]
    for runs in cells.values():
        found = winq_report.compared(runs)
        assert list(runs["both"]) == [1, 2]
        assert found["both"]["difference"] == pytest.approx(found["both"]["loss"] - found["base"]["loss"])
        assert found["base"]["steps_to_base"] == [8, 8]
    text = winq_report.report(Results(out / "winq.jsonl"), tmp_path)
    assert text.count("| 1, A8, 8 |") == 2
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_report_of_what_decides(why: Path, tmp_path: Path) -> None:
    text = winq_why.report(Results(why / "winq_why.jsonl"), tmp_path)
    assert "| schedule: wsd | 50 % | 0.4 |" in text
    assert "cosine-reset50-0.4-step-000006" in text, "spectra"
    assert (tmp_path / "why-8.png").read_bytes().startswith(b"\x89PNG")


def test_steps_to_a_loss() -> None:
    curve = [[0, 3.0], [10, 2.0], [20, 2.2], [30, 1.0]]
    assert winq_report.reached(curve, 2.5) == 5
    assert winq_report.reached(curve, 2.0) == 10
    assert winq_report.reached(curve, 1.6) == 25
    assert winq_report.reached(curve, 3.5) == 0
    assert winq_report.reached(curve, 0.5) is None


def test_the_largest_lead() -> None:
    assert winq_report.lead([[0, 3.0], [10, 1.5], [20, 1.4]], [[0, 3.0], [10, 2.0], [20, 1.0]]) == [0.5, 10]
