"""How much of a real model is left by rounding to 4, 3 and 2 bits, by the way in which scales begin.

The model and the text are those of :mod:`studies.smollm2`. Each case quantizes the linear layers with one scale for
every 32 features, and reads held-out windows, before any training. "activation" sees windows of the training text.
Perplexities are per token; each window is read without what comes before it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

import qatkernels as qk
from qatkernels.nn import calibrate
from qatkernels.trainer import data

from .results import Case, Figures, Results
from .runner import Session, Study
from .smollm2 import folder, read

INITS = ("max", "mean", "lsq", "mse", "activation")


@dataclass(frozen=True)
class Size:
    """A size of the study.

    Attributes:
        context: tokens of a window.
        windows: held-out windows that are read.
        calibration: windows of the training text that "activation" sees.
        bits: bit widths.
        group_size: features that share a scale.
        tiny: a random model of two small layers and bytes as tokens, in place of the real one.
    """

    context: int = 256
    windows: int = 8
    calibration: int = 8
    bits: tuple[int, ...] = (4, 3, 2)
    group_size: int = 32
    tiny: bool = False


SIZES = {"cpu": Size(), "smoke": Size(context=32, windows=2, calibration=2, bits=(2,), tiny=True)}


def cases(session: Session) -> Iterator[Case]:
    """Yield the model in full precision, then each width with each way to begin."""
    size: Size = session.size
    yield Case("float", 0, {"bits": None}, partial(full_precision, session))
    for bits in size.bits:
        for init in INITS:
            yield Case(f"w{bits}-{init}", 0, {"bits": bits, "scale_init": init}, partial(rounded, session, bits, init))


def settings(session: Session) -> Mapping[str, Any]:
    """Return what all cases share."""
    size: Size = session.size
    names = ("context", "windows", "calibration", "group_size")
    return {name: getattr(size, name) for name in names}


def full_precision(session: Session) -> Figures:
    """Return the perplexity of the model in full precision."""
    model, corpus = _model(session), _corpus(session)
    return {"perplexity": perplexity(model, corpus.evaluation(session.size.windows, session.size.context))}


def rounded(session: Session, bits: int, init: str) -> Figures:
    """Return the perplexity of the quantized model, and the seconds that its scales took."""
    size: Size = session.size
    model, corpus = _model(session), _corpus(session)
    began = time.perf_counter()
    config = qk.QuantConfig(bits, group_size=size.group_size, scale_init=init)
    qk.quantize_model(model, config, warn_below=0)
    if init == "activation":
        torch.manual_seed(0)
        windows = corpus.batch(size.calibration, size.context)
        calibrate(model, batches=windows[:, :-1].split(1))
    seconds = time.perf_counter() - began
    held_out = corpus.evaluation(size.windows, size.context)
    return {"perplexity": perplexity(model, held_out), "seconds": seconds}


def _model(session: Session) -> Any:
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(
        folder(session.work / "model", session.size.tiny), dtype=torch.float32
    ).eval()


def _corpus(session: Session) -> data.Corpus:
    return read(session.data, session.size.context, folder(session.work / "model", session.size.tiny))


@torch.no_grad()
def perplexity(model: Any, windows: torch.Tensor) -> float:
    """Return the perplexity of a model on windows ``[count, context + 1]``."""
    logits = torch.cat([model(input_ids=window[None, :-1]).logits.float() for window in windows])
    return float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten()).exp())


def report(results: Results, out: Path) -> str:
    """Return a table of what is finished: a row for each width, a column for each way to begin."""
    figures = {row["case"]: row["figures"]["perplexity"] for row in results.rows}
    bits = sorted({row["settings"]["bits"] for row in results.rows if row["settings"]["bits"]}, reverse=True)
    lines = ["| bits | " + " | ".join(f'`"{init}"`' for init in INITS) + " |", "|---|" + "---|" * len(INITS)]
    for width in bits:
        cells = [shown(figures.get(f"w{width}-{init}")) for init in INITS]
        lines.append(f"| {width} | {' | '.join(cells)} |")
    if "float" in figures:
        lines.append(f"| full precision | {shown(figures['float'])} |{' |' * (len(INITS) - 1)}")
    return "\n".join(lines)


def shown(value: float | None) -> str:
    """Return a perplexity as tables show it."""
    return "" if value is None else f"{value:,.2f}" if value < 1000 else f"{value:,.0f}"


STUDY = Study("initial_scales", SIZES, cases, report, settings)
