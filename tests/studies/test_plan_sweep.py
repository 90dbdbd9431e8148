"""The planner's sweep: shared prefixes, resumption, its table, and the report made of one."""

from __future__ import annotations

import csv
import json
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from qatkernels.trainer.phases import quantized_parameters
from studies import plan, plan_report
from studies.plan_recovery import PLANTED, table
from tests.passes import signals_at

TEST = plan.PRESETS["test"]


@pytest.fixture(autouse=True)
def short(tmp_path: Path) -> Iterator[None]:
    """A text that is read faster than the standard library; the sweep also sets the number of threads."""
    (tmp_path / "text.txt").write_text("".join(f"{i} {i * i}\n" for i in range(2000)))
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def swept(tmp_path: Path, *arguments: str, out: str = "out") -> int:
    text, folder = str(tmp_path / "text.txt"), str(tmp_path / out)
    return plan.main(["--preset", "test", "--data", text, "--out", folder, *arguments])


def rows(tmp_path: Path, out: str = "out") -> list[dict[str, str]]:
    with open(tmp_path / out / "runs.csv", newline="") as file:
        return [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(file)]


def check_table(out: Path, found: list[dict[str, str]]) -> None:
    assert len(found) == (1 + 2 * 2 * 2) + 2 * (1 + 2 * 2)
    for row in found:
        budget = int(row["tokens_fp"]) + int(row["tokens_qat"])
        assert budget in (16 * 64, 24 * 64)
        assert int(row["tokens_qat"]) == float(row["fraction"]) * budget
        assert (row["bits"] == "32") == (row["tokens_qat"] == "0")
        assert int(row["params"]) == 4096
        assert 0 < float(row["loss"]) < 9
    told = json.loads((out / "sweep.json").read_text())
    assert told["unfinished"] == 0
    assert {"cpu", "threads", "versions", "git", "text", "config", "units"} <= told.keys()


def test_stopped_anywhere_and_run_again(tmp_path: Path) -> None:
    """Signals at several steps, one of them the last of a training, change no row and repeat no step."""
    assert swept(tmp_path, out="whole") == 0
    check_table(tmp_path / "whole", rows(tmp_path, "whole"))
    stops = (5, 13, 60, 101)
    with signals_at(*stops) as passes:
        for _ in stops:
            assert swept(tmp_path) == 128 + signal.SIGTERM
        assert swept(tmp_path) == 0
    assert rows(tmp_path) == rows(tmp_path, "whole")
    steps = {}
    for unit, seed, size in plan.order(TEST):
        config = plan.configured(TEST, size, seed, tmp_path)
        steps |= {(seed, p.name): p.steps for t in plan.trainings(TEST, config, unit) for p in t.phases}
    assert passes.count == sum(steps.values())


def test_a_deadline_leaves_the_rest(tmp_path: Path) -> None:
    assert swept(tmp_path, "--minutes", "0") == 3
    assert rows(tmp_path) == []


@pytest.mark.parametrize("name", plan.PRESETS, ids="preset-{}".format)
def test_presets_are_consistent(name: str, tmp_path: Path) -> None:
    """Every training ends with its budget, and starts with phases that go on from each other."""
    preset = replace(plan.PRESETS[name], config=plan.PRESETS[name].config.changed(device="cpu"))
    for unit, seed, size in plan.order(preset):
        config = plan.configured(preset, size, seed, tmp_path)
        for training in plan.trainings(preset, config, unit):
            assert sum(p.steps for p in training.phases) == unit.steps
            for before, after in zip(training.phases, training.phases[1:], strict=False):
                assert after.start == before.name
                assert after.first == before.first + before.steps
            last = training.phases[-1]
            assert last.bits is None or last.steps == round(training.fraction * unit.steps)
            if training.schedule == "fused":
                assert training.phases[-2].keeps_state


def test_presets_cover_what_the_law_needs() -> None:
    for name in ("cpu", "gpu"):
        preset = plan.PRESETS[name]
        assert len(preset.sizes) >= 3
        assert len({unit.steps for unit in preset.units}) >= 3
        assert len(preset.fractions) >= 5
        assert {1, 2, 4} <= set(preset.bits)
        assert len({seed for unit in preset.units if len(unit.schedules) == 2 for seed in unit.seeds}) >= 3
    small, *_, large = plan.PRESETS["gpu"].sizes
    config = plan.PRESETS["gpu"].config.changed(device="cpu")
    counts = [quantized_parameters(config.changed(width=w, depth=d, heads=h)) for w, d, h in (small, large)]
    assert counts[0] < 1e6 < 2e7 < counts[1]


def test_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """On a table from a planted law in which fused is 1% better."""
    columns = table("small", 0.002, 0)
    (tmp_path / "sweep").mkdir()
    with open(tmp_path / "sweep" / "runs.csv", "w", newline="") as file:
        out = csv.writer(file)
        out.writerow([*columns, "schedule", "seed", "fraction"])
        for params, qat, fp, bits, loss in zip(*columns.values(), strict=True):
            share = round(qat / (qat + fp), 6)
            for seed in (0, 1, 2):
                out.writerow([params, qat, fp, bits, loss, "classic", seed, share])
                if qat:
                    out.writerow([params, qat, fp, bits, 0.99 * loss, "fused", seed, share])
    arguments = ["--sweep", str(tmp_path / "sweep"), "--out", str(tmp_path / "results")]
    assert plan_report.main([*arguments, "--starts", "2", "--resamples", "4"]) == 0
    found = json.loads((tmp_path / "results" / "fit.json").read_text())
    assert found["fits"]["all budgets"]["runs"] == 900
    assert found["fits"]["without the smallest budget"]["ranges"]["tokens"] == [1e10, 1.4e12]
    assert found["fits"]["all budgets"]["coefficients"]["gamma"] == pytest.approx(PLANTED.gamma, rel=0.2)
    regret = found["regret_percent"]
    assert regret["fitted law"] < 0.5 < regret["always 50%"]
    assert len(found["fused_against_classic"]) == 48
    for row in found["fused_against_classic"]:
        assert row["best_percent"] == pytest.approx(-1)
        assert (row["seeds"], row["seeds_fused_better"]) == (3, 3)
    for name in ("schedules", "optima", "law", "losses"):
        assert (tmp_path / "results" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert capsys.readouterr().out.count("| 3 of 3 |") == 48
