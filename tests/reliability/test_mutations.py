"""A short form of the mutations, and whether the harness notices a reader that takes what is damaged for right."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any

import pytest

from qatkernels import files

from . import mutate, mutations, targets
from .runner import Campaign, Wrong, main

pytestmark = pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="measures memory by /proc")


def test_damaged_foreign_and_crafted_files(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    assert main(["mutations", "--cases", "60", "--seed", "14", "--out", str(out)]) == 0
    results = json.loads(out.read_text())["results"]
    assert results.keys() == targets.TARGETS.keys()
    for name, found in results.items():
        assert found["cases"] == 60
        assert name == "log" or found["refused"] > 15, name
    assert results["external"]["right"] > 0


class _Json(targets.Target):
    """Three readers of one JSON file: ours, one without the digest, and one of everything a reader must not do."""

    ways = (mutate.mutated_bytes,)

    def make(self) -> None:
        self.file = self.folder / "x.json"
        files.write_json(self.file, {"loss": 1.234567, "steps": [1000] * 50}, sealed=True)

    def read(self, case: int) -> Any:
        return files.read_json(self.file)


class _Trusting(_Json):
    errors = (ValueError,)

    def read(self, case: int) -> Any:
        value = json.loads(self.file.read_text())
        return value.pop("digest", None) and value


class _Reckless(_Json):
    def read(self, case: int) -> Any:
        if case % 5 == 1:
            os.kill(os.getpid(), 11)
        if case % 5 == 2:
            return bytearray(300 << 20) and None
        if case % 5 == 3:
            import pickle

            return pickle.loads(b"cposix\nlistdir\n.")
        if case % 5 == 4:
            raise KeyError("x")
        return super().read(case)


@pytest.mark.parametrize("kind", [_Trusting, _Reckless])
def test_the_harness_notices(kind: type[targets.Target], capfd: pytest.CaptureFixture[str]) -> None:
    campaign = Campaign("mutations", seed=1, cases=40)
    mutations.run(campaign, {"x": kind})
    said = " ".join(failure["why"] for failure in campaign.failures)
    assert campaign.results["x"]["wrong"] == len(campaign.failures) > 0
    if kind is _Trusting:
        assert "read as something else" in said
    else:
        for words in ("SIGSEGV", "rose by", "pickle.find_class", "KeyError"):
            assert words in said
        assert campaign.results["x"]["cases"] == 40, "a crash ends its case, not those that follow"
    assert "python -m tests.reliability mutations x --seed 1 --case" in capfd.readouterr().out


def test_ours_is_not_wrong() -> None:
    campaign = Campaign("mutations", seed=1, cases=200)
    mutations.run(campaign, {"x": _Json})
    assert not campaign.failures


def test_a_case_is_the_same_again() -> None:
    content = json.dumps({"a": [1, 2, {"b": "c"}]}).encode()
    for way in (mutate.mutated_bytes, mutate.mutated_json, mutate.mutated_lines):
        first, second = (way(content, Campaign("x", 3).draw("y", 7)) for _ in range(2))
        assert first == second
    assert mutate.mutated_bytes(content, random.Random(1)) != content


def test_names_are_checked() -> None:
    with pytest.raises(SystemExit, match="mutations has no 'nothing', must be of packed"):
        main(["mutations", "nothing", "--seed", "1"])
    assert issubclass(Wrong, AssertionError)
