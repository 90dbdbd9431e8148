"""SQuAT against LSQ on a BERT that tells good reviews from bad ones.

MiniLM-L6 is fine-tuned in full precision, and from there by QAT at each width with 8-bit activations: with LSQ, with
SQuAT for as many steps, and at 2 bits with LSQ for twice as many, which costs what SQuAT does. The learning rate and
then rho are chosen for each width on seed 0, by the validation sentences. Accuracy is reported of the test sentences,
on the other seeds. Model and sentences are downloaded once: ``python -m studies.fetch``.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from qatkernels import QuantConfig, files, quantize_model
from qatkernels.hessian import HessianOperator, sharpness, spectrum
from qatkernels.methods import SQuAT
from qatkernels.methods.schedules import cosine

from .results import Case, Figures, MissingError, StudyError
from .runner import Session, Study
from .squat_report import merit, report


class Sentences(NamedTuple):
    """Tokens of each sentence, and whether its rating is positive."""

    tokens: list[list[int]]
    labels: list[int]


class Split(NamedTuple):
    """Sentences by the last digit of their number: 0 and 1 test, 2 validation, the rest training."""

    train: Sentences
    validation: Sentences
    test: Sentences


@dataclass(frozen=True)
class Size:
    """A size of the study.

    Attributes:
        epochs: of fine-tuning, and of QAT.
        fp_lr: peak learning rate of fine-tuning.
        lrs: learning rates of QAT to choose from.
        rhos: radii to choose from.
        twice: widths at which LSQ also trains for twice the steps.
        longest: tokens that a sentence is cut to.
        flatness: training sentences that sharpness and the largest eigenvalue are measured on.
        lanczos: Lanczos steps.
    """

    epochs: tuple[int, int] = (3, 1)
    fp_lr: float = 5e-5
    lrs: tuple[float, ...] = (1e-4, 2e-4, 4e-4)
    rhos: tuple[float, ...] = (0.002, 0.01, 0.05)
    bits: tuple[int, ...] = (2, 3, 4)
    twice: tuple[int, ...] = (2,)
    seeds: tuple[int, ...] = (1, 2, 3)
    batch: int = 32
    longest: int = 48
    flatness: int = 32
    lanczos: int = 10
    warmup: float = 0.1
    weight_decay: float = 0.01
    clip: float = 1.0
    precision: str = "bfloat16"


SIZES = {"cpu": Size(), "smoke": Size((1, 1), lrs=(1e-3,), rhos=(0.05, 0.1), bits=(2,), seeds=(1,), batch=4,
                                      longest=12, flatness=8, lanczos=3, precision="float32")}  # fmt: skip
#: Attributes of a size that say which cases there are. The others are settings that all cases share.
_CASES = ("epochs", "fp_lr", "lrs", "rhos", "bits", "twice", "seeds")


@dataclass(frozen=True)
class Training:
    """One training; ``bits`` None is the fine-tuning, ``rho`` None is LSQ."""

    seed: int
    bits: int | None
    epochs: int
    lr: float
    rho: float | None = None

    @property
    def name(self) -> str:
        """Name of the case."""
        if self.bits is None:
            return "fp"
        return f"w{self.bits}-{self.epochs}-{self.lr:g}" + ("" if self.rho is None else f"-squat-{self.rho:g}")


def read(folder: Path, longest: int) -> Split:
    """Return the sentences, without those that are rated 0."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    parts: tuple[list[tuple[str, int]], ...] = ([], [], [])
    for line in (folder / "reviews.tsv").read_text(encoding="utf-8").splitlines():
        number, rating, text = line.split("\t")
        if float(rating):
            parts[{"0": 2, "1": 2, "2": 1}.get(number[-1], 0)].append((text, int(float(rating) > 0)))
    return Split(*(
        Sentences(tokenizer([x for x, _ in part], truncation=True, max_length=longest)["input_ids"],
                  [y for _, y in part]) for part in parts
    ))  # fmt: skip


def padded(sentences: Sentences, picked: Sequence[int]) -> dict[str, Tensor]:
    """Return a batch as a BERT takes it."""
    rows = [torch.tensor(sentences.tokens[i]) for i in picked]
    tokens = nn.utils.rnn.pad_sequence(rows, batch_first=True)
    mask = nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    return {"input_ids": tokens, "attention_mask": mask, "labels": torch.tensor([sentences.labels[i] for i in picked])}


