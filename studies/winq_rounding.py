"""WinQ with float32 weights, with bfloat16 weights, and with bfloat16 weights that are rounded at random.

The code that WinQ's authors released steps bfloat16 weights, which loses small steps. This study asks whether the gain
of resets and noise comes from that: each width, learning rate and kind of weights is trained plainly (``base``), with
``noise``, with three resets (``reset``, at a quarter, a half and three quarters, with two weights), and with ``both``.
All variants of a seed see the same batches. Float32 weights are also trained with StableQAT's gradient (``stable``).

Beside losses it logs the share of weights that a step moves, how many grid spacings weights travel, flips of codes, and
the share of weights whose gradient is masked.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from qatkernels.methods.winq import WinQConfig
from qatkernels.trainer import TrainConfig, models
from qatkernels.trainer.phases import Phase, own_decay, phases, quantized_from
from qatkernels.trainer.report import Log

from . import branches, smollm2, winq
from .observed import ObservedConfig
from .results import Case, Figures
from .runner import Session, Study
from .winq_rounding_report import report

#: Settings of QAT in the folder of the phase in full precision.
_NO_QAT = {"qat_steps": 1, "qat_lr": 0.0, "scale_lr": 0.0, "weights": "float32"}


class Variant(NamedTuple):
    """What is done in addition to plain QAT."""

    noise: bool = False
    reset_weight: float | None = None
    method: str = "qat"


VARIANTS = {
    "base": Variant(),
    "noise": Variant(noise=True, method="winq"),
    "reset-0.4": Variant(False, 0.4, "winq"),
    "reset-0.8": Variant(False, 0.8, "winq"),
    "both-0.4": Variant(True, 0.4, "winq"),
    "both-0.8": Variant(True, 0.8, "winq"),
    "stable": Variant(method="stableqat"),
}
WEIGHTS = ("float32", "bfloat16", "stochastic")
_WINQ = tuple(VARIANTS)[:-1]


class Part(NamedTuple):
    """Some of the trainings: every seed at every width and rate, with all kinds of weights and all variants."""

    seeds: tuple[int, ...]
    bits: tuple[float, ...]
    rates: tuple[float, ...]
    weights: tuple[str, ...]
    variants: tuple[str, ...]
    steps: int


@dataclass(frozen=True)
class Size:
    """A size of the study.

    Attributes:
        config: settings of `qatkernels train`. Scales have a fifth of the learning rate of weights.
        parts: the trainings, in the order in which they run.
        pretrained: train SmolLM2-135M (:mod:`studies.smollm2`) in place of the model of the configuration.
        noise_std: of ``noise`` and ``both``.
    """

    config: Mapping[str, Any]
    parts: tuple[Part, ...]
    pretrained: bool = False
    noise_std: float = 1e-3


#: Settings that the cases have, or a command line.
_OWN = ("out", "data", "seed", "bits", "method", "model", "weights", "qat_steps", "qat_lr", "scale_lr", "stats_every")


def _shared(config: TrainConfig) -> dict[str, Any]:
    return {name: value for name, value in config.settings().items() if name not in _OWN}


_SMALL, _SMOKE = _shared(winq.SIZES["cpu"].config), _shared(winq.SIZES["smoke"].config)
_SMOLLM2 = {
    "steps": 0, "batch": 1, "context": 256, "eval_windows": 16, "eval_every": 10**6, "save_every": 50, "log_every": 10,
    "beta2": 0.99, "schedule": "cosine", "warmup": 0.1, "precision": "bfloat16",
}  # fmt: skip
_SEEDS = (1, 2, 3)
# fmt: off
SIZES = {
    # 0.33 million quantized parameters, 1024 bytes a step, trained from scratch.
    # Two and a half hours on one core.
    "cpu": Size(_SMALL, (
        Part(_SEEDS, (1, 2), (1e-4, 5e-4), WEIGHTS, ("base", "reset-0.4", "both-0.4"), 1200),
        Part(_SEEDS, (2, 3), (5e-4,), WEIGHTS[:1], ("base", "stable"), 1200),
        Part((1,), (1,), (5e-4,), WEIGHTS, _WINQ, 1200),
        Part(_SEEDS, (1, 2), (2e-3,), WEIGHTS[:2], ("base", "reset-0.4", "both-0.4"), 1200),
    )),
    # The whole grid: about 16 hours of one core. Not run yet.
    "cpu-whole": Size(_SMALL, (
        Part(_SEEDS, (1, 1.58, 2, 3), (2e-5, 1e-4, 5e-4, 2e-3), WEIGHTS, _WINQ, 1200),
        Part(_SEEDS, (1, 2), (2e-3,), WEIGHTS[:2], ("base", "reset-0.4", "both-0.4"), 9600),
    )),
    # About an hour on two cores with AMX.
    "smollm2": Size(_SMOLLM2, (
        Part((1,), (2, 1), (2e-4, 2e-5), WEIGHTS, ("base", "both-0.4"), 120),
    ), pretrained=True),
    # Minutes on an H100, several times over: the command goes on where it stopped. Not run yet.
    "gpu": Size({**_SMOLLM2, "batch": 16, "context": 512, "eval_windows": 64, "device": "cuda"}, (
        Part((1,), (2, 1), (2e-5, 2e-4), WEIGHTS, ("base", "both-0.4"), 1200),
        Part((1,), (2, 1), (2e-5, 2e-4), WEIGHTS, _WINQ, 1200),
        Part((1, 2, 3), (1, 1.58, 2, 3), (2e-5, 2e-4), WEIGHTS, _WINQ, 1200),
        Part((1,), (2, 1), (2e-5,), WEIGHTS[:2], ("base", "both-0.4"), 20_000),
    ), pretrained=True),
    "smoke": Size(_SMOKE, (
        Part((1,), (1,), (1e-3,), WEIGHTS, ("base", "both-0.4"), 8),
        Part((1,), (2,), (1e-3,), ("float32",), ("base", "stable"), 8),
    )),
}
# fmt: on


def settings(session: Session) -> dict[str, Any]:
    """Return what all trainings share."""
    size: Size = session.size
    text = {} if size.pretrained else {"text": session.text_settings(size.config["context"])}
    return {"noise_std": size.noise_std, "config": dict(size.config), **text}


def cases(session: Session) -> Iterator[Case]:
    """Yield the trainings, each once."""
    seen = set()
    for part in session.size.parts:
        for seed in part.seeds:
            for bits in part.bits:
                for rate in part.rates:
                    for weights in part.weights:
                        for variant in part.variants:
                            own = {"bits": bits, "steps": part.steps, "rate": rate, "weights": weights,
                                   "variant": variant}  # fmt: skip
                            name = f"w{bits:g}-{part.steps}-{rate:g}-{weights}-{variant}"
                            if (seed, name) not in seen:
                                seen.add((seed, name))
                                yield Case(name, seed, own, partial(train, session, seed, name, own))


def configured(session: Session, seed: int, own: Mapping[str, Any], out: Path) -> TrainConfig:
    """Return the configuration of a training in a folder."""
    size: Size = session.size
    return TrainConfig(
        **size.config, model=str(smollm2.folder(session.work / "model")) if size.pretrained else models.DEMO,
        seed=seed, out=str(out), data=session.data, qat_steps=own["steps"], qat_lr=own["rate"],
        scale_lr=own["rate"] / 5, weights=own["weights"], stats_every=observed_every(own["steps"]),
    ).resolved()  # fmt: skip


def observed_every(steps: int) -> int:
    """Return the steps between two observations: a divisor of a quarter of the steps, where resets are."""
    quarter = steps // 4
    return max(every for every in range(1, max(steps // 40, 1) + 1) if quarter % every == 0)


def phase_of(size: Size, config: TrainConfig, name: str, own: Mapping[str, Any]) -> Phase:
    """Return the QAT of a training. It starts from the end of the seed's phase in full precision."""
    kind, steps = VARIANTS[own["variant"]], own["steps"]
    winq_config = WinQConfig(
        0 if kind.reset_weight is None else steps // 4, kind.reset_weight or 0.0, reset_until=0.8,
        noise_std=size.noise_std if kind.noise else 0.0,
    )  # fmt: skip
    phase = quantized_from(config, own["bits"], steps, phases(config)[0])
    return replace(
        phase, name=name, rate=own_decay(config, steps),
        method=ObservedConfig(kind.method, winq_config, every=observed_every(steps)),
    )  # fmt: skip


