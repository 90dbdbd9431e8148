"""What decides whether WinQ's resets help: ``python -m studies.winq_why``.

One bit, one seed of the model of :mod:`studies.winq`, no noise unless that is the question. Each question
changes one thing, for plain QAT and for QAT with one reset, half way unless that is the question; ``--preset cpu-long``
asks when, in runs four times as long. Flips and distances to the grid are logged on the way; models around the reset
are kept, and their spectra computed but for the long runs. Finished trainings are never run again: run the same command
again to go on.

    <out>/<start>/<name>/    a phase of `qatkernels.trainer`
    <out>/why.json           a line for each training, with its curves
    <out>/spectra/           of the models around the reset
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from matplotlib.figure import Figure

from bench.machine import cpu_model, git_state, versions
from qatkernels import files
from qatkernels.methods.winq import WinQConfig
from qatkernels.nn import quantized_modules
from qatkernels.plotting import COLOURS, tidy
from qatkernels.trainer import Interrupted, TrainConfig, data, loop, run_folder, spectra
from qatkernels.trainer.methods import MethodConfig
from qatkernels.trainer.phases import Phase, own_decay, phases, quantized_from
from qatkernels.trainer.report import Log

from .winq import PRESETS


class Trial(NamedTuple):
    """One training.

    Attributes:
        question: what it answers.
        at: when the one reset is, as a share of the steps; None for plain QAT.
        weight: the reset's.
        schedule: cosine, or wsd with its decay over the last fifth.
        rate: factor on the peak learning rate.
        noise: standard deviation of the noise.
        start: steps of the training in full precision, as a share of the study's.
    """

    question: str
    at: float | None = None
    weight: float = 0.4
    schedule: str = "cosine"
    rate: float = 1.0
    noise: float = 0.0
    start: float = 1.0

    @property
    def name(self) -> str:
        """Name of its folder, the same for two trials that are the same training."""
        reset = "plain" if self.at is None else f"reset{100 * self.at:g}-{self.weight:g}"
        return (
            f"{self.schedule}-{reset}"
            + (f"-rate{self.rate:g}" if self.rate != 1 else "")
            + (f"-noise{self.noise:g}" if self.noise else "")
        )


#: Two trials follow each other: plain, with the reset. Or one, to be held against the first of all.
TRIALS = (
    Trial("plain"),
    *(Trial("when", at) for at in (0.5, 0.25, 0.75, 0.9)),
    *(Trial("how far", 0.5, weight) for weight in (0.1, 0.2, 0.8)),
    *(Trial("schedule", at, schedule="wsd") for at in (None, 0.5, 0.79)),
    *(Trial("rate", at, rate=4.0) for at in (None, 0.5)),
    *(Trial("start", at, start=0.2) for at in (None, 0.5)),
    *(Trial("noise", noise=noise) for noise in (1e-4, 1e-3)),
)  # fmt: skip
BITS = 1


class Asked(NamedTuple):
    """What a preset runs: the training of `studies.winq`'s, steps of QAT, trials, whether spectra."""

    config: TrainConfig
    steps: int
    trials: tuple[Trial, ...]
    spectra: bool = True


ASKED = {
    "cpu": Asked(PRESETS["cpu"].config, 2400, TRIALS),
    "cpu-long": Asked(PRESETS["cpu"].config, 9600, (
        Trial("plain"), Trial("when", 0.5), Trial("when", 0.25), Trial("when and how far", 0.25, 0.1),
    ), spectra=False),
    "test": Asked(PRESETS["test"].config, 8, (
        Trial("plain"), Trial("when", 0.5), *(t for t in TRIALS if t.question == "schedule"),
    )),
}  # fmt: skip


