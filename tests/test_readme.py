"""The examples of the README and the docs run as they stand, those of a page one after another."""

import re
from pathlib import Path

import pytest
import torch
import transformers

import qatkernels as qk

ROOT = Path(__file__).parent.parent
PAGES = [
    page for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))) if "```python" in page.read_text()
]


class Classifier(torch.nn.Module):
    """A model as transformers' Trainer takes it."""

    def __init__(self):
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.GELU(), torch.nn.Linear(16, 2))

    def forward(self, x, labels):
        return {"loss": torch.nn.functional.cross_entropy(self.layers(x), labels)}


def a_users_loop(folder):
    """What the examples that show a part of a loop call it by."""
    model = qk.quantize_model(Classifier(), qk.QuantConfig(bits=2))
    return {
        "model": model,
        "optimizer": torch.optim.AdamW(model.parameters(), lr=1e-3),
        "data": [{"x": torch.randn(8), "labels": torch.tensor(i % 2)} for i in range(4)],
        "batches": [{"x": torch.randn(4, 8), "labels": torch.tensor([0, 1, 1, 0])} for _ in range(2)],
        "loss": lambda model, batch: model(**batch)["loss"],
        "args": transformers.TrainingArguments(
            output_dir=str(folder),
            max_steps=2,
            per_device_train_batch_size=2,
            report_to=[],
            save_strategy="no",
            use_cpu=True,
        ),
    }


def test_there_are_examples():
    assert len(PAGES) >= 4


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_examples(page, tmp_path, monkeypatch):
    for folder in (
        "bench",
        "docs",
        "examples",
        "studies",
    ):  # to be read; what an example writes stays out of the project
        (tmp_path / folder).symlink_to(ROOT / folder)
    monkeypatch.chdir(tmp_path)
    names = a_users_loop(tmp_path / "run")
    for i, source in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)):
        exec(compile(source, f"{page.name}, example {i}", "exec"), names)
