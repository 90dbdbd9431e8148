"""docs/reliability.md says what the files in bench/results say."""

from __future__ import annotations

import json

from . import figures, sanitizers
from .runner import PARTS


def test_tables_are_the_files() -> None:
    text = figures.DOCUMENT.read_text()
    assert text == figures.written(text), "run `python -m tests.reliability.figures`"


def test_every_part_has_a_table_and_a_command() -> None:
    assert figures.COLUMNS.keys() == PARTS.keys()
    for part in PARTS:
        assert f"python -m tests.reliability {part}" in figures.DOCUMENT.read_text()


def test_ci_makes_every_build() -> None:
    """The parts in Python have a short form that pytest collects; these have theirs in `.ci/run` and `.ci/packages`."""
    lines = (figures.ROOT / ".ci" / "run").read_text().splitlines()
    made = {name for line in lines for name in line.partition(".ci/fault-builds")[2].replace("+", " ").split()}
    if "-DQK_LTO=ON" in (figures.ROOT / ".ci" / "packages").read_text():
        made.add("lto")
    assert made == set(sanitizers.KINDS)


def test_nothing_wrong_is_left() -> None:
    """The committed results have no failures."""
    for part in PARTS:
        path = figures.RESULTS / f"reliability-{part}.json"
        if path.exists():
            for name, found in json.loads(path.read_text())["results"].items():
                assert not found["failures"], (part, name)
