"""SQuAT against LSQ on a BERT that tells good reviews from bad ones: ``python -m studies.squat``.

MiniLM-L6 is fine-tuned in full precision, and from there by QAT at each width with 8-bit activations: with LSQ, with
SQuAT for as many steps, and at 2 bits with LSQ for twice as many, which costs what SQuAT does. Learning rate and then
rho are chosen for each width, on seed 0 by the validation sentences; accuracy is reported of the test sentences, on the
other seeds. Beforehand, once: ``python -m studies.fetch``. Finished trainings are never run again: run the same
command again to go on.

    <out>/seed<n>/<training>.json    what was measured
    <out>/seed<n>/fp.safetensors     what QAT starts from
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification, logging

from bench.machine import cpu_model, git_state, machines
from qatkernels import QuantConfig, files, quantize_model
from qatkernels.hessian import HessianOperator, sharpness, spectrum
from qatkernels.methods import SQuAT
from qatkernels.methods.schedules import cosine
from qatkernels.trainer import run_folder


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
class Preset:
    """A study.

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


PRESETS = {"cpu": Preset(), "test": Preset((1, 1), lrs=(1e-3,), rhos=(0.05, 0.1), bits=(2,), seeds=(1,), batch=4,
                                           longest=12, flatness=8, lanczos=3, precision="float32")}  # fmt: skip


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
        """Name of its file."""
        if self.bits is None:
            return "fp"
        return f"w{self.bits}-{self.epochs}-{self.lr:g}" + ("" if self.rho is None else f"-squat-{self.rho:g}")


def read(folder: Path, longest: int) -> Split:
    """Return the sentences, without those that are rated 0."""
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


def fit(model: nn.Module, t: Training, p: Preset, train: Sentences) -> tuple[float, float]:
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
                loss.backward()  # type: ignore[no-untyped-call]
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


def flat(model: nn.Module, p: Preset, train: Sentences) -> dict[str, float]:
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


def run(t: Training, p: Preset, folder: Path, out: Path, data: Split) -> dict[str, Any]:
    """Return what a training led to; trained now if it is not there."""
    path = out / f"seed{t.seed}" / f"{t.name}.json"
    if path.exists():
        found: dict[str, Any] = files.read_json(path)
        return found
    return train(t, p, folder, path, data)


def train(t: Training, p: Preset, folder: Path, path: Path, data: Split) -> dict[str, Any]:
    """Train, write the result to a path, and return it."""
    start = path.with_name("fp.safetensors")
    if t.bits is not None and not start.exists():  # its result was made elsewhere
        train(Training(t.seed, None, p.epochs[0], p.fp_lr), p, folder, path.with_name("fp.json"), data)
    model = build(folder, t.seed, t, start).train()
    seconds, loss = fit(model, t, p, data.train)
    model.eval()
    result = {
        **asdict(t), "seconds": round(seconds, 1), "train_loss": loss, "validation": scored(model, data.validation),
        "test": scored(model, data.test),
    }  # fmt: skip
    if t.bits is None:
        if path.exists() and (before := files.read_json(path)["test"]) != result["test"]:
            raise SystemExit(
                f"seed {t.seed} in full precision gives {result['test']} here and gave {before} in the earlier study: "
                "what starts from one cannot be held against the other's; give another --out, no --earlier"
            )
        files.save(start, model.state_dict(), {"seed": t.seed})
    elif t.seed:
        result |= flat(model, p, data.train)
    files.write_json(path, result)
    print(f"seed {t.seed}, {t.name}: {result['test']['accuracy']:.4f} ({seconds:.0f} s)", flush=True)
    return result


def take_over(report: Path, out: Path) -> None:
    """Write the results in a report that was made elsewhere, where there are none yet."""
    names = {field.name for field in fields(Training)}
    for result in files.read_json(report)["trainings"]:
        t = Training(**{name: value for name, value in result.items() if name in names})
        path = out / f"seed{t.seed}" / f"{t.name}.json"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            files.write_json(path, result)


def best(tried: Sequence[Training], trained: Callable[[Training], dict[str, Any]]) -> Training:
    """Return the training that is right about most validation sentences; of two the one with the lower loss."""

    def merit(t: Training) -> tuple[float, float]:
        found = trained(t)["validation"]
        return found["accuracy"], -found["loss"]

    return max(tried, key=merit)


def choose(p: Preset, trained: Callable[[Training], dict[str, Any]]) -> dict[int, Training]:
    """Return what is chosen for each width, as a training of SQuAT's."""
    found = {}
    for bits in p.bits:
        plain = best([Training(0, bits, p.epochs[1], lr) for lr in p.lrs], trained)
        found[bits] = best([replace(plain, rho=rho) for rho in p.rhos], trained)
    return found


def reported(p: Preset, chosen: dict[int, Training]) -> list[Training]:
    """Return what is reported, with LSQ for twice the steps last."""
    squat = [replace(chosen[bits], seed=seed) for bits in p.bits for seed in p.seeds]
    lsq = [replace(t, rho=None) for t in squat]
    once = [t for pair in zip(lsq, squat, strict=True) for t in pair]
    return [*once, *(replace(t, epochs=2 * t.epochs) for t in lsq if t.bits in p.twice)]


def main(argv: Sequence[str] | None = None) -> int:
    """Run or go on with the study."""
    parser = argparse.ArgumentParser(prog="python -m studies.squat", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--preset", choices=PRESETS, default="cpu")
    parser.add_argument("--data", type=Path, default=Path("runs/minilm"), help="folder of studies.fetch")
    parser.add_argument("--out", type=Path, help="working folder (default: runs/squat-<preset>)")
    parser.add_argument("--earlier", type=Path, help="results.json of a study to go on with; none is run again")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (results depend on it in the last bits)")
    options = parser.parse_args(argv)
    if not (options.data / "reviews.tsv").exists():
        parser.error(f"--data {options.data} has no reviews.tsv: python -m studies.fetch --out {options.data}")
    torch.set_num_threads(options.threads)
    p, out = PRESETS[options.preset], options.out or Path("runs") / f"squat-{options.preset}"
    with run_folder.exclusive(out):
        before = [files.read_json(out / "study.json")] if (out / "study.json").exists() else []
        if options.earlier:
            take_over(options.earlier, out)
            before.append(files.read_json(options.earlier)["study"])
        data = read(options.data, p.longest)
        made = {
            "machines": machines(cpu_model(), *before), "git": git_state(),
            "preset": asdict(p), "sentences": {k: len(v.labels) for k, v in data._asdict().items()},
        }  # fmt: skip

        def trained(t: Training) -> dict[str, Any]:
            return run(t, p, options.data, out, data)

        for seed in (0, *p.seeds):
            trained(Training(seed, None, p.epochs[0], p.fp_lr))
        chosen = choose(p, trained)
        made["chosen"] = {str(bits): {"lr": t.lr, "rho": t.rho} for bits, t in chosen.items()}
        files.write_json(out / "study.json", made)
        for t in reported(p, chosen):
            trained(t)
    print(f"{out}; now python -m studies.squat_report --study {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
