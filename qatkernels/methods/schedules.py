"""Learning rate schedules: functions from the step to the learning rate, as a factor of the peak."""

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
        decay: steps at the end over which the factor falls.
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


def split(steps: int, fraction: float) -> tuple[int, int]:
    """Return the number of full-precision steps and of QAT steps, each at least 1.

    Args:
        steps: steps of both phases together, at least 2.
        fraction: fraction of QAT steps, in (0, 1).

    Raises:
        ValueError: if ``steps`` or ``fraction`` is out of range.
    """
    if steps < 2:
        raise ValueError(f"steps is {steps}, must be at least 2: one in full precision, one quantized")
    if not 0 < fraction < 1:
        raise ValueError(f"fraction is {fraction}, must be in (0, 1)")
    quantized = min(max(round(steps * fraction), 1), steps - 1)
    return steps - quantized, quantized


def classic(
    step: int, steps: int, qat_steps: int, warmup: int = 0, cooldown: int = 0, rewarmup: int = 0,
    floor: float = 0.0, shape: str = "sqrt", qat_peak: float = 1.0,
) -> float:  # fmt: skip
    """Return the factor of a complete full-precision training, with cooldown, that QAT follows.

    The first ``steps - qat_steps`` steps are in full precision: warmup, constant, cooldown. Then QAT starts from the
    cooled-down weights: re-warmup, decay. The function works with
    ``LambdaLR(optimizer, partial(classic, steps=..., qat_steps=...))``, which also calls it after the last step.

    Args:
        step: the step about to be taken in the whole run, from 0; ``steps`` gives the rate at the end of the decay.
        steps: steps of both phases together.
        qat_steps: the last steps, which are quantized.
        warmup: first steps, over which the factor rises linearly; the last of them has factor 1.
        cooldown: last steps of the full-precision phase, over which it falls.
        rewarmup: first steps of the quantized phase, over which it rises again.
        floor: factor at which both decays end, as a fraction of their peak.
        shape: shape of both decays; a key of ``DECAYS``.
        qat_peak: factor at the peak of the quantized phase.

    Raises:
        ValueError: if ``step`` is not in ``[0, steps]``, a part does not fit into its phase, or ``shape`` is unknown.
    """
    return _two_phases(step, steps, qat_steps, (warmup, cooldown), rewarmup, floor, shape, qat_peak)


def fused(
    step: int, steps: int, qat_steps: int, warmup: int = 0, rewarmup: int = 0,
    floor: float = 0.0, shape: str = "sqrt", qat_peak: float = 1.0,
) -> float:  # fmt: skip
    """Return the factor of a training whose only cooldown is the decay of QAT.

    The first ``steps - qat_steps`` steps are in full precision: warmup, constant. QAT starts where :func:`classic`
    would start its cooldown, from the weights at the constant rate: re-warmup, decay. Arguments and errors are those of
    :func:`classic`.
    """
    return _two_phases(step, steps, qat_steps, (warmup, 0), rewarmup, floor, shape, qat_peak)


def _two_phases(
    step: int, steps: int, qat_steps: int, ends: tuple[int, int], rewarmup: int, floor: float, shape: str, peak: float
) -> float:
    if not 0 <= step <= steps:
        raise ValueError(f"step is {step}, must be in [0, {steps}]")
    if not 0 <= qat_steps <= steps:
        raise ValueError(f"qat_steps is {qat_steps}, must be in [0, {steps}]")
    first = steps - qat_steps
    warmup, cooldown = ends
    if step < first:
        return wsd(step, first, warmup, cooldown, floor, shape)
    if step == steps:  # LambdaLR calls the schedule once more after the last step
        return floor * peak if qat_steps else floor if cooldown else 1.0
    return peak * wsd(step - first, qat_steps, rewarmup, qat_steps - rewarmup, floor, shape)
