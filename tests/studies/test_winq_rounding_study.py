"""The study of WinQ and the rounding of weights, at its smoke size."""

from __future__ import annotations

from pathlib import Path

import pytest

from studies import winq_rounding
from studies.results import Results
from studies.runner import command, marks


@pytest.fixture(scope="module")
def out(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished study."""
    folder = tmp_path_factory.mktemp("study")
    assert command(winq_rounding.STUDY, ["--smoke", "--out", str(folder), "--data", str(text)]) == 0
    return folder


def test_every_training_is_there(out: Path) -> None:
    results = Results(out / "winq_rounding.jsonl")
    assert len(results.rows) == 3 * 2 + 2
    for row in results.rows:
        observed = row["figures"]["observed"]
        assert {len(observed[key]) for key in ("moved", "travelled", "saturated", "flips")} == {8}
        assert all(0 <= share <= 1 for key in ("moved", "saturated", "flips") for share in observed[key])
    assert sum(results.figures("w1-8-0.001-float32-base", 1)["observed"]["travelled"]) > 0
    losses = {row["case"]: row["figures"]["loss"] for row in results.rows}
    assert len(set(losses.values())) == len(losses), "each kind of weights and each variant is another training"
    assert not list((out / "work" / "seed1").glob("w*")), "models of finished trainings are left"


def test_a_training_is_the_same_in_another_folder(out: Path, text: Path, tmp_path: Path) -> None:
    name = "w1-8-0.001-stochastic-both-0.4"
    here = ["--smoke", "--data", str(text), "--out", str(tmp_path), "--only", name]
    assert command(winq_rounding.STUDY, here) == 0
    first, again = (Results(folder / "winq_rounding.jsonl").figures(name, 1) for folder in (out, tmp_path))
    assert {**first, "seconds": 0} == {**again, "seconds": 0}


def test_the_report_goes_into_a_page(out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "page.md"
    begin, end = marks("winq_rounding")
    page.write_text(f"before\n{begin}\nold\n{end}\nafter\n")
    arguments = ["--smoke", "--out", str(out), "--report", "--page", str(page)]
    assert command(winq_rounding.STUDY, arguments) == 0
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "old" not in text
    assert capsys.readouterr().out.strip() in text
    assert text.count("| stochastic |") == 1
    page.write_text("no marks")
    assert command(winq_rounding.STUDY, arguments) == 2
    assert "must have the line" in capsys.readouterr().err
    assert page.read_text() == "no marks"
