"""The study of SQuAT at its smoke size, on a BERT made up here: what is chosen where, that it resumes, its report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from qatkernels import files
from studies import squat, squat_report
from studies.results import Results
from studies.runner import command


@pytest.fixture(scope="module")
def data(reviews: Path) -> Path:
    return reviews


@pytest.fixture(scope="module")
def out(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished study."""
    folder = tmp_path_factory.mktemp("study")
    assert ran(data, folder) == 0
    return folder


def ran(data: Path, out: Path) -> int:
    return command(squat.STUDY, ["--smoke", "--data", str(data), "--out", str(out)])


def without(out: Path, left_out: tuple[str, int], to: Path) -> dict[str, Any]:
    """Write the results of a study but for one run, as if they were made elsewhere; return that run."""
    to.mkdir(exist_ok=True)
    lines = (out / "squat.jsonl").read_text().splitlines(keepends=True)
    one = [line for line in lines if (json.loads(line).get("case"), json.loads(line).get("seed")) == left_out]
    assert len(one) == 1
    (to / "squat.jsonl").write_text("".join(line for line in lines if line not in one))
    return json.loads(one[0])


def the_squat(out: Path) -> tuple[str, int]:
    return next((row["case"], 1) for row in Results(out / "squat.jsonl").rows if row["seed"] and row["settings"]["rho"])


def test_sentences_are_split_by_their_number(data: Path) -> None:
    split = squat.read(data, 12)
    assert [len(part.labels) for part in split] == [84 - 3, 12, 24], "those rated 0 are training sentences here"
    assert all(2 < len(tokens) <= 12 for part in split for tokens in part.tokens)


def test_an_epoch_has_every_sentence_once(data: Path) -> None:
    train = squat.read(data, 12).train
    seen = [row[mask.bool()].tolist() for batch in squat.batches(train, 4, 0)
            for row, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)]  # fmt: skip
    assert sorted(seen) == sorted(train.tokens)
    assert [b["labels"].tolist() for b in squat.batches(train, 4, 0)] != [
        b["labels"].tolist() for b in squat.batches(train, 4, 1)
    ]


def test_only_linear_layers_of_the_encoder_learn_and_are_quantized(data: Path, out: Path) -> None:
    model = squat.build(data, 1, squat.Training(1, 2, 1, 1e-3), out / "work" / "seed1" / "fp.safetensors")
    assert not any(p.requires_grad for p in model.bert.embeddings.parameters())
    scales = [name for name, _ in model.named_parameters() if name.endswith("scale")]
    assert len(scales) == 6 + 1  # the pooler is the seventh
    assert not any("classifier" in name for name in scales)
    tuned, _ = files.load(out / "work" / "seed1" / "fp.safetensors")
    assert torch.equal(model.state_dict()["bert.pooler.dense.weight"], tuned["bert.pooler.dense.weight"])
    published = squat.build(data, 1, squat.Training(1, None, 1, 1e-3), out)
    assert not torch.equal(published.state_dict()["bert.pooler.dense.weight"], tuned["bert.pooler.dense.weight"])


def test_choices_are_made_on_seed_0(out: Path) -> None:
    results = Results(out / "squat.jsonl")
    tried = {row["case"] for row in results.rows if row["seed"] == 0}
    assert tried == {"fp", "w2-1-0.001", "w2-1-0.001-squat-0.05", "w2-1-0.001-squat-0.1"}
    merit = {}
    for rho in (0.05, 0.1):
        found = results.figures(f"w2-1-0.001-squat-{rho}", 0)["validation"]
        merit[rho] = found["accuracy"], -found["loss"]
    best = max(merit, key=lambda rho: merit[rho])
    assert squat_report.choices(results)[2]["settings"]["rho"] == best
    assert {row["settings"]["rho"] for row in results.rows if row["seed"]} == {None, best}


def test_a_missing_run_is_run_again(data: Path, out: Path, tmp_path: Path) -> None:
    (tmp_path / "work").symlink_to(out / "work")
    one = without(out, ("w2-2-0.001", 1), tmp_path)
    before = Results(tmp_path / "squat.jsonl").rows
    assert ran(data, tmp_path) == 0
    *others, again = Results(tmp_path / "squat.jsonl").rows
    assert others == before
    for row in (one, again):
        del row["figures"]["seconds"]
    assert again["figures"] == one["figures"]


def test_report(out: Path, tmp_path: Path) -> None:
    results = Results(out / "squat.jsonl")
    runs, full = squat_report.grouped(results)
    assert {method for _, method in runs} == set(squat_report.METHODS)
    assert len(full) == 1
    row = squat_report.compared(2, "squat", runs[2, "squat"], runs[2, "lsq"])
    one, base = results.figures(*the_squat(out)), results.figures("w2-1-0.001", 1)
    assert row["accuracy"] == [100 * one["test"]["accuracy"], 0.0]
    assert row["gain"][0] == pytest.approx(100 * (one["test"]["accuracy"] - base["test"]["accuracy"]))
    assert row["largest eigenvalue"][0] == one["lambda_max"]
    assert "| 2 | SQuAT |" in squat_report.report(results, tmp_path)
    assert (tmp_path / "squat.png").stat().st_size > 1000


def test_goes_on_with_results_made_elsewhere(data: Path, out: Path, tmp_path: Path) -> None:
    one = without(out, the_squat(out), tmp_path)
    assert ran(data, tmp_path) == 0
    assert not (tmp_path / "work" / "seed0").exists(), "nothing of this seed is left to train"
    assert Results(tmp_path / "squat.jsonl").figures(*the_squat(out))["test"] == one["figures"]["test"]


def test_another_start_is_not_mixed_in(data: Path, out: Path, tmp_path: Path, capsys: Any) -> None:
    """Full precision that gives something else here, as with another version of torch."""
    without(out, the_squat(out), tmp_path)
    path = tmp_path / "squat.jsonl"
    loss = json.dumps(Results(path).figures("fp", 1)["test"]["loss"])
    path.write_text(path.read_text().replace(loss, "0.123", 1))
    for _ in range(2):
        assert ran(data, tmp_path) == 2
        assert "cannot be compared: give another --out" in capsys.readouterr().err


def test_without_data(tmp_path: Path, capsys: Any) -> None:
    assert command(squat.STUDY, ["--data", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert "studies.fetch" in capsys.readouterr().err
