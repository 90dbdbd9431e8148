"""WinQ against plain QAT on a language model trained from scratch: ``python -m studies.winq``.

For every seed one training in full precision, and from its end QAT at each width, with and without 8-bit activations:
plain (``base``), with ``noise`` only, with ``reset`` only, with ``both``; and, ours, under a rate that stays at its
peak for four fifths of the steps, plain (``wsd``) and with a reset half way (``plateau``). Every variant of a seed sees
the same batches. The period and the weight of the resets are chosen on seed 0, which is not reported. Finished phases
are never run again: run the same command again to go on.

    <out>/seed<n>/           a folder of `qatkernels.trainer`, a phase for each training, and a result <phase>.json
    <out>/runs.csv           one line for each finished training, rewritten after each
    <out>/curves.json        held-out loss by step of each
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

from bench.machine import cpu_model, git_state, machines
from qatkernels import files
from qatkernels.methods.winq import WinQConfig
from qatkernels.trainer import Interrupted, TrainConfig, data, loop, run_folder
from qatkernels.trainer.methods import MethodConfig
from qatkernels.trainer.phases import Phase, own_decay, phases, quantized_from
from qatkernels.trainer.report import Log

#: Of the table; a result also has its curve.
COLUMNS = ("seed", "bits", "act_bits", "steps", "variant", "reset_every", "reset_weight", "loss", "seconds")


class StudyError(Exception):
    """A study cannot go on like this; the message says why."""


class NotChosenError(StudyError):
    """Seed 0 has not been trained far enough."""


class Resets(NamedTuple):
    """When and how far: the period as a share of the phase."""

    period: float
    weight: float


class Variant(NamedTuple):
    """What is done on top of plain QAT."""

    noise: bool = False
    resets: bool = False
    schedule: str = "cosine"


VARIANTS = {
    "base": Variant(),
    "noise": Variant(noise=True),
    "reset": Variant(resets=True),
    "both": Variant(noise=True, resets=True),
    "wsd": Variant(schedule="wsd"),
    "plateau": Variant(resets=True, schedule="wsd"),
}


class Choice(NamedTuple):
    """How resets are chosen, for all variants with resets under the same schedule: on seed 0, by these trainings."""

    variant: str
    bits: tuple[float, ...]
    steps: int
    candidates: tuple[Resets, ...]


class Part(NamedTuple):
    """Some of the trainings: every seed with every width, activation and variant."""

    seeds: tuple[int, ...]
    bits: tuple[float, ...]
    act_bits: tuple[int | None, ...]
    variants: tuple[str, ...]
    steps: int


@dataclass(frozen=True)
class Preset:
    """A study.

    Attributes:
        config: model and training.
        choices: of the resets, one for each schedule that has them.
        parts: what is reported, in the order in which it is run.
        noise_std: of ``noise`` and ``both``.
    """

    config: TrainConfig
    choices: tuple[Choice, ...]
    parts: tuple[Part, ...]
    noise_std: float = 1e-3


_CANDIDATES = tuple(Resets(period, weight) for period in (0.5, 0.25) for weight in (0.2, 0.4))
_HALF_WAY = tuple(Resets(0.5, weight) for weight in (0.1, 0.2, 0.4))
_PAPER, _OURS = ("base", "noise", "reset", "both"), ("base", "wsd", "plateau")
# fmt: off
PRESETS = {
    # 0.33 million quantized parameters, 1024 bytes a step.
    "cpu": Preset(
        TrainConfig(
            device="cpu", precision="bfloat16", width=96, depth=3, heads=3, context=128, batch=8, steps=2500,
            qat_steps=1200, lr=2e-3, qat_lr=5e-4, eval_every=100, eval_windows=256, log_every=100, save_every=500,
            schedule="cosine",
        ),
        (Choice("both", (1, 2), 1200, _CANDIDATES), Choice("plateau", (1, 2), 2400, _HALF_WAY)),
        (
            Part((1, 2, 3), (1, 2), (None,), _PAPER, 1200),
            Part((1, 2, 3), (1.58, 3), (None,), _PAPER, 1200),
            Part((1, 2, 3), (1, 2), (None,), _OURS, 2400),
            Part((1, 2, 3), (1, 1.58, 2, 3), (8,), _PAPER, 1200),
            Part((1, 2, 3), (1,), (None,), (*_OURS, "reset", "both"), 9600),
        ),
    ),
    # 57 million parameters, 65,536 bytes a step: give it --data of some billion bytes. Not run yet.
    "gpu": Preset(
        TrainConfig(
            device="cuda", precision="bfloat16", width=768, depth=8, heads=12, context=512, batch=128, steps=8000,
            qat_steps=8000, lr=1e-3, qat_lr=2e-4, eval_every=200, eval_windows=1024, log_every=100, save_every=500,
            schedule="cosine",
        ),
        (Choice("both", (1, 2), 8000, _CANDIDATES), Choice("plateau", (1, 2), 8000, _HALF_WAY)),
        (Part((1, 2, 3), (1, 1.58, 2, 3), (None, 8), (*_PAPER, *_OURS[1:]), 8000),),
    ),
    "test": Preset(
        TrainConfig(
            device="cpu", precision="float32", width=16, depth=1, heads=1, context=16, batch=4, steps=8, qat_steps=8,
            eval_every=2, eval_windows=8, log_every=2, save_every=4, schedule="cosine",
        ),
        (Choice("both", (1,), 8, _CANDIDATES[:2]), Choice("plateau", (1,), 8, _HALF_WAY)),
        (Part((1, 2), (1,), (None, 8), ("both", *_OURS), 8),),
    ),
}
# fmt: on


@dataclass(frozen=True)
class Training:
    """One line of the table."""

    seed: int
    bits: float
    act_bits: int | None
    variant: str
    resets: Resets
    phase: Phase


def configured(preset: Preset, seed: int, out: Path, text: str | None) -> TrainConfig:
    """Return the configuration of a seed's folder."""
    return preset.config.changed(seed=seed, out=str(out / f"seed{seed}"), data=text).resolved()