def configured(preset: str, t: Trial, out: Path, text: str | None) -> TrainConfig:
    """Return the configuration of a trial's folder."""
    config, steps, *_ = ASKED[preset]
    return config.changed(
        seed=1, steps=round(t.start * config.training.steps), qat_steps=steps, stats_every=max(steps // 48, 1),
        keep_every=steps // 4, out=str(out / f"start{t.start:g}"), data=text,
    ).resolved()  # fmt: skip


def phase_of(config: TrainConfig, t: Trial) -> Phase:
    """Return the QAT of a trial."""
    steps = config.training.qat_steps
    phase = quantized_from(config, BITS, steps, phases(config)[0])
    every = round((t.at or 0) * steps)
    method = MethodConfig("winq" if t.at or t.noise else "qat", WinQConfig(
        reset_every=every, reset_weight=t.weight, reset_until=(every + 0.5) / steps, noise_std=t.noise
    ))  # fmt: skip
    schedule = config.changed(schedule=t.schedule, cooldown=0.2)
    return replace(phase, name=t.name, lr=t.rate * phase.lr, rate=own_decay(schedule, steps), method=method)


def crossings(config: TrainConfig, phase: Phase, t: Trial, folder: Path) -> float:
    """Return how many spacings of the grid Adam can move a weight until the reset, half way without one."""
    layers = quantized_modules(spectra.load(folder).model).values()
    spacings = torch.cat([layer.scale.detach().flatten() / layer.grid.steps for layer in layers])
    reset = round((t.at or 0.5) * phase.steps)
    return sum(phase.lr * phase.rate(step) for step in range(reset)) / float(spacings.median())


def study(preset: str, out: Path, text: str | None, deadline: float) -> list[dict[str, Any]] | None:
    """Run what is not finished, and return a line for each trial; None if the deadline came first."""
    lines = []
    for t in ASKED[preset].trials:
        config = configured(preset, t, out, text)
        phase, folder = phase_of(config, t), Path(config.out) / t.name
        if not (folder / "config.json").exists():
            if time.monotonic() > deadline:
                return None
            corpus = data.load(config.data, config.shape.context)
            loop.run_phases(config, corpus, [phases(config)[0], phase], lambda line: None)
            print(f"{t.question}, {t.name}", flush=True)
        entries = [e for e in Log(Path(config.out) / "log.jsonl").entries() if e["phase"] == t.name]
        curves = {
            name: [[e["step"], e[key]] for e in entries for key in e if key.rpartition("/")[2] == name]
            for name in ("held_out", "flips", "distance")
        }
        loss = files.read_json(folder / "config.json")["result"]["bits_per_byte"]
        lines.append({**t._asdict(), "name": t.name, "loss": loss, "crossings": crossings(config, phase, t, folder),
                      "curves": curves})  # fmt: skip
    return lines


def models(preset: str, out: Path, text: str | None) -> list[Path]:
    """Return the models just before and after the reset, and both runs' later ones."""
    plain, reset, *_ = ASKED[preset].trials
    folder = Path(configured(preset, plain, out, text).out)
    steps = [ASKED[preset].steps // 2, ASKED[preset].steps * 3 // 4]
    found = [folder / t.name / f"step-{step:06d}.safetensors" for step in steps for t in (plain, reset)]
    return [*found, folder / plain.name, folder / reset.name]


def draw(path: Path, lines: Sequence[dict[str, Any]]) -> None:
    """Draw the losses and flips of plain QAT and of a reset half way, under each schedule."""
    schedules = [name for name in ("cosine", "wsd") if any(x["schedule"] == name for x in lines)]
    figure = Figure(figsize=(4 * len(schedules), 5.2), layout="constrained")
    for column, schedule in enumerate(schedules):
        own = [x for x in lines if x["name"] in (f"{schedule}-plain", f"{schedule}-reset50-0.4") and x["start"] == 1]
        for row, (key, label, factor) in enumerate(
            (("held_out", "held-out bits per byte", 1), ("flips", "codes flipped since the last point, %", 100))
        ):
            axes = figure.add_subplot(2, len(schedules), len(schedules) * row + column + 1)
            for colour, x in zip(COLOURS, own, strict=False):
                name = "plain" if x["at"] is None else "reset half way"
                steps, values = zip(*x["curves"][key][1:], strict=True)
                axes.plot(steps, [factor * value for value in values], color=colour, label=name, linewidth=1.2)
            axes.set_title(f"{schedule}, 1 bit", fontsize=9)
            tidy(axes)
            if column == 0:
                axes.set_ylabel(label)
            if row == column == 0:
                axes.legend(fontsize=8, frameon=False)
    figure.savefig(path, dpi=150)


def table(lines: Sequence[dict[str, Any]]) -> str:
    """Return the results as Markdown; the difference is to the plain run of the same question, else to the first."""
    rows = ["| question | reset at | weight | crossings | held-out loss | against plain |", "|---|---|---|---|---|---|"]
    plain = lines[0]
    for line in lines:
        same = [x for x in lines if x["question"] == line["question"] and x["at"] is None and not x["noise"]]
        base = (same or [plain])[0]
        setting = {"schedule": line["schedule"], "rate": f"{line['rate']:g}x the rate", "noise": f"{line['noise']:g}",
                   "start": f"after {line['start']:g} of the steps"}.get(line["question"])  # fmt: skip
        rows.append("| " + " | ".join([
            line["question"] + (f": {setting}" if setting else ""),
            "-" if line["at"] is None else f"{100 * line['at']:g} %",
            "-" if line["at"] is None else f"{line['weight']:g}",
            f"{line['crossings']:.1f}", f"{line['loss']:.4f}",
            "" if line is base else f"{line['loss'] - base['loss']:+.4f}",
        ]) + " |")  # fmt: skip
    return "\n".join(rows)


def main(argv: Sequence[str] | None = None) -> int:
    """Run or go on with the study; exit code 3 if something is left."""
    parser = argparse.ArgumentParser(prog="python -m studies.winq_why", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--preset", choices=ASKED, default="cpu")
    parser.add_argument("--out", type=Path, help="working folder (default: runs/winq-why-<preset>)")
    parser.add_argument("--data", help="text to train on; this Python's standard library if not given")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no training after so many minutes")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (results depend on it in the last bits)")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    out = options.out or Path("runs") / f"winq-why-{options.preset}"
    try:
        with run_folder.exclusive(out):
            lines = study(options.preset, out, options.data, time.monotonic() + 60 * options.minutes)
            if lines is None:
                print("the same command goes on from here")
                return 3
            made = {"device": cpu_model(), "threads": options.threads, "versions": versions(), "git": git_state()}
            steps = ASKED[options.preset].steps
            whole = {**made, "preset": options.preset, "bits": BITS, "steps": steps, "trials": lines}
            files.write(out / "why.json", (json.dumps(whole) + "\n").encode())
    except Interrupted as stop:
        print(f"{stop}; the same command goes on from here", file=sys.stderr)
        return 128 + stop.number
    if ASKED[options.preset].spectra:
        small = options.preset == "test"
        spectra.run(spectra.SpectrumConfig(
            tuple(map(str, models(options.preset, out, options.data))), str(out / "spectra"), data=options.data,
            windows=2 if small else 16, probes=1 if small else 2, steps=4 if small else 80, device="cpu",
        ), print)  # fmt: skip
    print(table(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