def batches(sentences: Sentences, size: int, seed: int) -> Iterator[dict[str, Tensor]]:
    """Yield an epoch in random order; sentences of similar length meet, within sixteen batches."""
    draw = torch.Generator().manual_seed(seed)
    found = []
    for chunk in torch.randperm(len(sentences.labels), generator=draw).split(16 * size):
        order = sorted(chunk.tolist(), key=lambda i: len(sentences.tokens[i]))
        found += [order[i : i + size] for i in range(0, len(order), size)]
    for i in torch.randperm(len(found), generator=draw).tolist():
        yield padded(sentences, found[i])


def in_order(sentences: Sentences, size: int) -> Iterator[dict[str, Tensor]]:
    """Yield all sentences by length."""
    order = sorted(range(len(sentences.labels)), key=lambda i: len(sentences.tokens[i]))
    for i in range(0, len(order), size):
        yield padded(sentences, order[i : i + size])


def build(folder: Path, seed: int, t: Training, start: Path) -> nn.Module:
    """Return the model that a training starts with; embeddings are frozen, and stay in full precision."""
    from transformers import BertConfig, BertForSequenceClassification, logging

    torch.manual_seed(seed)
    config = BertConfig.from_pretrained(folder / "model", num_labels=2, attn_implementation="eager")
    logging.set_verbosity_error()  # that the classifier is new
    model: nn.Module = BertForSequenceClassification.from_pretrained(folder / "model", config=config)
    model.bert.embeddings.requires_grad_(False)  # type: ignore[union-attr]
    if t.bits is not None:
        tensors, _ = files.load(start)
        model.load_state_dict(tensors)
        quantize_model(model, QuantConfig(t.bits, "lsq", act_bits=8), exclude="classifier")
    return model


