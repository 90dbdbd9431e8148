"""Learning rate schedules: plain functions of the step that return a factor of the peak learning rate."""

from __future__ import annotations

import math
from collections.abc import Callable


def _sqrt(progress: float) -> float:
    return 1 - math.sqrt(progress)


def _cosine(progress: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * progress))


#: Shapes of a decay from 1 at progress 0 to 0 at progress 1.
DECAYS: dict[str, Callable[[float], float]] = {
    "linear": lambda progress: 1 - progress,
    "sqrt": _sqrt,
    "cosine": _cosine,
}


def cosine(step: int, steps: int, warmup: int = 0, floor: float = 0.0) -> float:
    """Return the factor of a cosine schedule with linear warmup.

    Args:
        step: the step about to be taken, from 0.
        steps: steps of the whole run.
        warmup: steps over which the factor rises linearly; the last of them has factor 1.
        floor: factor that the decay approaches at ``steps``.

    Raises:
        ValueError: if ``step`` is not in ``[0, steps)`` or ``warmup`` not in ``[0, steps]``.
    """
    return wsd(step, steps, warmup, decay=steps - warmup, floor=floor, shape="cosine")


def wsd(step: int, steps: int, warmup: int = 0, decay: int = 0, floor: float = 0.0, shape: str = "sqrt") -> float:
    """Return the factor of a warmup-stable-decay schedule (Hägele et al., 2024).

    Args:
        step: the step about to be taken, from 0.
        steps: steps of the whole run.
        warmup: steps over which the factor rises linearly; the last of them has factor 1.
        decay: steps at the end over which it falls.
        floor: factor that the decay approaches at ``steps``.
        shape: ``"linear"``, ``"sqrt"`` (one minus the square root of the progress) or ``"cosine"``.

    Raises:
        ValueError: if ``step`` is not in ``[0, steps)``, warmup and decay do not fit into ``steps``, or ``shape`` is
            unknown.
    """
    if not 0 <= step < steps:
        raise ValueError(f"step is {step}, must be in [0, {steps})")
    if warmup < 0 or decay < 0 or warmup + decay > steps:
        raise ValueError(f"warmup is {warmup} and decay {decay}, must not be negative or exceed {steps} steps together")
    if shape not in DECAYS:
        raise ValueError(f"shape is {shape!r}, must be one of {sorted(DECAYS)}")
    if step < warmup:
        return (step + 1) / warmup
    done = step - (steps - decay)
    return 1.0 if done < 0 else floor + (1 - floor) * DECAYS[shape](done / decay)
