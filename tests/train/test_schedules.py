from __future__ import annotations

import math

import pytest

from qatkernels.train.schedules import cosine, wsd


def test_cosine_against_its_formula() -> None:
    got = [cosine(step, 20, warmup=4, floor=0.1) for step in range(20)]
    assert got[:4] == [0.25, 0.5, 0.75, 1.0]
    for step in range(4, 20):
        assert got[step] == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * (step - 4) / 16)), rel=1e-12)
    assert cosine(0, 10) == 1.0


def test_wsd_phases() -> None:
    got = [wsd(step, 10, warmup=2, decay=4, shape="linear") for step in range(10)]
    assert got == [0.5, 1, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25]
    assert wsd(9, 10, decay=4) == pytest.approx(1 - math.sqrt(0.75))
    assert [wsd(step, 5) for step in range(5)] == [1.0] * 5


@pytest.mark.parametrize("shape", ["linear", "sqrt", "cosine"])
def test_decay_falls_from_one_towards_the_floor(shape: str) -> None:
    got = [wsd(step, 1000, decay=1000, floor=0.2, shape=shape) for step in range(1000)]
    assert got[0] == 1.0
    assert got == sorted(got, reverse=True)
    assert 0.2 < got[-1] < 0.202


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"step": 10, "steps": 10}, "step is 10"),
        ({"step": -1, "steps": 10}, "step is -1"),
        ({"step": 0, "steps": 10, "warmup": 8, "decay": 4}, "warmup is 8 and decay 4"),
        ({"step": 0, "steps": 10, "shape": "square"}, "shape is 'square'"),
    ],
)
def test_bad_arguments(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        wsd(**arguments)  # type: ignore[arg-type]


def test_cosine_rejects_a_warmup_longer_than_the_run() -> None:
    with pytest.raises(ValueError, match="warmup is 11"):
        cosine(0, 10, warmup=11)
