"""The planner's sweep: shared prefixes, resuming, and the report on a planted law."""

from __future__ import annotations

import json
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bench.machine import cpu_model
from qatkernels.plan import read_runs
from qatkernels.trainer.phases import quantized_parameters
from studies import plan, plan_report
from studies.plan_recovery import PLANTED, table
from studies.results import Results
from studies.runner import command
from tests.passes import signals_at

SMOKE = plan.SIZES["smoke"]


def swept(out: Path, text: Path) -> int:
    return command(plan.STUDY, ["--smoke", "--data", str(text), "--out", str(out)])


def rows(out: Path) -> list[dict[str, Any]]:
    """The rows without what differs between two calls."""
    found = Results(out / "plan.jsonl").rows
    for row in found:
        del row["date"], row["machine"], row["git"], row["figures"]["seconds"]
    return found


def check(found: list[dict[str, Any]]) -> None:
    assert len(found) == (1 + 2 * 2 * 2) + 2 * (1 + 2 * 2)
    for row in found:
        own, figures = row["settings"], row["figures"]
        budget = figures["tokens_fp"] + figures["tokens_qat"]
        assert budget == own["steps"] * 64
        assert own["steps"] in (16, 24)
        assert figures["tokens_qat"] == own["fraction"] * budget
        assert (own["bits"] == 32) == (figures["tokens_qat"] == 0) == (figures["round_to_nearest"] is None)
        assert figures["params"] == 4096
        assert 0 < figures["loss"] < 9


def test_stopped_anywhere_and_run_again(tmp_path: Path, text: Path) -> None:
    """Signals at several steps, one of them the last of a training, change no row and repeat no step."""
    assert swept(tmp_path / "whole", text) == 0
    whole = Results(tmp_path / "whole" / "plan.jsonl")
    check(whole.rows)
    assert whole.rows[0]["machine"]["device"] == cpu_model()
    assert whole.study["settings"].keys() == {"text", "smallest_budget", "config"}
    stops = (5, 13, 60, 101)
    with signals_at(*stops) as passes:
        for _ in stops:
            assert swept(tmp_path / "out", text) == 128 + signal.SIGTERM
        assert swept(tmp_path / "out", text) == 0
    assert rows(tmp_path / "out") == rows(tmp_path / "whole")
    steps = {}
    for unit, seed, model in plan.order(SMOKE):
        config = plan.configured(SMOKE, model, seed, tmp_path)
        steps |= {(seed, p.name): p.steps for t in plan.trainings(SMOKE, config, unit) for p in t.phases}
    assert passes.count == sum(steps.values())


@pytest.mark.parametrize("name", plan.SIZES, ids="size-{}".format)
def test_sizes_are_consistent(name: str, tmp_path: Path) -> None:
    """Every training ends with its budget, and starts with phases that go on from each other."""
    size = replace(plan.SIZES[name], config=plan.SIZES[name].config.changed(device="cpu"))
    for unit, seed, model in plan.order(size):
        config = plan.configured(size, model, seed, tmp_path)
        for training in plan.trainings(size, config, unit):
            assert sum(p.steps for p in training.phases) == unit.steps
            for before, after in zip(training.phases, training.phases[1:], strict=False):
                assert after.start == before.name
                assert after.first == before.first + before.steps
            last = training.phases[-1]
            assert last.bits is None or last.steps == round(training.fraction * unit.steps)
            if training.schedule == "fused":
                assert training.phases[-2].keeps_state


def test_sizes_cover_what_the_law_needs() -> None:
    for name in ("cpu", "gpu"):
        size = plan.SIZES[name]
        assert len(size.models) >= 3
        assert len({unit.steps for unit in size.units}) >= 3
        assert len(size.fractions) >= 5
        assert {1, 2, 4} <= set(size.bits)
        assert len({seed for unit in size.units if len(unit.schedules) == 2 for seed in unit.seeds}) >= 3
    small, *_, large = plan.SIZES["gpu"].models
    config = plan.SIZES["gpu"].config.changed(device="cpu")
    counts = [quantized_parameters(config.changed(width=w, depth=d, heads=h)) for w, d, h in (small, large)]
    assert counts[0] < 1e6 < 2e7 < counts[1]


def test_report(tmp_path: Path) -> None:
    """On runs from a planted law in which fused is 1% better."""
    columns = table("small", 0.002, 0)
    path = tmp_path / "plan.jsonl"
    lines: list[dict[str, Any]] = [{"kind": "study", "study": "plan", "size": "smoke", "settings": {}}]
    for i, (params, qat, fp, bits, loss) in enumerate(zip(*columns.values(), strict=True)):
        share = round(qat / (qat + fp), 6)
        for seed in (0, 1, 2):
            for schedule, factor in (("classic", 1), ("fused", 0.99)):
                if qat or schedule == "classic":
                    own = {"schedule": schedule, "fraction": share, "bits": bits, "model": "m", "shape": "sqrt"}
                    figures = {"params": params, "tokens_qat": qat, "tokens_fp": fp, "loss": factor * loss,
                               "round_to_nearest": None, "seconds": 1.0}  # fmt: skip
                    lines.append({"kind": "run", "case": f"{i}-{schedule}", "seed": seed, "settings": own,
                                  "figures": figures})  # fmt: skip
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    text = plan_report.report(Results(path), tmp_path)
    found = json.loads((tmp_path / "fit.json").read_text())
    assert found["fits"]["all budgets"]["runs"] == 900
    assert found["fits"]["without the smallest budget"]["ranges"]["tokens"] == [1e10, 1.4e12]
    assert found["fits"]["all budgets"]["coefficients"]["gamma"] == pytest.approx(PLANTED.gamma, rel=0.2)
    regret = found["regret_percent"]
    assert regret["fitted law"] < 0.5 < regret["always 50%"]
    assert len(found["fused_against_classic"]) == 48
    for row in found["fused_against_classic"]:
        assert row["best_percent"] == pytest.approx(-1)
        assert (row["seeds"], row["seeds_fused_better"]) == (3, 3)
    for name in ("schedules", "optima", "losses"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert text.count("| 3 of 3 |") == 48
    assert len(read_runs(tmp_path / "runs.csv")["loss"]) == len(lines) - 1
