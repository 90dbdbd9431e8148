"""How the best share of quantized training depends on size, tokens and bits: ``python -m studies.plan``.

For every size of model one training at a constant learning rate, with snapshots where something branches off: for each
budget and fraction a cooldown and QAT from it (classic), and QAT from the constant rate (fused), at each bit width. All
budgets, fractions and widths share that prefix exactly. Every phase is one of `qatkernels.trainer`, finished ones are
never run again, and a signal stops at a checkpoint: run the same command again to go on.

    <out>/<model>-seed<n>/   a folder of `qatkernels.trainer`
    <out>/runs.csv           one line for each finished training, rewritten after each
"""

from __future__ import annotations

import argparse
import csv
import io
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bench.machine import cpu_model, git_state, versions
from qatkernels import files
from qatkernels.methods.schedules import split
from qatkernels.trainer import Interrupted, TrainConfig, data, loop, run_folder
from qatkernels.trainer.phases import Phase, cooled_from, quantized_from, quantized_parameters, trunk_parts

COLUMNS = ("params", "bits", "tokens_fp", "tokens_qat", "loss", "seed", "schedule", "shape", "fraction", "model",
           "round_to_nearest", "seconds")  # fmt: skip


class Unit(NamedTuple):
    """A part of a grid: one budget, in steps of both phases together; sizes are places in those of the preset."""

    steps: int
    seeds: tuple[int, ...] = (0,)
    schedules: tuple[str, ...] = ("classic", "fused")
    sizes: tuple[int, ...] = (0, 1, 2)


@dataclass(frozen=True)
class Preset:
    """A grid of trainings.

    Attributes:
        sizes: width, depth and heads of each model.
        units: what is run, in order.
        fractions: shares of QAT.
        bits: widths.
        config: everything else.
    """

    sizes: tuple[tuple[int, int, int], ...]
    units: tuple[Unit, ...]
    fractions: tuple[float, ...]
    bits: tuple[float, ...]
    config: TrainConfig