def fit(model: nn.Module, t: Training, p: Size, train: Sentences) -> tuple[float, float]:
    """Train, and return the seconds and the last epoch's mean loss."""
    groups: dict[float, list[Tensor]] = {p.weight_decay: [], 0.0: []}
    for parameter in model.parameters():
        if parameter.requires_grad:
            groups[p.weight_decay if parameter.ndim == 2 else 0.0].append(parameter)
    optimizer = torch.optim.AdamW(
        [{"params": params, "weight_decay": decay} for decay, params in groups.items()], lr=t.lr, fused=True
    )
    squat = None if t.rho is None else SQuAT(model, optimizer, rho=t.rho)
    steps = t.epochs * -(-len(train.labels) // p.batch)
    warmup = round(p.warmup * steps)
    began, step, total = time.perf_counter(), 0, 0.0
    for epoch in range(t.epochs):
        total = 0.0
        for batch in batches(train, p.batch, 1000 * t.seed + epoch):
            for group in optimizer.param_groups:
                group["lr"] = t.lr * cosine(step, steps, warmup)

            def closure(batch: dict[str, Tensor] = batch) -> Tensor:
                optimizer.zero_grad()
                with torch.autocast("cpu", torch.bfloat16, enabled=p.precision == "bfloat16"):
                    logits = model(batch["input_ids"], batch["attention_mask"]).logits
                loss = nn.functional.cross_entropy(logits.float(), batch["labels"])
                loss.backward()
                return loss

            loss = closure() if squat is None else squat.gradient(closure)
            nn.utils.clip_grad_norm_(model.parameters(), p.clip)
            optimizer.step()
            if squat is not None:
                squat.after_step()
            total, step = total + loss.item(), step + 1
    return time.perf_counter() - began, total * t.epochs / steps


@torch.no_grad()
def scored(model: nn.Module, sentences: Sentences) -> dict[str, float]:
    """Return accuracy and mean loss."""
    right = loss = 0.0
    for batch in in_order(sentences, 64):
        logits = model(batch["input_ids"], batch["attention_mask"]).logits
        right += (logits.argmax(1) == batch["labels"]).sum().item()
        loss += nn.functional.cross_entropy(logits, batch["labels"], reduction="sum").item()
    return {"accuracy": right / len(sentences.labels), "loss": loss / len(sentences.labels)}


def flat(model: nn.Module, p: Size, train: Sentences) -> dict[str, float]:
    """Return sharpness and the largest eigenvalue at the quantized weights, on the first training sentences.

    The eigenvalue is the largest Ritz value of a Lanczos process: from below, and close, since it is an outlier.
    """
    batch = padded(train, range(p.flatness))

    def loss_of(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        logits = model(batch["input_ids"], batch["attention_mask"]).logits
        return nn.functional.cross_entropy(logits, batch["labels"])

    def rise(rho: float) -> float:
        return sharpness(model, lambda: loss_of(model, batch), rho, target="quantized").value

    found = spectrum(HessianOperator(model, loss_of, [batch]), probes=1, steps=p.lanczos)
    return {"sharpness": rise(0.05), "sharpness at 0.5": rise(0.5), "lambda_max": found.lambda_max}


def folder_of(session: Session) -> Path:
    """Return the folder with model and sentences.

    Raises:
        StudyError: if they are not there.
    """
    folder = Path(session.data or "runs/minilm")
    if not (folder / "reviews.tsv").exists():
        raise StudyError(f"--data {folder} has no reviews.tsv; run python -m studies.fetch --out {folder} first")
    return folder


def settings(session: Session) -> dict[str, Any]:
    """Return what all trainings share, with how many sentences there are."""
    p: Size = session.size
    return {
        "preset": {name: value for name, value in asdict(p).items() if name not in _CASES},
        "sentences": {k: len(v.labels) for k, v in read(folder_of(session), p.longest)._asdict().items()},
    }


def cases(session: Session) -> Iterator[Case]:
    """Yield the fine-tunings, what chooses learning rate and rho on seed 0, and what is reported."""
    p: Size = session.size
    data = cache(partial(read, folder_of(session), p.longest))  # read by the first case that trains

    def case(t: Training) -> Case:
        own = {"bits": t.bits, "epochs": t.epochs, "lr": t.lr, "rho": t.rho}
        return Case(t.name, t.seed, own, partial(train, session, t, data))

    for seed in (0, *p.seeds):
        yield case(Training(seed, None, p.epochs[0], p.fp_lr))
    chosen = []
    for bits in p.bits:
        rates = [Training(0, bits, p.epochs[1], lr) for lr in p.lrs]
        yield from map(case, rates)
        plain = best(session, rates)
        radii = [replace(plain, rho=rho) for rho in p.rhos]
        yield from map(case, radii)
        chosen.append(best(session, radii))
    for t in chosen:
        for seed in p.seeds:
            yield case(replace(t, seed=seed, rho=None))
            yield case(replace(t, seed=seed))
    for t in chosen:
        if t.bits in p.twice:
            yield from (case(replace(t, seed=seed, rho=None, epochs=2 * t.epochs)) for seed in p.seeds)


def best(session: Session, tried: Sequence[Training]) -> Training:
    """Return the training with the most merit.

    Raises:
        MissingError: if one is not finished.
    """
    return max(tried, key=lambda t: merit(session.results.figures(t.name, t.seed)))


def train(session: Session, t: Training, data: Callable[[], Split]) -> Figures:
    """Train, and return losses, accuracies and, of what is reported, how flat the minimum is."""
    p: Size = session.size
    start = session.work / f"seed{t.seed}" / "fp.safetensors"
    if t.bits is not None and not start.exists():
        _tune_again(session, t.seed, data)
    model = build(folder_of(session), t.seed, t, start).train()
    seconds, loss = fit(model, t, p, data().train)
    model.eval()
    figures: Figures = {
        "seconds": round(seconds, 1), "train_loss": loss, "validation": scored(model, data().validation),
        "test": scored(model, data().test),
    }  # fmt: skip
    if t.bits is None:
        files.save(start, model.state_dict(), {"seed": t.seed})
    elif t.seed:
        figures |= flat(model, p, data().train)
    return figures


def _tune_again(session: Session, seed: int, data: Callable[[], Split]) -> None:
    """Fine-tune a seed whose results were made elsewhere, so that its model is not here.

    Raises:
        StudyError: if that gives another model. QAT from it cannot be compared with QAT from the other.
    """
    p: Size = session.size
    t = Training(seed, None, p.epochs[0], p.fp_lr)
    now = train(session, t, data)["test"]
    try:
        before = session.results.figures(t.name, seed)["test"]
    except MissingError:
        return
    if now != before:
        (session.work / f"seed{seed}" / "fp.safetensors").unlink()
        raise StudyError(
            f"seed {seed} in full precision gives {now} here, and {before} in {session.results.path}; QAT from the two "
            "cannot be compared: give another --out"
        )


STUDY = Study(
    "squat", SIZES, cases, report, settings, data="folder that studies.fetch downloaded to (default: runs/minilm)"
)
