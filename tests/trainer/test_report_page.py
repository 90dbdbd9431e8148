"""The page of a training run: that it shows what the report says, of finished and of interrupted runs."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from qatkernels import QuantConfig, quantize_model
from qatkernels.methods.stats import GridStats
from qatkernels.trainer import DivergedError, Interrupted, train_page
from qatkernels.units import human
from tests.pages import Page, read_page
from tests.passes import signals_at

from .conftest import run

HOSTILE = "<script>alert(1)</script>\"'&"


def page_of(out: str) -> Page:
    return read_page((Path(out) / "report.html").read_bytes())


def test_the_page_shows_the_report(tiny: dict[str, Any]) -> None:
    report = run(tiny, bits=(4, 1.58), stats_every=3)
    page = page_of(tiny["out"])
    assert page.drawn == 6, "four curves, flips, distances"
    assert page.histograms == 2 * 4
    wanted = {"24", "12", report["text"]["sha256"], report["machine"]["torch"]}
    for row in (report["full_precision"], *report["rows"]):
        wanted |= {f"{row['bits']:g}", f"{row['model_bytes']:,}".split(",")[0], human(row["tokens_per_second"])}
        wanted |= {
            f"{row[name]:.3f}" for name in ("full_precision", "round_to_nearest", "qat") if row[name] is not None
        }
    assert wanted <= page.words, wanted - page.words
    for name in ("width", "qat_steps", "eval_windows"):  # among those that differ from the defaults, and among all
        assert page.text.count(f" {name} {tiny[name]} ") == 2, name
    assert page.text.count(" temperature 1 ") == 1


def test_histograms_are_those_of_the_codes(tiny: dict[str, Any]) -> None:
    report = run(tiny, bits=(4,), embeddings=8)
    for step in ("0", "12"):
        counts = report["codes"]["w4"][step]
        assert len(counts) == 5
        for layer, found in counts.items():
            assert len(found) == (256 if "embed" in layer else 16)
            assert sum(found) > 0
    assert report["codes"]["w4"]["0"] != report["codes"]["w4"]["12"]
    assert json.loads((Path(tiny["out"]) / "report.json").read_text()) == json.loads(json.dumps(report))


@pytest.mark.parametrize("bits", [1, 1.58, 3, 8])
def test_histograms_of_a_model(bits: float) -> None:
    model = quantize_model(torch.nn.Sequential(torch.nn.Linear(40, 6)), QuantConfig(bits, group_size=8))
    stats = GridStats(model)
    (codes,), (counts,) = stats.codes().values(), stats.histograms().values()
    grid = model[0].grid
    assert counts == [int((codes == code).sum()) for code in range(grid.code_min, grid.code_max + 1)]


@pytest.mark.parametrize(
    ("method", "kinds"),
    [("winq", {"flips", "distance", "resets"}), ("squat", {"flips", "distance", "sharpness", "perturbation_norm"})],
)
def test_what_a_method_measures_is_drawn(tiny: dict[str, Any], method: str, kinds: set[str]) -> None:
    report = run(tiny, method=method, stats_every=3, **({"reset_every": 4} if method == "winq" else {}))
    curves = report["curves"]["w2"]
    assert curves.keys() == {"train", "held_out", "lr", "scales_at_floor"} | kinds
    assert all([step for step, _ in curves[kind]] == [3, 6, 9, 12] for kind in kinds)
    assert page_of(tiny["out"]).drawn == 4 + len(kinds)


def test_an_interrupted_run_has_a_page(tiny: dict[str, Any]) -> None:
    with signals_at(5), pytest.raises(Interrupted):  # before any phase is finished
        run(tiny, bits=(2, 1))
    page = page_of(tiny["out"])
    assert "No phase is finished yet." in page.text
    assert "stopped by SIGTERM. Not finished: fp, w2, w1." in page.text
    assert page.drawn == 3
    with signals_at(24 - 5 + 12 + 4), pytest.raises(Interrupted):  # within the last one
        run(tiny, bits=(2, 1))
    page, report = page_of(tiny["out"]), json.loads((Path(tiny["out"]) / "report.json").read_text())
    assert "Not finished: w1." in page.text
    assert [row["phase"] for row in report["rows"]] == ["w2"]
    assert report["curves"]["w1"]["train"][-1][0] == 4
    assert page.histograms == 8
    finished = run(tiny, bits=(2, 1))
    assert finished["stopped"] is None
    assert "Not finished" not in page_of(tiny["out"]).text


def test_an_interrupted_run_of_parts(tiny: dict[str, Any]) -> None:
    """With bit widths that leave full precision at different steps, all in one schedule."""
    settings = {**tiny, "tokens": 60 * 4 * 32, "schedule": "classic", "qat_fraction": 0.3, "bits": (2,)}
    with signals_at(45), pytest.raises(Interrupted):
        run(settings)
    report = json.loads((Path(tiny["out"]) / "report.json").read_text())
    assert report["rows"] == []
    assert report["full_precision"]["phase"] == "cooled42"
    page_of(tiny["out"])


def test_a_diverged_run_has_a_page_that_says_so(tiny: dict[str, Any]) -> None:
    with pytest.raises(DivergedError) as error:
        run(tiny, lr=1e25, clip=1e30)
    assert str(error.value) in page_of(tiny["out"]).text


def test_without_a_log_the_page_has_the_ends_of_the_curves(tiny: dict[str, Any]) -> None:
    run(tiny)
    (Path(tiny["out"]) / "log.jsonl").unlink()
    report = run(tiny)
    assert report["codes"] == {}
    page = page_of(tiny["out"])
    assert (page.drawn, page.histograms) == (2, 0)
    assert page.text.count("Nothing was measured.") == 2


def test_hostile_names_and_settings_are_shown_as_they_are(tiny: dict[str, Any]) -> None:
    report = copy.deepcopy(json.loads(json.dumps(run(tiny))))
    report["config"]["data"] = report["config"]["out"] = report["text"]["source"] = HOSTILE
    report["machine"]["platform"] = report["machine"]["cuda"] = HOSTILE
    report["stopped"] = HOSTILE
    report["notes"] = [{"phase": HOSTILE, "step": 3, "note": HOSTILE}]
    for steps in report["codes"]["w2"].values():
        steps[HOSTILE] = steps.pop(next(iter(steps)))
    page = read_page(train_page.page(report))
    assert page.text.count(HOSTILE) == 14


def test_scales_at_their_floor_are_drawn(tiny: dict[str, Any]) -> None:
    report = run(tiny, scale_lr=1.0)
    assert report["notes"]
    page = page_of(tiny["out"])
    assert "Scales at their floor" in page.text
    assert report["notes"][0]["note"] in page.text


def test_a_report_of_an_earlier_version_has_a_page() -> None:
    """The report that is published with the README, which has no codes and no rates."""
    report = json.loads((Path(__file__).parents[2] / "docs/results/demo-amd-epyc/report.json").read_text())
    page = read_page(train_page.page(report))
    assert page.drawn == 3
    assert {f"{row['qat']:.3f}" for row in report["rows"]} <= page.words
