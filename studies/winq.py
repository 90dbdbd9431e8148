"""WinQ against plain QAT on a language model trained from scratch.

Every seed is trained once in full precision. From there QAT runs at each width, with and without 8-bit activations:
plain (``base``), with ``noise`` only, with ``reset`` only, and with ``both``. Two variants of our own keep the rate at
its peak for four fifths of the steps: plain (``wsd``), and with one reset half way (``plateau``). All variants of a
seed see the same batches. The period and the weight of the resets are chosen on seed 0, which is not reported.

To share the study among processes run ``--seeds 0`` first. Then copy winq.jsonl into a folder for each other seed, run
``--seeds N --out FOLDER`` there, and join the files with ``cat``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from qatkernels import files
from qatkernels.methods.winq import WinQConfig
from qatkernels.trainer import TrainConfig, loop
from qatkernels.trainer.methods import MethodConfig
from qatkernels.trainer.phases import Phase, own_decay, phases, quantized_from
from qatkernels.trainer.report import Log

from .results import Case, Figures
from .runner import Session, Study
from .winq_report import report


class Resets(NamedTuple):
    """When and how far weights are reset: the period as a share of the steps, and the weight of a reset."""

    period: float
    weight: float


class Variant(NamedTuple):
    """What is done in addition to plain QAT."""

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
    """The trainings on seed 0 that choose the resets of all variants with the same schedule."""

    variant: str
    bits: tuple[float, ...]
    steps: int
    candidates: tuple[Resets, ...]


class Part(NamedTuple):
    """Some of the reported trainings: every seed with every width, activation and variant."""

    seeds: tuple[int, ...]
    bits: tuple[float, ...]
    act_bits: tuple[int | None, ...]
    variants: tuple[str, ...]
    steps: int


@dataclass(frozen=True)
class Size:
    """A size of the study.

    Attributes:
        config: model and training.
        choices: of the resets, one for each schedule that has them.
        parts: what is reported, in the order in which it runs.
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
SIZES = {
    # 0.33 million quantized parameters, 1024 bytes a step.
    "cpu": Size(
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
    "gpu": Size(
        TrainConfig(
            device="cuda", precision="bfloat16", width=768, depth=8, heads=12, context=512, batch=128, steps=8000,
            qat_steps=8000, lr=1e-3, qat_lr=2e-4, eval_every=200, eval_windows=1024, log_every=100, save_every=500,
            schedule="cosine",
        ),
        (Choice("both", (1, 2), 8000, _CANDIDATES), Choice("plateau", (1, 2), 8000, _HALF_WAY)),
        (Part((1, 2, 3), (1, 1.58, 2, 3), (None, 8), (*_PAPER, *_OURS[1:]), 8000),),
    ),
    "smoke": Size(
        TrainConfig(
            device="cpu", precision="float32", width=16, depth=1, heads=1, context=16, batch=4, steps=8, qat_steps=8,
            eval_every=2, eval_windows=8, log_every=2, save_every=4, schedule="cosine",
        ),
        (Choice("both", (1,), 8, _CANDIDATES[:2]), Choice("plateau", (1,), 8, _HALF_WAY)),
        (Part((1, 2), (1,), (None, 8), ("both", *_OURS), 8),),
    ),
}
# fmt: on


def shared(session: Session) -> dict[str, Any]:
    """Return the text and the configuration."""
    config, own = session.size.config, ("out", "data", "seed", "bits", "method")
    return {
        "text": session.text_settings(config.shape.context),
        "config": {name: value for name, value in config.settings().items() if name not in own},
    }


def settings(session: Session) -> dict[str, Any]:
    """Return what all trainings share."""
    return {"noise_std": session.size.noise_std, **shared(session)}


def cases(session: Session) -> Iterator[Case]:
    """Yield the trainings: those that choose the resets, then those that are reported."""
    for choice in session.size.choices:
        for bits in choice.bits:
            yield from tried(session, choice, bits)
    choices = {VARIANTS[choice.variant].schedule: choice for choice in session.size.choices}
    for part in session.size.parts:
        for seed in part.seeds:
            for act_bits in part.act_bits:
                for bits in part.bits:
                    for variant in part.variants:
                        resets = chosen(session, choices[VARIANTS[variant].schedule], bits)
                        yield training(session, seed, bits, act_bits, variant, resets, part.steps)


def tried(session: Session, choice: Choice, bits: float) -> list[Case]:
    """Return the trainings on seed 0 that choose the resets at a width, one for each candidate."""
    return [training(session, 0, bits, None, choice.variant, r, choice.steps) for r in choice.candidates]


def chosen(session: Session, choice: Choice, bits: float) -> Resets:
    """Return the resets with the lowest loss on seed 0, at the nearest of the widths that were tried.

    Raises:
        MissingError: if a training on seed 0 is not finished.
    """
    nearest = min(choice.bits, key=lambda tried_bits: abs(tried_bits - bits))
    losses = [session.results.figures(case.name, 0)["loss"] for case in tried(session, choice, nearest)]
    return min(zip(losses, choice.candidates, strict=True))[1]


def training(
    session: Session, seed: int, bits: float, act_bits: int | None, variant: str, resets: Resets, steps: int
) -> Case:
    """Return one training."""
    every = max(round(resets.period * steps), 1) if VARIANTS[variant].resets else None
    name = f"w{bits:g}{'' if act_bits is None else f'a{act_bits}'}-{steps}-{variant}"
    if every:
        name += f"-{every}-{resets.weight:g}"
    own = {
        "bits": bits, "act_bits": act_bits, "steps": steps, "variant": variant, "reset_every": every,
        "reset_weight": resets.weight if every else None,
    }  # fmt: skip
    return Case(name, seed, own, partial(train, session, seed, name, own))


def phase_of(size: Size, config: TrainConfig, name: str, own: Mapping[str, Any]) -> Phase:
    """Return the QAT of a training. It starts from the end of the seed's phase in full precision."""
    kind, steps = VARIANTS[own["variant"]], own["steps"]
    config = config.changed(qat_steps=steps)
    weight = {} if own["reset_weight"] is None else {"reset_weight": own["reset_weight"]}
    winq = WinQConfig(own["reset_every"] or 0, noise_std=size.noise_std if kind.noise else 0.0, **weight)
    phase = quantized_from(config, own["bits"], steps, phases(config)[0])
    quantization = replace(config.quantization(own["bits"]), act_bits=own["act_bits"])
    return replace(
        phase, name=name, quantization=quantization,
        method=MethodConfig("winq" if kind.noise or kind.resets else "qat", winq),
        rate=own_decay(config.changed(schedule=kind.schedule, cooldown=0.2), steps),
    )  # fmt: skip


def train(session: Session, seed: int, name: str, own: Mapping[str, Any]) -> Figures:
    """Train in full precision if this seed has not been, then quantized; return the losses on held-out text."""
    config = session.size.config.changed(seed=seed, out=str(session.work / f"seed{seed}"), data=session.data).resolved()
    phase, folder = phase_of(session.size, config, name, own), Path(config.out)
    loop.run_phases(config, session.text(config.shape.context), [phases(config)[0], phase], lambda line: None)
    found = files.read_json(folder / name / "phase.json")["result"]
    entries = [e for e in Log(folder / "log.jsonl").entries() if e["phase"] == name and "held_out" in e]
    return {
        "loss": round(found["bits_per_byte"], 6),
        "seconds": round(found["seconds"], 1),
        "curve": [[e["step"], round(e["held_out"], 6)] for e in entries],
    }


STUDY = Study("winq", SIZES, cases, report, settings)
