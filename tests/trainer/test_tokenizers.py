"""Models with a tokenizer of their own: a run reads text by it, and hands it on."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from qatkernels import cli
from qatkernels.trainer import ConfigError, TrainConfig, data, loop, models

from .conftest import run

pytest.importorskip("transformers")


def write_tokenizer(folder: Path) -> None:
    """Write a tokenizer of pieces of words."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
    from tokenizers.models import BPE

    tokenizer = Tokenizer(BPE(unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=200, special_tokens=["?"], show_progress=False)
    tokenizer.train_from_iterator(["red is number 11\ngreen is number 22\nblue is number 33\n" * 9], trainer)
    tokenizer.save(str(folder / "tokenizer.json"))


@pytest.mark.parametrize("name", ["tokenizer.model", "vocab.json"])
def test_a_tokenizer_in_another_file(tiny_hf: dict[str, Any], llama: Path, name: str) -> None:
    """A model must not be trained on bytes because its tokenizer is not read."""
    (llama / name).write_text("{}")
    with pytest.raises(ConfigError, match=rf"whose tokenizer is in {name}, must be in tokenizer.json"):
        run(tiny_hf, model=str(llama))


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_tokenizer_beside_a_file(tiny_hf: dict[str, Any], llama: Path, tmp_path: Path, name: str) -> None:
    """--model may be a file in the folder of a model; its tokenizer is used and copied as well."""
    write_tokenizer(llama)
    if name == "model.safetensors":
        run(tiny_hf, model=str(llama), steps=2, qat_steps=2)
        llama = Path(tiny_hf["out"]) / "w2"
    out = tmp_path / "again"
    run({**tiny_hf, "out": str(out)}, model=str(llama / name), steps=2, qat_steps=2)
    assert (out / "w2" / "tokenizer.json").read_bytes() == (llama / "tokenizer.json").read_bytes()
    assert models.tokenizer(str(llama / name)) == llama / "tokenizer.json"


def test_a_tokenizer(tiny_hf: dict[str, Any], llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Losses are per byte all the same, and the text is known by its tokenizer too."""
    write_tokenizer(llama)
    report = run(tiny_hf, model=str(llama))
    corpus = data.load(tiny_hf["data"], 32, llama / "tokenizer.json")
    assert corpus.train.dtype == torch.int32
    assert 2 < corpus.bytes_per_token < 12
    assert report["text"]["held_out_bytes"] == corpus.held_out_bytes
    config = TrainConfig(**tiny_hf, model=str(llama)).resolved()
    model = models.load_trained(Path(tiny_hf["out"]) / "fp").model
    windows = corpus.evaluation(config.evaluation.eval_windows, config.shape.context)
    with torch.no_grad():
        nats = float(loop.mean_loss(model, windows, config))
    wanted = nats / math.log(2) / corpus.bytes_per_token
    assert report["full_precision"]["full_precision"] == pytest.approx(wanted, rel=1e-5)
    assert corpus.sha256 != data.load(tiny_hf["data"], 32).sha256
    assert (Path(tiny_hf["out"]) / "w2" / "tokenizer.json").read_bytes() == (llama / "tokenizer.json").read_bytes()
    capsys.readouterr()
    few = ["--tokens", "4", "--prompt", "red is"]
    assert cli.main(["generate", tiny_hf["out"] + "/w2", *few]) == 0
    own = capsys.readouterr()
    assert len(own.out) > len("red is") + 4 + 1, "a token is more than a byte"
    assert own.out.startswith("red is")
    assert own.err.startswith("4 tokens, ")
    assert cli.main(["pack", tiny_hf["out"] + "/w2", tiny_hf["out"] + "/packed"]) == 0
    assert cli.main(["pack", tiny_hf["out"] + "/w2", tiny_hf["out"] + "/packed.safetensors"]) == 0
    capsys.readouterr()
    assert cli.main(["generate", tiny_hf["out"] + "/packed", *few]) == 0
    assert capsys.readouterr().out == own.out
    assert cli.main(["generate", tiny_hf["out"] + "/packed.safetensors", *few, "--tokenizer", str(llama)]) == 0
    assert capsys.readouterr().out == own.out


def test_a_tokenizer_of_another_model(tiny_hf: dict[str, Any], llama: Path) -> None:
    from tokenizers import Tokenizer, models

    words = {"?": 0, "number": 300}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="?"))
    tokenizer.pre_tokenizer = pytest.importorskip("tokenizers").pre_tokenizers.Whitespace()
    tokenizer.save(str(llama / "tokenizer.json"))
    with pytest.raises(ConfigError, match=r"makes token 300 of --data, must be below 256, the vocab_size"):
        run(tiny_hf, model=str(llama))