#: No evaluation and no line of the log but at the ends of a phase.
_QUIET = {"eval_every": 10**9, "log_every": 10**9, "save_every": 500}
# fmt: off
PRESETS = {
    # 512 bytes a step. Cheap and complete first, so that a run that is cut short is still a grid.
    "cpu": Preset(
        sizes=((16, 2, 2), (32, 2, 2), (64, 2, 2)),
        units=(
            Unit(128), Unit(512), Unit(128, (1, 2)), Unit(1024, (0,), ("classic",)),
            Unit(2048, (0,), ("classic",), (0,)), Unit(512, (1, 2), sizes=(0,)), Unit(512, (1, 2), sizes=(1, 2)),
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
    "gpu": Preset(
        sizes=((128, 4, 4), (256, 6, 8), (640, 6, 10)),
        units=(Unit(500), Unit(2000), Unit(8000), Unit(32_000), Unit(2000, (1, 2)), Unit(100_000)),
        fractions=(0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.7),
        bits=(1, 1.58, 2, 3, 4, 6),
        config=TrainConfig(
            device="cuda", precision="bfloat16", batch=64, context=256, lr=1.5e-3, qat_lr=1.5e-3, warmup=0.1,
            eval_windows=4096, **_QUIET,
        ),
    ),
    "test": Preset(
        sizes=((16, 1, 1),),
        units=(Unit(16, sizes=(0,)), Unit(24, (0, 1), ("classic",), (0,))),
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
    """One row of the table: the phases that lead to a model, and what they are."""

    phases: tuple[Phase, ...]
    steps: int
    fraction: float
    schedule: str


def configured(preset: Preset, size: tuple[int, int, int], seed: int, out: Path) -> TrainConfig:
    """Return the configuration of one folder; its tokens, the smallest budget, decide the length of the warmup."""
    width, depth, heads = size
    tokens = min(unit.steps for unit in preset.units) * preset.config.training.batch * preset.config.shape.context
    name = f"{width}x{depth}-seed{seed}"
    return preset.config.changed(
        width=width, depth=depth, heads=heads, seed=seed, tokens=tokens, out=str(out / name),
        bits=preset.bits, schedule="classic", qat_fraction=0.5,
    ).resolved()  # fmt: skip


def trainings(preset: Preset, config: TrainConfig, unit: Unit) -> Iterator[Training]:
    """Yield the trainings of one model and seed.

    The parts at the constant rate are those of the whole preset, so that they do not depend on what is run first.
    """
    budgets, steps = sorted({unit.steps for unit in preset.units}), unit.steps
    splits = {(steps, f): split(steps, f) for steps in budgets for f in preset.fractions}
    stops = {full for full, _ in splits.values()}
    stops |= {_start_of_cooldown(config, full) for full in (*stops, *budgets)}
    trunk = trunk_parts(config, sorted(stops))
    yield Training(_cooled(config, trunk, steps), steps, 0.0, "classic")
    for fraction in preset.fractions:
        full, quantized = splits[steps, fraction]
        for schedule in unit.schedules:
            before = _cooled(config, trunk, full) if schedule == "classic" else _constant(trunk, full)
            for bits in preset.bits:
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


def sweep(preset: Preset, out: Path, text: str | None, deadline: float) -> int:
    """Run what is not finished until the deadline (of `time.monotonic`).

    Returns:
        How many trainings are left.
    """
    left = 0
    for unit, seed, size in order(preset):
        config = configured(preset, size, seed, out).changed(data=text)
        corpus = data.load(config.data, config.shape.context)
        for training in trainings(preset, config, unit):
            missing = [p for p in training.phases if not (Path(config.out) / p.name / "config.json").exists()]
            if missing and time.monotonic() > deadline:
                left += 1
            elif missing:
                loop.run_phases(config, corpus, missing, lambda line: None)
        write_table(preset, out)
        print(f"{Path(config.out).name}, {unit.steps} steps: {left} left out so far", flush=True)
    return left


def order(preset: Preset) -> Iterator[tuple[Unit, int, tuple[int, int, int]]]:
    """Yield each unit with each of its seeds and each size."""
    for unit in preset.units:
        for seed in unit.seeds:
            for size in unit.sizes:
                yield unit, seed, preset.sizes[size]


def rows(preset: Preset, out: Path) -> list[dict[str, Any]]:
    """Return a row for each finished training in a folder."""
    found = []
    for unit, seed, size in order(preset):
        config = configured(preset, size, seed, out)
        params, step = quantized_parameters(config), config.training.batch * config.shape.context
        for training in trainings(preset, config, unit):
            path = Path(config.out) / training.phases[-1].name / "config.json"
            if path.exists():
                result, last = files.read_json(path)["result"], training.phases[-1]
                quantized = last.steps if last.bits else 0
                found.append({
                    "params": params,
                    "bits": last.bits or 32,
                    "tokens_fp": step * (training.steps - quantized),
                    "tokens_qat": step * quantized,
                    "loss": round(result["bits_per_byte"], 6),
                    "seed": seed,
                    "schedule": training.schedule,
                    "shape": config.training.decay,
                    "fraction": training.fraction,
                    "model": f"{size[0]}x{size[1]}",
                    "round_to_nearest": round(result["start_bits_per_byte"], 6) if last.bits else "",
                    "seconds": round(result["seconds"], 2),
                })  # fmt: skip
    return found


def write_table(preset: Preset, out: Path) -> None:
    """Replace ``runs.csv`` by what is finished now."""
    text = io.StringIO()
    table = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    table.writeheader()
    table.writerows(rows(preset, out))
    files.write(out / "runs.csv", text.getvalue().encode())


def describe(name: str, preset: Preset, corpus: data.Corpus, left: int) -> dict[str, Any]:
    """Return what the numbers were measured on, and with which settings."""
    config = preset.config.settings()
    for unused in ("out", "data", "width", "depth", "heads", "seed", "steps", "qat_steps", "tokens", "qat_fraction"):
        del config[unused]
    return {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "device": torch.cuda.get_device_name() if preset.config.device == "cuda" else cpu_model(),
        "cpu": cpu_model(),
        "threads": torch.get_num_threads(),
        "load": [round(x, 2) for x in os.getloadavg()],
        "versions": versions(),
        "git": git_state(),
        "preset": name,
        "sizes": preset.sizes,
        "units": preset.units,
        "unfinished": left,
        "text": {"sha256": corpus.sha256, "train_bytes": len(corpus.train), "held_out_bytes": len(corpus.held_out)},
        "config": config,
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Run or go on with a sweep; exit code 3 if trainings are left."""
    parser = argparse.ArgumentParser(prog="python -m studies.plan", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--preset", choices=PRESETS, default="cpu")
    parser.add_argument("--out", type=Path, default=None, help="working folder (default: runs/plan-<preset>)")
    parser.add_argument("--data", help="text to train on; this Python's standard library if not given")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no phase after so many minutes")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (results depend on it in the last bits)")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    preset, out = PRESETS[options.preset], options.out or Path("runs") / f"plan-{options.preset}"
    try:
        with run_folder.exclusive(out):
            left = sweep(preset, out, options.data, time.monotonic() + 60 * options.minutes)
            corpus = data.load(options.data, preset.config.shape.context)
            files.write_json(out / "sweep.json", describe(options.preset, preset, corpus, left))
    except Interrupted as stop:
        print(f"{stop}; the same command goes on from here", file=sys.stderr)
        return 128 + stop.number
    print(f"{out}/runs.csv; {left} trainings left")
    return 3 if left else 0


if __name__ == "__main__":
    sys.exit(main())
