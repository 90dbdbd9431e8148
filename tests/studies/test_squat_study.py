"""The study of SQuAT, tiny and on a BERT made up here: what is chosen where, that it goes on, what its report says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers")

from qatkernels import files  # noqa: E402
from studies import squat, squat_report  # noqa: E402

WORDS = ["a", "good", "bad", "film", "plot", "very", "dull", "fine", "scene", "end"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as studies.fetch leaves it."""
    folder = tmp_path_factory.mktemp("data")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    (folder / "vocab.txt").write_text("\n".join(words))
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(words), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=16,
    )  # fmt: skip
    transformers.BertModel(config).save_pretrained(folder / "model")
    vocabulary = {word: i for i, word in enumerate(words)}
    transformers.BertTokenizer(vocab=vocabulary).save_pretrained(folder / "model")
    draw = torch.Generator().manual_seed(1)
    lines = []
    for number in range(120):
        count = int(torch.randint(3, 8, (), generator=draw))
        picked = [WORDS[i] for i in torch.randint(len(WORDS), (count,), generator=draw)]
        rating = 0.0 if number % 40 == 5 else picked.count("good") - picked.count("bad") + 0.5
        lines.append(f"{number}\t{rating}\t{' '.join(picked)}")
    (folder / "reviews.tsv").write_text("\n".join(lines))
    return folder


@pytest.fixture(scope="module")
def out(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished study."""
    folder = tmp_path_factory.mktemp("study")
    assert squat.main(["--preset", "test", "--data", str(data), "--out", str(folder)]) == 0
    return folder


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
    model = squat.build(data, 1, squat.Training(1, 2, 1, 1e-3), out / "seed1" / "fp.safetensors")
    assert not any(p.requires_grad for p in model.bert.embeddings.parameters())
    scales = [name for name, _ in model.named_parameters() if name.endswith("scale")]
    assert len(scales) == 6 + 1  # the pooler is the seventh
    assert not any("classifier" in name for name in scales)
    tuned, _ = files.load(out / "seed1" / "fp.safetensors")
    assert torch.equal(model.state_dict()["bert.pooler.dense.weight"], tuned["bert.pooler.dense.weight"])
    published = squat.build(data, 1, squat.Training(1, None, 1, 1e-3), out)
    assert not torch.equal(published.state_dict()["bert.pooler.dense.weight"], tuned["bert.pooler.dense.weight"])


def test_choices_are_made_on_seed_0(out: Path) -> None:
    study = json.loads((out / "study.json").read_text())
    tried = {path.stem for path in (out / "seed0").glob("w*.json")}
    assert tried == {"w2-1-0.001", "w2-1-0.001-squat-0.05", "w2-1-0.001-squat-0.1"}
    found = {rho: json.loads((out / "seed0" / f"w2-1-0.001-squat-{rho}.json").read_text()) for rho in (0.05, 0.1)}
    merit = {rho: (x["validation"]["accuracy"], -x["validation"]["loss"]) for rho, x in found.items()}
    assert study["chosen"] == {"2": {"lr": 1e-3, "rho": max(merit, key=lambda rho: merit[rho])}}


def test_it_goes_on_without_training_again(data: Path, out: Path) -> None:
    one = out / "seed1" / "w2-2-0.001.json"
    before = {path: path.stat().st_mtime_ns for path in out.glob("seed*/*.json") if path != one}
    result = json.loads(one.read_text())
    one.unlink()
    assert squat.main(["--preset", "test", "--data", str(data), "--out", str(out)]) == 0
    assert {path: path.stat().st_mtime_ns for path in before} == before
    again = json.loads(one.read_text())
    assert {k: v for k, v in again.items() if k != "seconds"} == {k: v for k, v in result.items() if k != "seconds"}


def test_report(out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert squat_report.main(["--study", str(out), "--out", str(tmp_path)]) == 0
    rows = {row["method"]: row for row in json.loads((tmp_path / "results.json").read_text())["rows"]}
    assert set(rows) == set(squat_report.METHODS)
    one = json.loads(next((out / "seed1").glob("*squat*.json")).read_text())
    base = json.loads((out / "seed1" / "w2-1-0.001.json").read_text())
    assert rows["squat"]["accuracy"] == [100 * one["test"]["accuracy"], 0.0]
    assert rows["squat"]["gain"][0] == pytest.approx(100 * (one["test"]["accuracy"] - base["test"]["accuracy"]))
    assert rows["lsq"]["largest eigenvalue"][0] == base["lambda_max"]
    assert (tmp_path / "squat.png").stat().st_size > 1000
    assert "| 2 | SQuAT |" in capsys.readouterr().out


def test_goes_on_with_results_made_elsewhere(data: Path, out: Path, tmp_path: Path) -> None:
    assert squat_report.main(["--study", str(out), "--out", str(tmp_path)]) == 0
    report = json.loads((tmp_path / "results.json").read_text())
    one = next(x for x in report["trainings"] if x["seed"] == 1 and x["rho"] is not None)
    report["trainings"].remove(one)
    (tmp_path / "results.json").write_text(json.dumps(report))
    command = ["--preset", "test", "--data", str(data), "--out", str(tmp_path / "all")]
    assert squat.main([*command, "--earlier", str(tmp_path / "results.json")]) == 0
    assert not (tmp_path / "all" / "seed0" / "fp.safetensors").exists(), "nothing of this seed is left to train"
    again = json.loads(next((tmp_path / "all" / "seed1").glob("*squat*.json")).read_text())
    assert again["test"] == one["test"]


def test_another_start_is_not_mixed_in(data: Path, out: Path, tmp_path: Path) -> None:
    """Full precision that gives something else here, as with another version of torch."""
    assert squat_report.main(["--study", str(out), "--out", str(tmp_path)]) == 0
    report = json.loads((tmp_path / "results.json").read_text())
    full = next(x for x in report["trainings"] if x["seed"] == 1 and x["bits"] is None)
    full["test"]["loss"] += 0.01
    report["trainings"].remove(next(x for x in report["trainings"] if x["seed"] == 1 and x["rho"] is not None))
    (tmp_path / "results.json").write_text(json.dumps(report))
    command = ["--preset", "test", "--data", str(data), "--out", str(tmp_path / "all")]
    for _ in range(2):
        with pytest.raises(SystemExit, match="give another --out, no --earlier"):
            squat.main([*command, "--earlier", str(tmp_path / "results.json")])


def test_without_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        squat.main(["--data", str(tmp_path)])
    assert "studies.fetch" in capsys.readouterr().err
