"""The loss surface of the demo's models along QAT: spectra of the Hessian at several steps.

Trains the demo in full precision and at 4, 2 and 1 bits, keeps the model at several steps of each, and analyses each of
them on the same text. Pictures need the Ritz values of every spectrum, which are in the work folder only.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

from qatkernels import files
from qatkernels.trainer import TrainConfig, loop, spectra, spectra_report
from qatkernels.trainer.phases import phases

from .results import Case, Figures, Results, Row
from .runner import Session, Study
from .spectra_plot import plot


class Analysis(NamedTuple):
    """How a spectrum is computed: windows of text in the loss, random vectors, Lanczos steps from each, near zero."""

    windows: int
    probes: int
    lanczos: int
    near_zero: float


class Part(NamedTuple):
    """Some of the spectra: of one model, each seed at each width, at these steps of QAT and at its end."""

    model: str
    seeds: tuple[int, ...]
    at: tuple[int, ...]
    analysis: Analysis


@dataclass(frozen=True)
class Size:
    """A size of the study: settings of each model, the widths, and what is analysed."""

    models: Mapping[str, Mapping[str, Any]]
    parts: tuple[Part, ...]
    bits: tuple[float, ...] = (4, 2, 1)


SIZES = {
    "cpu": Size(
        {
            # Half the width, two of three blocks, half the context, and more steps: minutes instead of an hour.
            "small": {"width": 96, "depth": 2, "context": 64, "steps": 1500, "qat_steps": 600, "eval_windows": 64,
                      "precision": "float32"},
            "demo": {},
        },
        (
            Part("small", (0,), (0, 50, 200), Analysis(16, 3, 200, 0.02)),
            Part("small", (1,), (50,), Analysis(16, 3, 200, 0.02)),
            Part("small", (0,), (), Analysis(16, 5, 60, 0.0015)),
            Part("demo", (0,), (), Analysis(8, 3, 120, 0.02)),
        ),
    ),
    "smoke": Size(
        {"small": {"width": 16, "depth": 1, "heads": 2, "context": 16, "batch": 2, "steps": 4, "qat_steps": 4,
                   "eval_windows": 4, "precision": "float32", "device": "cpu"}},
        (Part("small", (0,), (2,), Analysis(2, 2, 6, 0.02)),),
        bits=(4, 1),
    ),
}  # fmt: skip


def settings(session: Session) -> dict[str, Any]:
    """Return what identifies the text."""
    return {"text": session.text_settings(64)}  # the context does not change what the text is


def cases(session: Session) -> Iterator[Case]:
    """Yield the spectra in the order of training: full precision, then each width."""
    for part in session.size.parts:
        for seed in part.seeds:
            for bits in (None, *session.size.bits):
                for step in (None,) if bits is None else (*part.at, None):
                    phase = "fp" if bits is None else f"w{bits:g}"
                    model = phase if step is None else f"{phase}-step-{step:06d}"
                    name = f"{part.model}-{model}-{part.analysis.lanczos}x{part.analysis.probes}"
                    own = {"model": part.model, "bits": bits, "at": step, **part.analysis._asdict()}
                    yield Case(name, seed, own, partial(run, session, part, seed, phase, step, name))


def run(session: Session, part: Part, seed: int, phase: str, step: int | None, name: str) -> Figures:
    """Train what the model needs, if it is not there, and return its spectrum."""
    out = session.work / f"{part.model}-seed{seed}"
    steps = sorted({s for p in session.size.parts if p.model == part.model for s in p.at})
    config = TrainConfig(
        out=str(out), data=session.data, seed=seed, bits=session.size.bits, keep_every=math.gcd(*steps) or None,
        **session.size.models[part.model],
    ).resolved()  # fmt: skip
    file = out / phase / ("model.safetensors" if step is None else f"step-{step:06d}.safetensors")
    if not file.exists():
        needed = [p for p in phases(config) if p.name in ("fp", phase)]
        loop.run_phases(config, session.text(config.shape.context), needed, lambda line: None)
    return spectrum_of(session, file, name, seed, part.analysis, config.device)


def spectrum_of(session: Session, file: Path, name: str, seed: int, analysis: Analysis, device: Any) -> Figures:
    """Return the spectrum of one model, without its Ritz values."""
    config = spectra.SpectrumConfig(
        (str(file),), str(session.work / "spectra" / f"seed{seed}" / name), data=session.data, seed=seed,
        windows=analysis.windows, probes=analysis.probes, steps=analysis.lanczos, near_zero=analysis.near_zero,
        device=device,
    )  # fmt: skip
    figures: Figures = spectra.run(config, lambda line: None)["checkpoints"][0]
    return figures


def report(results: Results, folder: Path) -> str:
    """Draw a picture for each model, seed and analysis whose Ritz values are in the work folder; return the tables."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in results.rows:
        own = row["settings"]
        key = own["model"], row["seed"], *(own[name] for name in Analysis._fields)
        groups.setdefault(key, []).append(row)
    texts = []
    for (model, seed, *analysis), rows in groups.items():
        how = Analysis(*analysis)
        title = f"{model}-seed{seed}-{how.lanczos}x{how.probes}"
        draw(folder / f"{title}.png", folder, rows)
        texts.append(f"{title}\n\n{table(rows, how.near_zero)}")
    return "\n\n".join(texts)


def draw(path: Path, folder: Path, rows: Sequence[Row]) -> None:
    """Draw spectra, if the work folder has the Ritz values of all of them."""
    work = [
        list((folder / "work" / "spectra" / f"seed{row['seed']}" / row["case"] / "ritz").glob("*.json")) for row in rows
    ]
    if all(work):
        plot([files.read_json(found[0]) for found in work], path)


def table(rows: Sequence[Row], near_zero: float) -> str:
    """Return spectra as text."""
    console = Console(file=io.StringIO(), width=180, highlight=False)
    console.print(spectra_report.table({
        "settings": {"near_zero": near_zero}, "checkpoints": [row["figures"] for row in rows],
    }))  # fmt: skip
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines())  # type: ignore[attr-defined]


STUDY = Study("spectra", SIZES, cases, report, settings)
