"""A short form of the memory figures, and whether a leak of a hundred bytes a step is seen in the long one."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch

from . import memory

pytestmark = pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads /proc")


@pytest.mark.parametrize("name", memory.WAYS)
def test_memory_is_flat(name: str) -> None:
    found = memory.watch(memory.WAYS[name](), 100)
    assert not memory.wrong(found), found


def _leaks(size: int) -> Callable[[int], None]:
    kept: list[object] = []
    return lambda number: kept.append(bytearray(size))


@pytest.mark.parametrize(("size", "steps"), [(300, 20_000), (30_000, 200)])
def test_a_leak_is_seen(size: int, steps: int) -> None:
    assert any("resident memory drifts" in why for why in memory.wrong(memory.watch(_leaks(size), steps)))


def test_a_tensor_that_stays_is_seen() -> None:
    kept: list[torch.Tensor] = []
    found = memory.watch(lambda number: kept.append(torch.zeros(1)) if number == 150 else None, 200)
    assert any("there are 1 tensors more" in why for why in memory.wrong(found))


def test_slope() -> None:
    assert memory.slope([0, 10, 20], [5, 25, 45]) == pytest.approx((2, 0))
    rise, error = memory.slope([0, 1, 2, 3], [0, 1, 0, 1])
    assert rise == pytest.approx(0.2)
    assert error == pytest.approx((0.8 / 2 / 5) ** 0.5)