def training(
    preset: Preset, seed: int, bits: float, act_bits: int | None, variant: str, resets: Resets, steps: int, out: Path
) -> Training:
    """Return one training; its phase starts from the end of the seed's phase in full precision."""
    config, kind = configured(preset, seed, out, None).changed(qat_steps=steps), VARIANTS[variant]
    every = max(round(resets.period * steps), 1) if kind.resets else 0
    method = MethodConfig(
        "winq" if kind.noise or kind.resets else "qat",
        WinQConfig(every, resets.weight, noise_std=preset.noise_std if kind.noise else 0.0),
    )  # fmt: skip
    rate = own_decay(config.changed(schedule=kind.schedule, cooldown=0.2), steps)
    name = f"w{bits:g}{'' if act_bits is None else f'a{act_bits}'}-{steps}-{variant}"
    if every:
        name += f"-{every}-{resets.weight:g}"
    phase = quantized_from(config, bits, steps, phases(config)[0])
    phase = replace(phase, name=name, rate=rate, act_bits=act_bits, method=method)
    return Training(seed, bits, act_bits, variant, resets, phase)


def named(line: dict[str, Any]) -> str:
    """Return the name of the phase of a line of the table."""
    act, every = line["act_bits"], line["reset_every"]
    name = f"w{float(line['bits']):g}{f'a{act}' if act else ''}-{line['steps']}-{line['variant']}"
    return name + f"-{every}-{float(line['reset_weight']):g}" if every else name


def result(t: Training, out: Path) -> dict[str, Any] | None:
    """Return the result of a training, None if it is not finished."""
    path = out / f"seed{t.seed}" / f"{t.phase.name}.json"
    return files.read_json(path) if path.exists() else None


