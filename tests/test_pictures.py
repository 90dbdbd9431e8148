"""The pictures of the documents: every one is there, and shows what the library computes and what results hold."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch

from qatkernels.grids import SCHEMES, make_grid

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "docs" / "pictures"


@pytest.fixture(scope="module")
def pictures() -> dict[str, Any]:
    """The names of the script that draws."""
    return runpy.run_path(str(ROOT / "docs" / "_site" / "pictures.py"))


def test_every_picture_is_drawn_and_shown(pictures: dict[str, Any], tmp_path: Path) -> None:
    for name, draw in pictures["PICTURES"].items():
        draw(tmp_path / name)
        assert (tmp_path / name).read_bytes()[:4] == b"\x89PNG"
    assert {path.name for path in FOLDER.iterdir()} == set(pictures["PICTURES"])
    text = "".join(path.read_text() for path in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")))
    assert [name for name in pictures["PICTURES"] if f"pictures/{name})" not in text] == []


def test_every_scheme_is_drawn(pictures: dict[str, Any]) -> None:
    drawn = {make_grid(scheme, bits).scheme for scheme, bits in pictures["DRAWN"]}
    assert drawn == {name for name in SCHEMES if name != "paretoq"}  # which chooses among the others


def test_the_lines_are_those_of_the_rule(pictures: dict[str, Any]) -> None:
    w = torch.tensor([[-5.0], [-0.3], [0.7], [5.0]], dtype=torch.float64, requires_grad=True)
    y, dw, ds = pictures["derivatives"](w, make_grid("lsq", 2))
    assert y.flatten().tolist() == [-2, 0, 1, 1]
    assert dw.flatten().tolist() == [0, 1, 1, 0]
    torch.testing.assert_close(ds.flatten(), torch.tensor([-2, 0.3, 0.3, 1], dtype=torch.float64))


def test_speeds_are_those_of_the_file(pictures: dict[str, Any]) -> None:
    name, shape, _ = pictures["MACHINES"][0]
    rows = json.loads((ROOT / "bench" / "results" / name).read_text())["rows"]
    found = dict(pictures["speedups"](rows, shape, "lsq4", "packed"))
    case = "packed linear lsq4 4096x4096 bfloat16 per row 64 tokens"
    ms = {row["implementation"]: row["median_ms"] for row in rows if row["case"] == case}
    assert found[64] == ms["nn.Linear bfloat16"] / ms["packed"]
    assert len(found) > 5
