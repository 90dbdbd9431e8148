"""The commands of docs/planner.md parse, and print the numbers of the page."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from qatkernels.cli._main import parsers
from qatkernels.plan import optimal_qat_fraction

TEXT = (Path(__file__).parents[2] / "docs" / "planner.md").read_text()
COMMANDS = re.findall(r"^    (?:\$ )?qatkernels (plan|train) ([^#\n]*)", TEXT, re.MULTILINE)


@pytest.mark.parametrize(("name", "arguments"), COMMANDS)
def test_command(name: str, arguments: str) -> None:
    argv = [name, *shlex.split(arguments)]
    parsers(argv)[0].parse_args(argv)


def test_there_are_commands() -> None:
    assert len(COMMANDS) == 4


def test_numbers_in_the_text() -> None:
    assert "31.4%" in TEXT
    assert f"{optimal_qat_fraction(1.2e9, 100e9, 2):.4f}" in TEXT
    assert f"{optimal_qat_fraction(1.2e9, 100e9, 4):.4f}" in TEXT