def run(t: Training, config: TrainConfig) -> dict[str, Any]:
    """Train, and return the result."""
    corpus = data.load(config.data, config.shape.context)
    loop.run_phases(config, corpus, [phases(config)[0], t.phase], lambda line: None)
    folder = Path(config.out)
    found, resets = files.read_json(folder / t.phase.name / "config.json")["result"], VARIANTS[t.variant].resets
    entries = [e for e in Log(folder / "log.jsonl").entries() if e["phase"] == t.phase.name and "held_out" in e]
    line = {
        "seed": t.seed, "bits": t.bits, "act_bits": t.act_bits or "", "steps": t.phase.steps, "variant": t.variant,
        "reset_every": t.phase.method.winq.reset_every or "", "reset_weight": t.resets.weight if resets else "",
        "loss": round(found["bits_per_byte"], 6), "seconds": round(found["seconds"], 1),
        "curve": [[e["step"], round(e["held_out"], 6)] for e in entries],
    }  # fmt: skip
    files.write_json(folder / f"{t.phase.name}.json", line)
    return line


def take_over(tables: Path, out: Path, sha256: str) -> None:
    """Write the results of tables that were made elsewhere, where there are none yet.

    Raises:
        StudyError: if they are of another text.
    """
    other = files.read_json(tables / "study.json")["text"]["sha256"]
    if other != sha256:
        raise StudyError(f"--earlier {tables} is of a text with SHA-256 {other}, must be that of --data, {sha256}")
    curves = files.read_json(tables / "curves.json")
    with open(tables / "runs.csv", newline="") as file:
        for line in csv.DictReader(file):
            path = out / f"seed{line['seed']}" / f"{named(line)}.json"
            if not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                number = {"seed": int(line["seed"]), "loss": float(line["loss"])}
                files.write_json(path, {**line, **number, "curve": curves[line["seed"]][named(line)]})


def tried(preset: Preset, choice: Choice, bits: float, out: Path) -> list[Training]:
    """Return the trainings on seed 0 that decide the resets at a width."""
    return [training(preset, 0, bits, None, choice.variant, r, choice.steps, out) for r in choice.candidates]


def chosen(preset: Preset, choice: Choice, bits: float, out: Path) -> Resets | None:
    """Return the resets with the lowest loss on seed 0 at the nearest width tried, None if that is not finished."""
    nearest = min(choice.bits, key=lambda tried_bits: abs(tried_bits - bits))
    lines = [(result(t, out), t.resets) for t in tried(preset, choice, nearest, out)]
    losses = [(line["loss"], resets) for line, resets in lines if line is not None]
    return min(losses)[1] if len(losses) == len(lines) else None


def trainings(preset: Preset, out: Path) -> Iterator[Training]:
    """Yield what is to be run, in order; what depends on a choice comes after its choice is finished."""
    for choice in preset.choices:
        for bits in choice.bits:
            yield from tried(preset, choice, bits, out)
    choices = {VARIANTS[choice.variant].schedule: choice for choice in preset.choices}
    for part in preset.parts:
        for seed in part.seeds:
            for act_bits in part.act_bits:
                for bits in part.bits:
                    for variant in part.variants:
                        resets = chosen(preset, choices[VARIANTS[variant].schedule], bits, out)
                        if resets is None:
                            raise NotChosenError("the resets are not chosen yet: seed 0 does that")
                        yield training(preset, seed, bits, act_bits, variant, resets, part.steps, out)


def study(preset: Preset, out: Path, text: str | None, deadline: float, seeds: Sequence[int] | None) -> bool:
    """Run what is not finished until the deadline (of `time.monotonic`), and return whether all is."""
    whole = True
    for t in trainings(preset, out):
        if result(t, out) is None:
            if seeds is not None and t.seed not in seeds:
                whole = False
                continue
            if time.monotonic() > deadline:
                return False
            line = run(t, configured(preset, t.seed, out, text))
            write_tables(preset, out)
            print(f"seed {t.seed}, {t.phase.name}: {line['loss']:.4f}", flush=True)
    return whole


