from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qatkernels.methods.schedules import DECAYS, classic, cosine, fused, split, wsd


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


BUDGETS = st.tuples(st.integers(2, 5000), st.floats(1e-6, 1, exclude_max=True))


@given(BUDGETS, st.sampled_from(sorted(DECAYS)), st.floats(0, 0.5), st.floats(0, 0.5), st.floats(0, 1))
def test_both_schedules_take_all_tokens(
    budget: tuple[int, float], shape: str, warmup: float, cooldown: float, rewarmup: float
) -> None:
    """Classic and fused have as many steps in each phase, whatever their parts, and a rate in (0, 1] at every one."""
    steps, fraction = budget
    full, quantized = split(steps, fraction)
    assert full + quantized == steps
    assert min(full, quantized) >= 1
    assert abs(quantized - fraction * steps) <= 1
    parts = {"warmup": int(warmup * full), "rewarmup": int(rewarmup * quantized), "shape": shape}
    rates = [fused(s, steps, quantized, **parts) for s in range(steps)]
    slower = [classic(s, steps, quantized, cooldown=int(cooldown * full), **parts) for s in range(steps)]
    assert all(0 < rate <= 1 for rate in rates + slower)
    assert rates[full:] == slower[full:]
    start = full - int(cooldown * full)
    assert rates[:start] == slower[:start]
    assert rates[parts["warmup"] : full] == [1.0] * (full - parts["warmup"])
    assert all(a > b for a, b in pairwise(slower[start:full]))


def test_two_phases_by_hand() -> None:
    parts = {"warmup": 2, "rewarmup": 1, "shape": "linear", "floor": 0.2, "qat_peak": 0.5}
    got = [classic(step, 12, 5, cooldown=4, **parts) for step in range(13)]
    assert got == pytest.approx([0.5, 1, 1, 1, 0.8, 0.6, 0.4, 0.5, 0.5, 0.4, 0.3, 0.2, 0.1])
    got = [fused(step, 12, 5, **parts) for step in range(13)]
    assert got == pytest.approx([0.5, 1, 1, 1, 1, 1, 1, 0.5, 0.5, 0.4, 0.3, 0.2, 0.1])


@pytest.mark.parametrize("schedule", [classic, fused])
def test_as_a_lambda_lr(schedule: Callable[..., float]) -> None:
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=0.3)
    factor = partial(schedule, steps=10, qat_steps=4, warmup=2, rewarmup=1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    rates = []
    for _ in range(10):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    assert rates == [0.3 * factor(step) for step in range(10)]
    assert scheduler.get_last_lr() == [0.0]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: classic(11, 10, 2), r"step is 11, must be in \[0, 10\]"),
        (lambda: fused(0, 10, 11), r"qat_steps is 11, must be in \[0, 10\]"),
        (lambda: classic(0, 10, 4, warmup=4, cooldown=3), "warmup is 4 and decay 3"),
        (lambda: fused(9, 10, 2, rewarmup=3), "warmup is 3 and decay -1"),
        (lambda: split(1, 0.5), "steps is 1, must be at least 2"),
        (lambda: split(10, 1.0), "fraction is 1.0"),
    ],
)
def test_bad_phases(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
