from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

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
