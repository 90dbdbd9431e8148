from __future__ import annotations

import json
import random
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    import torch

#: Settings of a run that takes a second.
TINY: dict[str, Any] = {
    "device": "cpu", "precision": "float32", "bits": (2,),
    "width": 32, "depth": 1, "heads": 2, "context": 32, "batch": 4, "steps": 24, "qat_steps": 12,
    "eval_every": 8, "eval_windows": 8, "log_every": 2, "save_every": 5,
}  # fmt: skip


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of simple text that a tiny model can learn."""
    folder, draw = tmp_path_factory.mktemp("text"), random.Random(0)
    for i in range(20):
        pairs = ((draw.choice(("red", "green", "blue")), draw.randrange(10)) for _ in range(400))
        (folder / f"{i}.txt").write_text("".join(f"{colour} is number {n}{n}\n" for colour, n in pairs))
    return folder


@pytest.fixture
def tiny(tmp_path: Path, text: Path) -> dict[str, Any]:
    return {**TINY, "data": str(text), "out": str(tmp_path / "run")}


@pytest.fixture
def tiny_hf(tiny: dict[str, Any]) -> dict[str, Any]:
    """Settings of a run with a model of transformers, which brings its own shape."""
    return {k: v for k, v in tiny.items() if k not in ("width", "depth", "heads")}


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    """A folder with the configuration of a tiny model, without weights."""
    config = pytest.importorskip("transformers").LlamaConfig(
        vocab_size=256, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=False,
    )  # fmt: skip
    config.save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


def run(settings: dict[str, Any], said: list[str] | None = None, **changes: Any) -> dict[str, Any]:
    """Train with these settings and changes of them; return the report. ``said`` gets the lines of the display."""
    from qatkernels.trainer import TrainConfig, train

    return train(TrainConfig(**{**settings, **changes}), say=(said if said is not None else []).append)


def trained(folder: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of a finished phase."""
    from qatkernels import files

    return files.load(folder / "model.safetensors")[0]


def options(settings: dict[str, Any]) -> list[str]:
    """Settings as command line options."""
    listed: list[str] = []
    for name, value in settings.items():
        listed += [f"--{name.replace('_', '-')}", *map(str, value if isinstance(value, tuple) else (value,))]
    return listed


def outcome(out: str) -> dict[str, Any]:
    """Return all results of a run that must not depend on interruptions."""
    from qatkernels import files

    left: dict[str, Any] = {}
    for folder in sorted(p for p in Path(out).iterdir() if p.is_dir()):
        assert sorted(p.name for p in folder.iterdir()) == ["model.safetensors", "phase.json"]
        tensors, _ = files.load(folder / "model.safetensors")
        left[folder.name] = {name: (t.dtype, t.shape, t.untyped_storage().tolist()) for name, t in tensors.items()}
    log = [json.loads(line) for line in (Path(out) / "log.jsonl").read_text().splitlines()]
    left["log"] = log
    return left
