"""Memory and gain of LoRA adapters over a packed model, beside bitsandbytes and bfloat16.

The model and the text are those of :mod:`studies.smollm2`. Its linear layers but the head are frozen: in bfloat16, as
packed codes with a scale for every 32 weights, or as bitsandbytes' NF4, where that package is installed. Scales have
the smallest error of the weights; nothing is trained before the adapters. LoRA of rank 8 on every frozen layer is then
trained on the text. Everything else is bfloat16, adapters and their moments float32.

Each case runs in a process of its own, because memory is measured of processes. It is counted from where the process
stands before it loads the model: ``loaded_bytes`` is what remains when the model is ready, ``peak_bytes`` the most that
a training step takes, activations included.
"""

from __future__ import annotations

import gc
import importlib.util
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bench.memory import in_use, peak
from qatkernels import QuantConfig, pack_model, quantize_model
from qatkernels.nn import model_bytes

from .initial_scales import perplexity, shown
from .processes import in_own_process
from .results import Case, Figures, Results
from .runner import Session, Study
from .smollm2 import folder, read

CPU = torch.device("cpu")
TITLES = {
    "bfloat16": "bfloat16", "w4": "packed, 4 bits", "w2": "packed, 2 bits", "nf4": "bitsandbytes, NF4 in blocks of 64",
}  # fmt: skip


@dataclass(frozen=True)
class Size:
    """A size of the study.

    Attributes:
        context: tokens of a window.
        batch: windows of a step.
        steps: of training.
        windows: held-out windows that are read.
        lr: learning rate of the adapters; it falls to zero linearly.
        rank: of the adapters.
        names: which of ``TITLES``.
        tiny: a random model of two small layers and bytes as tokens, in place of the real one.
    """

    context: int = 256
    batch: int = 2
    steps: int = 60
    windows: int = 8
    lr: float = 1e-3
    rank: int = 8
    names: tuple[str, ...] = tuple(TITLES)
    tiny: bool = False


SIZES = {"cpu": Size(), "smoke": Size(context=32, steps=3, windows=2, names=("bfloat16", "w2"), tiny=True)}


def settings(session: Session) -> Mapping[str, Any]:
    """Return what all cases share."""
    return {name: value for name, value in asdict(session.size).items() if name not in ("names", "tiny")}


def cases(session: Session) -> Iterator[Case]:
    """Yield the ways to hold the frozen weights; bitsandbytes only where it is installed."""
    for name in session.size.names:
        if name != "nf4" or importlib.util.find_spec("bitsandbytes"):
            yield Case(name, 0, {"base": name}, partial(run, session, name))


def run(session: Session, base: str) -> Figures:
    """Train adapters over a base in a process of its own, and return the figures."""
    model = folder(session.work / "model", session.size.tiny)
    found: Figures = in_own_process(train, session.size, base, session.data, model)
    return found


def train(size: Size, base: str, text: str | None, path: Path) -> Figures:
    """Load, freeze and train; return bytes, seconds of a step, and perplexities."""
    import peft
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    corpus = read(text, size.context, path)
    held_out = corpus.evaluation(size.windows, size.context)
    before = in_use(CPU)
    model = frozen(AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).eval(), base)
    gc.collect()
    found: Figures = {"model_bytes": model_bytes(model), "loaded_bytes": in_use(CPU) - before}
    found["rounded"] = perplexity(model, held_out)
    config = peft.LoraConfig(
        r=size.rank, lora_alpha=2 * size.rank, target_modules="all-linear", exclude_modules=["lm_head"]
    )
    adapted = peft.get_peft_model(model, config)
    trained = [p for p in adapted.parameters() if p.requires_grad]
    found["adapter_parameters"] = sum(p.numel() for p in trained)
    optimizer = torch.optim.AdamW(trained, lr=size.lr)

    def step(rate: float) -> None:
        for group in optimizer.param_groups:
            group["lr"] = rate
        ids = corpus.batch(size.batch, size.context)
        optimizer.zero_grad()
        logits = adapted(input_ids=ids[:, :-1]).logits
        nn.functional.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten()).backward()
        optimizer.step()

    adapted.train()
    step(size.lr)  # makes the moments, and whatever is made once
    found["peak_bytes"] = peak(partial(step, size.lr), CPU, since=before)
    began = time.perf_counter()
    for i in range(2, size.steps):
        step(size.lr * (1 - i / size.steps))
    found["seconds_per_step"] = (time.perf_counter() - began) / max(size.steps - 2, 1)
    found["trained"] = perplexity(adapted.eval(), held_out)
    return found


def frozen(model: nn.Module, base: str) -> nn.Module:
    """Return the model with its linear layers, but the head, held as the case says."""
    if base in ("w4", "w2"):
        config = QuantConfig(int(base[1:]), group_size=32, scale_init="mse")
        model = pack_model(quantize_model(model, config, warn_below=0))
    elif base == "nf4":
        _to_nf4(model)
    return model.requires_grad_(False)


def _to_nf4(model: nn.Module) -> None:
    """Replace linear layers but the head by bitsandbytes' 4-bit layers, in place."""
    import bitsandbytes as bnb

    layers = [(name, module) for name, module in model.named_modules()
              if isinstance(module, nn.Linear) and not name.endswith("lm_head")]  # fmt: skip
    for name, layer in layers:
        own = bnb.nn.Linear4bit(
            layer.in_features, layer.out_features, layer.bias is not None, torch.bfloat16, quant_type="nf4"
        )
        own.load_state_dict(layer.state_dict())
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, own.to("cpu"))


def report(results: Results, out: Path) -> str:
    """Return the table."""
    lines = [
        "| frozen weights | model, MB | process with it, MB | in a training step, MB | perplexity before | after |",
        "|---|---|---|---|---|---|",
    ]
    for row in results.rows:
        found = row["figures"]
        cells = [_mega(found[name]) for name in ("model_bytes", "loaded_bytes", "peak_bytes")]
        cells += [shown(found["rounded"]), shown(found["trained"])]
        lines.append(f"| {TITLES[row['case']]} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _mega(value: int | None) -> str:
    return "-" if value is None else f"{value * 1e-6:.0f}"


STUDY = Study("adapters", SIZES, cases, report, settings)
