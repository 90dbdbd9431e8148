"""How the best share of quantized training depends on size, tokens and bits.

For every model one training at a constant learning rate, with snapshots where something branches off: for each budget
and fraction a cooldown and QAT from it (classic), and QAT from the constant rate (fused), at each bit width. All
budgets, fractions and widths share that prefix exactly. Cases are called MODEL-STEPS-SCHEDULE-FRACTION-wBITS.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from qatkernels import files
from qatkernels.methods.schedules import split
from qatkernels.trainer import TrainConfig, loop
from qatkernels.trainer.phases import Phase, cooled_from, quantized_from, quantized_parameters, trunk_parts

from .plan_report import report
from .results import Case, Figures
from .runner import Session, Study


class Unit(NamedTuple):
    """A part of a grid: one budget, in steps of both phases together; sizes are places in those of the size."""

    steps: int
    seeds: tuple[int, ...] = (0,)
    schedules: tuple[str, ...] = ("classic", "fused")
    models: tuple[int, ...] = (0, 1, 2)


@dataclass(frozen=True)
class Size:
    """A grid of trainings.

    Attributes:
        models: width, depth and heads of each.
        units: what is run, in order.
        fractions: shares of QAT.
        bits: widths.
        config: everything else.
    """

    models: tuple[tuple[int, int, int], ...]
    units: tuple[Unit, ...]
    fractions: tuple[float, ...]
    bits: tuple[float, ...]
    config: TrainConfig


#: No evaluation and no line of the log but at the ends of a phase.
_QUIET = {"eval_every": 10**9, "log_every": 10**9, "save_every": 500}
# fmt: off
SIZES = {
    # 512 bytes a step. Cheap and complete first, so that a run that is cut short is still a grid.
    "cpu": Size(
        models=((16, 2, 2), (32, 2, 2), (64, 2, 2)),
        units=(
            Unit(128), Unit(512), Unit(128, (1, 2)), Unit(1024, (0,), ("classic",)),
            Unit(2048, (0,), ("classic",), (0,)), Unit(512, (1, 2), models=(0,)), Unit(512, (1, 2), models=(1, 2)),
            Unit(2048, (0,), ("classic",), (1, 2)), Unit(1024, (0,), ("fused",)), Unit(1024, (1, 2)),
        ),
        fractions=(0.05, 0.1, 0.2, 0.35, 0.5, 0.7),
        bits=(1, 2, 4),
        config=TrainConfig(
            device="cpu", precision="float32", batch=16, context=32, lr=4e-3, qat_lr=4e-3, warmup=0.1,
            eval_windows=256, **_QUIET,
        ),
    ),
    # 16,384 bytes a step, up to 30 million quantized parameters and 1.6 billion bytes: give it --data of that size.
    "gpu": Size(
        models=((128, 4, 4), (256, 6, 8), (640, 6, 10)),
        units=(Unit(500), Unit(2000), Unit(8000), Unit(32_000), Unit(2000, (1, 2)), Unit(100_000)),
        fractions=(0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.7),
        bits=(1, 1.58, 2, 3, 4, 6),
        config=TrainConfig(
            device="cuda", precision="bfloat16", batch=64, context=256, lr=1.5e-3, qat_lr=1.5e-3, warmup=0.1,
            eval_windows=4096, **_QUIET,
        ),
    ),
    "smoke": Size(
        models=((16, 1, 1),),
        units=(Unit(16, models=(0,)), Unit(24, (0, 1), ("classic",), (0,))),
        fractions=(0.25, 0.5),
        bits=(1, 4),
        config=TrainConfig(
            device="cpu", precision="float32", batch=4, context=16, warmup=0.1, eval_windows=16, **_QUIET
        ),
    ),
}
# fmt: on


@dataclass(frozen=True)
class Training:
    """The phases that lead to a model, and what they are.

    A unit without classic schedules has a row in full precision too. It is the ``same`` training as that of the unit
    with classic ones. The published fit counts both rows.
    """

    phases: tuple[Phase, ...]
    steps: int
    fraction: float
    schedule: str
    same: bool = False

    @property
    def last(self) -> Phase:
        """The phase that ends with the model."""
        return self.phases[-1]

    @property
    def name(self) -> str:
        """Name of the training among those of its model and seed."""
        last = self.last
        return (
            f"{self.steps}-{self.schedule}-{self.fraction:g}-w{last.bits:g}"
            if last.bits
            else f"{self.steps}-fp{'-same' if self.same else ''}"
        )


def configured(size: Size, model: tuple[int, int, int], seed: int, work: Path) -> TrainConfig:
    """Return the configuration of a model and seed. The smallest budget decides the length of the warmup."""
    width, depth, heads = model
    tokens = min(unit.steps for unit in size.units) * _tokens(size.config)
    return size.config.changed(
        width=width, depth=depth, heads=heads, seed=seed, tokens=tokens, out=str(work / f"{width}x{depth}-seed{seed}"),
        bits=size.bits, schedule="classic", qat_fraction=0.5,
    ).resolved()  # fmt: skip


def _tokens(config: TrainConfig) -> int:
    """Return the tokens of a step."""
    return config.training.batch * config.shape.context


def trainings(size: Size, config: TrainConfig, unit: Unit) -> Iterator[Training]:
    """Yield the trainings of one model and seed.

    The parts at the constant rate are those of all units together, so they do not depend on what runs first.
    """
    budgets, steps = sorted({unit.steps for unit in size.units}), unit.steps
    splits = {(steps, f): split(steps, f) for steps in budgets for f in size.fractions}
    stops = {full for full, _ in splits.values()}
    stops |= {_start_of_cooldown(config, full) for full in (*stops, *budgets)}
    trunk = trunk_parts(config, sorted(stops))
    yield Training(_cooled(config, trunk, steps), steps, 0.0, "classic", same="classic" not in unit.schedules)
    for fraction in size.fractions:
        full, quantized = splits[steps, fraction]
        for schedule in unit.schedules:
            before = _cooled(config, trunk, full) if schedule == "classic" else _constant(trunk, full)
            for bits in size.bits:
                last = quantized_from(config, bits, quantized, before[-1])
                last = replace(last, name=f"{last.name}-{schedule}{full}-{quantized}")
                yield Training((*before, last), steps, fraction, schedule)


def _start_of_cooldown(config: TrainConfig, full: int) -> int:
    return full - max(int(config.training.cooldown * full), 1)


def _constant(trunk: dict[int, Phase], full: int) -> tuple[Phase, ...]:
    """Return the parts at the constant rate up to a step."""
    return tuple(part for stop, part in trunk.items() if stop <= full)


def _cooled(config: TrainConfig, trunk: dict[int, Phase], full: int) -> tuple[Phase, ...]:
    """Return the parts up to where a cooldown starts that ends at a step, and the cooldown."""
    start = _start_of_cooldown(config, full)
    return *_constant(trunk, start), cooled_from(config, trunk[start], full - start)


def order(size: Size) -> Iterator[tuple[Unit, int, tuple[int, int, int]]]:
    """Yield each unit with each of its seeds and each model."""
    for unit in size.units:
        for seed in unit.seeds:
            for model in unit.models:
                yield unit, seed, size.models[model]


def settings(session: Session) -> dict[str, Any]:
    """Return what all trainings share."""
    size, config = session.size, session.size.config.settings()
    for unused in ("out", "data", "width", "depth", "heads", "seed", "steps", "qat_steps", "tokens", "qat_fraction"):
        del config[unused]
    return {
        "text": session.text_settings(size.config.shape.context),
        "smallest_budget": min(unit.steps for unit in size.units),
        "config": config,
    }


def cases(session: Session) -> Iterator[Case]:
    """Yield the trainings."""
    size: Size = session.size
    for unit, seed, model in order(size):
        config = configured(size, model, seed, session.work).changed(data=session.data)
        name = f"{model[0]}x{model[1]}"
        for t in trainings(size, config, unit):
            own = {
                "model": name, "steps": t.steps, "schedule": t.schedule, "shape": config.training.decay,
                "fraction": t.fraction, "bits": t.last.bits or 32,
            }  # fmt: skip
            yield Case(f"{name}-{t.name}", seed, own, partial(train, session, config, t))


def train(session: Session, config: TrainConfig, t: Training) -> Figures:
    """Run the phases that are not finished, and return the loss of the last one."""
    out = Path(config.out)
    missing = [p for p in t.phases if not (out / p.name / "phase.json").exists()]
    if missing:
        loop.run_phases(config, session.text(config.shape.context), missing, lambda line: None)
    found = files.read_json(out / t.last.name / "phase.json")["result"]
    quantized = t.last.steps if t.last.bits else 0
    return {
        "params": quantized_parameters(config),
        "tokens_fp": _tokens(config) * (t.steps - quantized),
        "tokens_qat": _tokens(config) * quantized,
        "loss": round(found["bits_per_byte"], 6),
        "round_to_nearest": round(found["start_bits_per_byte"], 6) if t.last.bits else None,
        "seconds": round(found["seconds"], 2),
    }


STUDY = Study("plan", SIZES, cases, report, settings)
