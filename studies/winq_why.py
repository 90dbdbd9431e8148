"""What decides whether WinQ's resets help.

One bit, one seed of the model of :mod:`studies.winq`, no noise unless that is the question. Each question changes one
thing, for plain QAT and for QAT with one reset. The reset is half way unless that is the question. Runs four times as
long ask again when to reset. Flips and distances to the grid are logged during training. Spectra are computed of the
models before and after the reset, but not for the long runs.

Cases are called by the steps of QAT (``--only '2400-*'``).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from matplotlib.figure import Figure

from qatkernels import files
from qatkernels.methods.winq import WinQConfig
from qatkernels.nn import quantized_modules
from qatkernels.plotting import COLOURS, tidy
from qatkernels.trainer import TrainConfig, loop, spectra
from qatkernels.trainer.methods import MethodConfig
from qatkernels.trainer.phases import Phase, own_decay, phases, quantized_from
from qatkernels.trainer.report import Log

from . import winq
from .results import Case, Figures, Results
from .runner import Session, Study
from .spectra import Analysis, spectrum_of
from .spectra import table as spectra_table


class Trial(NamedTuple):
    """One training, which changes one thing.

    Attributes:
        question: the one that it answers.
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
        """Name of its phase, the same for two trials that are the same training."""
        reset = "plain" if self.at is None else f"reset{100 * self.at:g}-{self.weight:g}"
        return (
            f"{self.schedule}-{reset}"
            + (f"-rate{self.rate:g}" if self.rate != 1 else "")
            + (f"-noise{self.noise:g}" if self.noise else "")
        )

    @property
    def label(self) -> str:
        """The name, with the start where it is another."""
        return self.name + (f"-start{self.start:g}" if self.start != 1 else "")


#: A question has a plain trial and trials with a reset. One without a plain trial is compared with the very first.
TRIALS = (
    Trial("plain"),
    *(Trial("when", at) for at in (0.5, 0.25, 0.75, 0.9)),
    *(Trial("how far", 0.5, weight) for weight in (0.1, 0.2, 0.8)),
    *(Trial("schedule", at, schedule="wsd") for at in (None, 0.5, 0.79)),
    *(Trial("rate", at, rate=4.0) for at in (None, 0.5)),
    *(Trial("start", at, start=0.2) for at in (None, 0.5)),
    *(Trial("noise", noise=noise) for noise in (1e-4, 1e-3)),
)  # fmt: skip
BITS, SEED = 1, 1


class Asked(NamedTuple):
    """What a preset runs: the training of `studies.winq`'s, steps of QAT, trials, whether spectra."""

    config: TrainConfig
    steps: int
    trials: tuple[Trial, ...]
    spectra: bool = True


class Part(NamedTuple):
    """Trials of the same length, and how spectra are computed of the first two; None for no spectra."""

    steps: int
    trials: tuple[Trial, ...]
    analysis: Analysis | None = None


@dataclass(frozen=True)
class Size:
    """A size of the study; the configuration is that of :mod:`studies.winq`."""

    config: TrainConfig
    parts: tuple[Part, ...]


_LONG = (Trial("plain"), Trial("when", 0.5), Trial("when", 0.25), Trial("when and how far", 0.25, 0.1))
_FEW = (Trial("plain"), Trial("when", 0.5), *(t for t in TRIALS if t.question == "schedule"))
SIZES = {
    "cpu": Size(winq.SIZES["cpu"].config, (Part(2400, TRIALS, Analysis(16, 2, 80, 0.0015)), Part(9600, _LONG))),
    "smoke": Size(winq.SIZES["smoke"].config, (Part(8, _FEW, Analysis(2, 1, 4, 0.0015)),)),
}


def cases(session: Session) -> Iterator[Case]:
    """Yield the trials of each length, then the spectra of its first two."""
    for part in session.size.parts:
        for t in part.trials:
            yield Case(f"{part.steps}-{t.label}", SEED, {"steps": part.steps, "name": t.name, **t._asdict()},
                       partial(train, session, part.steps, t))  # fmt: skip
        if part.analysis is None:
            continue
        for step in (part.steps // 2, part.steps * 3 // 4, None):
            for t in part.trials[:2]:
                name = f"{part.steps}-spectrum-{t.name}" + ("" if step is None else f"-step-{step:06d}")
                own = {"steps": part.steps, "trial": t.name, "at": step, **part.analysis._asdict()}
                yield Case(name, SEED, own, partial(analysed, session, part, t, step, name))


def configured(session: Session, steps: int, t: Trial) -> TrainConfig:
    """Return the configuration of a trial. Trials of equal length and start share a folder, and what it starts from."""
    config: TrainConfig = session.size.config
    return config.changed(
        seed=SEED, steps=round(t.start * config.training.steps), qat_steps=steps, stats_every=max(steps // 48, 1),
        keep_every=steps // 4, out=str(session.work / f"{steps}-start{t.start:g}"), data=session.data,
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


def train(session: Session, steps: int, t: Trial) -> Figures:
    """Train, and return the final loss and the curves of loss, flips and distance to the grid."""
    config = configured(session, steps, t)
    phase, out = phase_of(config, t), Path(config.out)
    loop.run_phases(config, session.text(config.shape.context), [phases(config)[0], phase], lambda line: None)
    entries = [e for e in Log(out / "log.jsonl").entries() if e["phase"] == t.name]
    curves = {
        name: [[e["step"], e[key]] for e in entries for key in e if key.rpartition("/")[2] == name]
        for name in ("held_out", "flips", "distance")
    }
    loss = files.read_json(out / t.name / "phase.json")["result"]["bits_per_byte"]
    return {"loss": loss, "crossings": crossings(config, phase, t, out / t.name), "curves": curves}


def crossings(config: TrainConfig, phase: Phase, t: Trial, folder: Path) -> float:
    """Return how many grid spacings Adam can move a weight before the reset, or in the first half without one."""
    layers = quantized_modules(spectra.load(folder).model).values()
    spacings = torch.cat([layer.scale.detach().flatten() / layer.grid.steps for layer in layers])
    reset = round((t.at or 0.5) * phase.steps)
    return sum(phase.lr * phase.rate(step) for step in range(reset)) / float(spacings.median())


def analysed(session: Session, part: Part, t: Trial, step: int | None, name: str) -> Figures:
    """Return the spectrum of a trial's model at a step, or at its end."""
    assert part.analysis is not None
    folder = Path(configured(session, part.steps, t).out) / t.name
    file = folder / ("model.safetensors" if step is None else f"step-{step:06d}.safetensors")
    if not file.exists():
        train(session, part.steps, t)
    return spectrum_of(session, file, name, 0, part.analysis, session.size.config.device)


def report(results: Results, folder: Path) -> str:
    """Draw why-<steps>.png for each length, and return the tables of trials and spectra."""
    texts = []
    for steps in sorted({row["settings"]["steps"] for row in results.rows}):
        rows = [row for row in results.rows if row["settings"]["steps"] == steps]
        lines = [row["settings"] | row["figures"] for row in rows if "question" in row["settings"]]
        if lines:
            draw(folder / f"why-{steps}.png", lines)
            texts.append(f"{steps} steps of QAT\n\n{table(lines)}")
        if spectra_rows := [row for row in rows if "trial" in row["settings"]]:
            shown = spectra_table(spectra_rows, spectra_rows[0]["settings"]["near_zero"])
            texts.append(f"```text\n{shown.strip()}\n```")
    return "\n\n".join(texts)


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


STUDY = Study("winq_why", SIZES, cases, report, winq.shared)
