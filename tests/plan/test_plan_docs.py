"""The Python of docs/planner.md runs as it stands, beside a table of runs and an optimizer; its commands parse."""

from __future__ import annotations

import csv
import re
import shlex
from pathlib import Path

import pytest
import torch

from bench.reproduce.plan_recovery import table
from qatkernels.cli import _train_parser
from qatkernels.plan import command, optimal_qat_fraction
from qatkernels.train import TrainConfig

TEXT = (Path(__file__).parents[2] / "docs" / "planner.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
COMMANDS = re.findall(r"^    (?:\$ )?qatkernels (plan|train) ([^#\n]*)", TEXT, re.MULTILINE)


@pytest.mark.parametrize("source", EXAMPLES)
def test_example(source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    columns = table("small", 0.005, 0)
    with open("runs.csv", "w", newline="") as file:
        csv.writer(file).writerows([[*columns], *zip(*columns.values(), strict=True)])
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    exec(compile(source, "planner.md", "exec"), {"optimizer": optimizer})


@pytest.mark.parametrize(("name", "arguments"), COMMANDS)
def test_command(name: str, arguments: str) -> None:
    parser = command.parser() if name == "plan" else _train_parser(TrainConfig)
    parser.parse_args(shlex.split(arguments))


def test_there_are_examples_and_commands() -> None:
    assert len(EXAMPLES) == 3
    assert len(COMMANDS) == 4


def test_numbers_in_the_text() -> None:
    assert "31.4%" in TEXT
    assert f"{optimal_qat_fraction(1.2e9, 100e9, 2):.4f}" in TEXT
    assert f"{optimal_qat_fraction(1.2e9, 100e9, 4):.4f}" in TEXT