def train(session: Session, seed: int, name: str, own: Mapping[str, Any]) -> Figures:
    """Train in full precision if this seed has not been, then quantized; return losses and what was observed."""
    first = configured(session, seed, own, session.work / f"seed{seed}")
    corpus = (
        smollm2.read(first.data, first.shape.context, Path(first.model))
        if session.size.pretrained
        else session.text(first.shape.context)
    )
    start = Path(first.out) / "fp"
    if not (start / models.MARKER).exists():
        # The settings of QAT do not matter here, but a resumed run must have the same.
        branches.run(first.changed(**_NO_QAT), corpus, phases(first)[:1])
    folder = Path(first.out) / name
    config = configured(session, seed, own, folder)
    found = branches.run(config, corpus, [phases(config)[0], phase_of(session.size, config, name, own)], start)
    entries = [e for e in Log(folder / "log.jsonl").entries() if e["phase"] == name]
    shutil.rmtree(folder)  # a model of 0.5 GB, which nothing reads again
    return {
        "loss": round(found["bits_per_byte"], 6),
        "start": round(found["start_bits_per_byte"], 6),
        "seconds": round(found["seconds"], 1),
        "curve": [[e["step"], round(e["held_out"], 6)] for e in entries if "held_out" in e],
        "observed": {
            key: [float(f"{e[logged]:.4g}") for e in entries if logged in e] for key, logged in _logged(entries).items()
        },
        "every": observed_every(own["steps"]),
    }


def _logged(entries: list[dict[str, Any]]) -> dict[str, str]:
    """Return what was observed, by its name without the method's."""
    wanted = ("moved", "travelled", "saturated", "flips", "distance")
    return {key.rpartition("/")[2]: key for e in entries for key in e if key.rpartition("/")[2] in wanted}


STUDY = Study("winq_rounding", SIZES, cases, report, settings)
