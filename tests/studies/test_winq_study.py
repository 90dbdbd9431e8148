"""The study of WinQ, tiny: what is chosen where, that it goes on exactly, and what its report says."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from bench.machine import machines
from studies import winq, winq_report, winq_why


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished study that was stopped once."""
    folder = tmp_path_factory.mktemp("study")
    text = folder / "text"
    text.mkdir()
    for i in range(20):
        (text / f"{i}.txt").write_text("".join(f"{n} and {n + 1} are {2 * n + 1}\n" for n in range(i, i + 60)))
    command = ["--preset", "test", "--out", str(folder / "out"), "--data", str(text)]
    assert winq.main([*command, "--minutes", "0"]) == 3
    assert winq.main(command) == 0
    return folder / "out"


def lines(out: Path) -> list[dict[str, str]]:
    with open(out / "runs.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_every_training_is_there(out: Path) -> None:
    found = lines(out)
    assert len(found) == 5 + 2 * 2 * 4
    reported = {(x["seed"], x["act_bits"], x["variant"]) for x in found if x["seed"] != "0"}
    assert len(reported) == 16
    assert json.loads((out / "study.json").read_text())["finished"] is True


def test_goes_on_with_tables_made_elsewhere(out: Path, tmp_path: Path) -> None:
    command = ["--preset", "test", "--data", str(out.parent / "text"), "--minutes", "0"]
    assert winq.main([*command, "--out", str(tmp_path / "all"), "--earlier", str(out)]) == 0, "nothing is left"
    for name in ("runs.csv", "curves.json"):
        assert (tmp_path / "all" / name).read_bytes() == (out / name).read_bytes()
    studies = [json.loads((folder / "study.json").read_text()) for folder in (out, tmp_path / "all")]
    assert studies[0]["machines"] == studies[1]["machines"]
    missing = sorted((tmp_path / "all").glob("seed1/*.json"))[0]
    expected = missing.read_text()
    missing.unlink()
    others = [*command[:-2], "--out", str(tmp_path / "all"), "--seeds", "0", "2"]
    assert winq.main(others) == 3, "seed 1 is left to another process"
    assert not missing.exists()
    assert winq.main([*command[:-2], "--out", str(tmp_path / "all")]) == 0
    assert json.loads(missing.read_text())["curve"] == json.loads(expected)["curve"]


def test_studies_that_cannot_be_joined(out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text.txt").write_text("".join(f"{n} and {n + 1} are {2 * n + 1}\n" for n in range(900)))
    command = ["--preset", "test", "--out", str(tmp_path / "out"), "--data", str(tmp_path / "text.txt")]
    for more, words in (
        (["--earlier", str(out)], "is of a text with SHA-256"),
        (["--seeds", "1"], "the resets are not chosen yet: seed 0 does that"),
    ):
        with pytest.raises(SystemExit):
            winq.main([*command, *more])
        assert words in capsys.readouterr().err


def test_machines_of_earlier_studies_are_named() -> None:
    elsewhere = {"device": "another", "threads": 3, "versions": {"torch": "1"}}
    here, *others = machines("this", {"machines": [elsewhere]}, {"machines": [elsewhere]})
    assert here["device"] == "this"
    assert others == [elsewhere]


def test_resets_are_chosen_on_a_seed_of_their_own(out: Path) -> None:
    tried = {x["reset_weight"]: float(x["loss"]) for x in lines(out) if x["seed"] == "0" and x["variant"] == "both"}
    assert set(tried) == {"0.2", "0.4"}
    best = min(tried, key=lambda weight: tried[weight])
    assert {x["reset_weight"] for x in lines(out) if x["seed"] != "0" and x["variant"] == "both"} == {best}
    preset = winq.PRESETS["test"]
    assert winq.chosen(preset, preset.choices[0], 1, out) == winq.Resets(0.5, float(best))


def test_variants_differ_and_share_their_start(out: Path) -> None:
    curves = json.loads((out / "curves.json").read_text())["1"]
    for act in ("", "a8"):
        own = [curve for name, curve in curves.items() if name.startswith(f"w1{act}-")]
        assert len(own) == 4
        assert len({curve[0][1] for curve in own}) == 1, "round-to-nearest is that of the seed"
        assert len({curve[-1][1] for curve in own}) > 1
    phase = winq.training(winq.PRESETS["test"], 1, 1, None, "plateau", winq.Resets(0.5, 0.4), 20, out).phase
    assert (phase.method.winq.reset_every, phase.method.winq.noise_std) == (10, 0)
    assert phase.rate(15) == 1 > phase.rate(19), "the rate falls over the last fifth"


def test_report(out: Path, why: Path, tmp_path: Path, capsys: Any) -> None:
    assert winq_report.main(["--study", str(out), "--out", str(tmp_path), "--why", str(why)]) == 0
    cells = json.loads((tmp_path / "results.json").read_text())["cells"]
    assert [(cell["bits"], cell["act_bits"], cell["both"]["seeds"]) for cell in cells] == [
        (1, None, [1, 2]),
        (1, 8, [1, 2]),
    ]
    for cell in cells:
        assert cell["both"]["difference"] == pytest.approx(cell["both"]["loss"] - cell["base"]["loss"])
        assert cell["base"]["steps_to_base"] == [8, 8]
    assert json.loads((tmp_path / "why.json").read_text())["trials"]
    assert json.loads((tmp_path / "spectra.json").read_text())["checkpoints"]
    for name in ("curves", "why", "spectra"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert capsys.readouterr().out.count("\n") >= 4


def test_steps_to_a_loss() -> None:
    curve = [[0, 3.0], [10, 2.0], [20, 2.2], [30, 1.0]]
    assert winq_report.reached(curve, 2.5) == 5
    assert winq_report.reached(curve, 2.0) == 10
    assert winq_report.reached(curve, 1.6) == 25
    assert winq_report.reached(curve, 3.5) == 0
    assert winq_report.reached(curve, 0.5) is None


def test_the_largest_lead() -> None:
    assert winq_report.lead([[0, 3.0], [10, 1.5], [20, 1.4]], [[0, 3.0], [10, 2.0], [20, 1.0]]) == [0.5, 10]


@pytest.fixture(scope="module")
def why(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished study of what decides, of three questions."""
    folder = tmp_path_factory.mktemp("why")
    (folder / "text.txt").write_text("".join(f"{n} and {n + 1} are {2 * n + 1}\n" for n in range(900)))
    command = ["--preset", "test", "--out", str(folder / "out"), "--data", str(folder / "text.txt")]
    assert winq_why.main([*command, "--minutes", "0"]) == 3
    assert winq_why.main(command) == 0
    return folder / "out"


def test_a_reset_changes_no_loss_where_it_is_and_what_comes_after(why: Path) -> None:
    trials = {x["name"]: x for x in json.loads((why / "why.json").read_text())["trials"]}
    plain, reset = (dict(trials[name]["curves"]["held_out"]) for name in ("cosine-plain", "cosine-reset50-0.4"))
    assert all(plain[step] == reset[step] for step in (0, 2, 4))
    assert plain[8] != reset[8]
    assert trials["wsd-plain"]["curves"]["held_out"] != trials["cosine-plain"]["curves"]["held_out"]
    away = {name: dict(x["curves"]["distance"]) for name, x in trials.items()}
    assert away["cosine-reset50-0.4"][4] == pytest.approx(0.6 * away["cosine-plain"][4], rel=1e-4)


def test_a_reset_changes_no_eigenvalue(why: Path) -> None:
    before, after, *_ = json.loads((why / "spectra" / "report.json").read_text())["checkpoints"]
    for name in ("lambda_min", "lambda_max"):
        assert before["spectrum"][name] == pytest.approx(after["spectrum"][name], rel=1e-4)