def finished(preset: Preset, out: Path) -> list[dict[str, Any]]:
    """Return the results that there are."""
    found = []
    try:
        for t in trainings(preset, out):
            if (line := result(t, out)) is not None:
                found.append(line)
    except NotChosenError:
        pass  # the rest waits for a choice
    return found


def write_tables(preset: Preset, out: Path) -> None:
    """Replace ``runs.csv`` and ``curves.json`` by what is finished now."""
    lines, text = finished(preset, out), io.StringIO()
    table = csv.DictWriter(text, COLUMNS, lineterminator="\n", extrasaction="ignore")
    table.writeheader()
    table.writerows(lines)
    files.write(out / "runs.csv", text.getvalue().encode())
    curves: dict[str, dict[str, Any]] = {}
    for line in lines:
        curves.setdefault(str(line["seed"]), {})[named(line)] = line["curve"]
    files.write_json(out / "curves.json", curves)


def describe(name: str, preset: Preset, out: Path, corpus: data.Corpus, earlier: Sequence[Path]) -> dict[str, Any]:
    """Return what the numbers are measured on, and with which settings."""
    device = torch.cuda.get_device_name() if preset.config.device == "cuda" else cpu_model()
    before = [folder / "study.json" for folder in (out, *earlier)]
    return {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "machines": machines(device, *(files.read_json(path) for path in before if path.exists())),
        "load": [round(x, 2) for x in os.getloadavg()],
        "git": git_state(),
        "preset": name,
        "noise_std": preset.noise_std,
        "text": {"sha256": corpus.sha256, "train_bytes": len(corpus.train), "held_out_bytes": len(corpus.held_out)},
        "config": {
            k: v for k, v in preset.config.settings().items() if k not in ("out", "data", "seed", "bits", "method")
        },
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Run or go on with the study; exit code 3 if something is left."""
    parser = argparse.ArgumentParser(prog="python -m studies.winq", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--preset", choices=PRESETS, default="cpu")
    parser.add_argument("--out", type=Path, default=None, help="working folder (default: runs/winq-<preset>)")
    parser.add_argument("--data", help="text to train on; this Python's standard library if not given")
    parser.add_argument(
        "--earlier",
        type=Path,
        nargs="+",
        default=[],
        help="folders with tables of studies to go on with; none is run again",
    )
    parser.add_argument(
        "--seeds", type=int, nargs="+", help="run these only, to share a study among processes: 0 first, which chooses "
        "the resets, then the others with an --out each and --earlier for seed 0's; --earlier of all joins them",
    )  # fmt: skip
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no training after so many minutes")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (results depend on it in the last bits)")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    preset, out = PRESETS[options.preset], options.out or Path("runs") / f"winq-{options.preset}"
    known = {0, *(seed for part in preset.parts for seed in part.seeds)}
    if not set(options.seeds or ()) <= known:
        parser.error(f"--seeds is {options.seeds}, must be of {sorted(known)}")
    corpus = data.load(options.data, preset.config.shape.context)
    try:
        with run_folder.exclusive(out):
            made = describe(options.preset, preset, out, corpus, options.earlier)
            for tables in options.earlier:
                take_over(tables, out, corpus.sha256)

            def note(finished: bool) -> None:
                resets = {c.variant: {f"{b:g}": chosen(preset, c, b, out) for b in c.bits} for c in preset.choices}
                files.write_json(out / "study.json", {**made, "finished": finished, "resets": resets})

            note(False)
            whole = study(preset, out, options.data, time.monotonic() + 60 * options.minutes, options.seeds)
            write_tables(preset, out)
            note(whole)
    except (StudyError, files.CheckpointError) as error:
        parser.error(str(error))
    except Interrupted as stop:
        print(f"{stop}; the same command goes on from here", file=sys.stderr)
        return 128 + stop.number
    print(f"{out}/runs.csv; {'finished' if whole else 'the same command goes on from here'}")
    return 0 if whole else 3


if __name__ == "__main__":
    sys.exit(main())
