"""The reference training loop: full precision first, then quantization-aware training from it at each bit width.

Everything a step needs is a function of the configuration and the step number: the learning rate, the batch, any
random draw. A checkpoint is therefore the model, the optimizer's moments and one integer, and a run that was killed and
started again ends with the same weights, bit for bit on a CPU (same machine, same number of threads), as one that was
not.

    out/run.json          the configuration; another one is refused here
    out/log.jsonl         one line for each logged step
    out/<phase>/          fp, then w4, w2, w1.58, w1 (phases.py): the last states while it trains (checkpoints.py),
                          then model.safetensors and, last of all, config.json;
                          step-<n>.safetensors, its model at every keep_every-th step before
    out/report.json       the table and the curves, also as curves.png
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..dtensor import local_part, whole
from ..nn.activation import scales_of
from ..nn.floor import floor_message
from . import checkpoints, data, models, report, run_folder, saving
from .build import build_model, build_optimizer
from .config import ConfigError, TrainConfig
from .display import TrainingDisplay
from .guard import DivergedError, Guard, origin
from .methods import QAT
from .parallel import Processes, joined
from .phases import Phase, phases
from .signals import Stop
from .state import Run, Training

_ALONE = Processes()


def train(config: TrainConfig, *, restart: bool = False, say: Callable[[str], None] | None = None) -> dict[str, Any]:
    """Train, or go on with what an earlier call with the same ``out`` left. Sets torch's seed.

    Args:
        config: the configuration.
        restart: delete what ``config.out`` holds of an earlier run first.
        say: receives lines of text about the progress; a progress bar on the terminal if None.

    Returns:
        The report, as it is written to ``report.json``.

    Raises:
        ConfigError: if a setting or model cannot be used here, or differs from the run that is being resumed.
        DataError: if the text cannot be used.
        CheckpointError: if ``out`` cannot be written to, is in use, or holds a damaged checkpoint.
        DivergedError: if the loss is not finite.
        Interrupted: on SIGINT or SIGTERM, after a checkpoint.
    """
    config = config.resolved()
    with joined(config.parallel, config.device) as group:
        corpus = data.load(config.data, config.shape.context, models.tokenizer(config.model))
        out, plan = Path(config.out), phases(config)
        with run_folder.exclusive(out) if group.first else contextlib.nullcontext():
            if restart and group.first:
                run_folder.remove_run(out)
            results, log = run_phases(config, corpus, plan, say, group)
            made = report.write(out, config.settings(), corpus, results, log) if group.first else {}
            found: dict[str, Any] = group.gathered(made)[0]
            return found


def run_phases(
    config: TrainConfig, corpus: data.Corpus, plan: list[Phase], say: Callable[[str], None] | None = None,
    group: Processes = _ALONE,
) -> tuple[list[dict[str, Any]], report.Log]:  # fmt: skip
    """Run phases in order, which may be others than those of the configuration; one that is finished is not run again.

    Args:
        config: the resolved configuration. The caller holds ``config.out``.
        corpus: the text.
        plan: each phase after the one that it starts from, unless that is finished.
        say: receives lines of text about the progress.
        group: the processes that train together; this one alone if None.

    Returns:
        The result of each phase, and the log.

    Raises:
        Interrupted: on SIGINT or SIGTERM, after a checkpoint.
    """
    out = Path(config.out)
    batch, parts = config.training.batch, config.training.accumulate
    if batch % group.size or batch // group.size < parts:
        raise ConfigError(
            f"--batch is {batch}, must be a multiple of the {group.size} processes, and at least --accumulate "
            f"({parts}) times as many"
        )
    vocab, _ = models.limits(config.described)
    largest = max(int(corpus.train.max()), int(corpus.held_out.max()))
    if 0 < vocab <= largest:
        raise ConfigError(
            f"--model is {config.model}, whose tokenizer.json makes token {largest} of --data, must be below {vocab}, "
            "the vocab_size of its config.json"
        )
    if group.first:
        saving.open_run(out, config, corpus)
    group.wait()
    log = report.Log(out / "log.jsonl", group.first, out / "tensorboard" if config.evaluation.tensorboard else None)
    if not group.first:
        say = _nothing
    with Stop() as stop, TrainingDisplay(sum(phase.steps for phase in plan), say) as display:
        run = Run(config, corpus, log, display, stop, group)
        results = [saving.finished(run, phase) or run_phase(run, phase) for phase in plan]
        log.close()
        run.stop_if_asked()  # in the very last step: whoever called is asked to stop too
        return results, log


def _nothing(line: str) -> None:
    """Say nothing."""


def begin(run: Run, phase: Phase) -> Training:
    """Build what a phase starts with, before any of its steps."""
    model = build_model(run.config, phase, _seed(run.config.seed, "weights", 0))
    wrapped = run.group.wrap(model)  # under FSDP2 parameters are others from here on
    optimizer = build_optimizer(model, run.config, phase)
    method = phase.method.start(model, optimizer, phase.steps) if phase.bits is not None else QAT(model, False)
    return Training(run, phase, model.train(), wrapped, optimizer, method, Guard(optimizer, run.config.device))


def run_phase(run: Run, phase: Phase) -> dict[str, Any]:
    """Train one phase to its end, from its last state if it has one, and return its result."""
    run.stop_if_asked()
    config, training = run.config, begin(run, phase)
    progress = saving.resumed(training)
    run.display.begin(phase.name, progress.step)
    windows = run.corpus.evaluation(config.evaluation.eval_windows, config.shape.context)
    if progress.step == 0:  # of a quantized phase this is round-to-nearest: nothing has been trained at this width
        progress.start = progress.held_out = _held_out(training, windows, 0)
        run.log.add(phase=phase.name, step=0, held_out=progress.start)
        if config.evaluation.keep_every is not None:
            saving.keep(training, 0)

    while progress.step < phase.steps:
        began = time.perf_counter()
        loss = take_step(training, progress.step)
        progress.step += 1
        last, stop = progress.step == phase.steps, run.group.any(run.stop.number or 0)
        logged, evaluated, saved, kept = (
            every is not None and progress.step % every == 0
            for every in (
                config.evaluation.log_every,
                config.evaluation.eval_every,
                config.evaluation.save_every,
                config.evaluation.keep_every,
            )
        )
        entry = {"phase": phase.name, "step": progress.step}
        if (logged or evaluated or saved or kept or last or stop) and training.guard.found():  # waits for the device
            raise _diverged(training)
        if logged or last:  # waits too, so it belongs to the measured time
            bits = loss.item() / math.log(2) / run.corpus.bytes_per_token
            entry |= {"train": bits, "lr": training.optimizer.param_groups[0]["lr"]}
            if training.method.stats is not None:
                entry["scales_at_floor"] = training.method.stats.at_floor()
        progress.seconds += time.perf_counter() - began

        if saved or kept or last or stop:
            _check_weights(training, progress.step)
        if (
            phase.bits is not None
            and config.evaluation.stats_every
            and progress.step % config.evaluation.stats_every == 0
        ):
            entry |= run.group.means(training.method.log())
        if evaluated or last:
            progress.held_out = _held_out(training, windows, progress.step)
            entry |= {"held_out": progress.held_out}
        if len(entry) > 2:
            run.log.add(**entry)
        if entry.get("scales_at_floor") and not progress.warned:
            progress.warned = True
            _warn_of_floor(training, entry)
        run.display.step(
            phase.name, entry, config.training.batch * config.shape.context * progress.step / progress.seconds
        )
        if last:
            break
        if kept:
            saving.keep(training, progress.step)
        if stop or saved:
            saving.save(training, progress, config.evaluation.keep_last)
            run.stop_if_asked()
    return saving.finish(training, progress)


def take_step(training: Training, step: int) -> Tensor:
    """Take a step, counted from 0, and return the loss at the weights before it, in nats."""
    for group in training.optimizer.param_groups:
        group["lr"] = group["peak"] * training.phase.rate(step)
    loss = gradient(training, step)
    norm = nn.utils.clip_grad_norm_(training.model.parameters(), training.run.config.training.clip)
    training.guard.see(step + 1, loss, whole(norm))
    training.optimizer.step()
    # The optimizer stands still from a bad step on, and so do resets; only one that is due waits for the device.
    if not (training.method.due and training.guard.found()):
        training.method.after_step()
    return loss


def gradient(training: Training, step: int) -> Tensor:
    """Leave the gradient of a step in ``.grad``, and return the loss over the whole batch, in nats."""
    run, phase, config = training.run, training.phase, training.run.config
    torch.manual_seed(_seed(config.seed, *(("fp", phase.first + step) if phase.bits is None else ("qat", step))))
    windows = run.group.share(run.corpus.batch(config.training.batch, config.shape.context))
    loss: Tensor = training.method.gradient(
        lambda: accumulated(training.wrapped, windows, training.optimizer, config, run.group)
    )
    return run.group.mean(loss)


def accumulated(
    model: nn.Module,
    windows: Tensor,
    optimizer: torch.optim.Optimizer,
    config: TrainConfig,
    group: Processes = _ALONE,
) -> Tensor:
    """Leave the gradient of the mean loss of the windows in ``.grad``, part by part, and return the loss."""
    optimizer.zero_grad()
    total = torch.zeros((), device=config.device)
    parts = windows.chunk(config.training.accumulate)
    for i, part in enumerate(parts):
        with group.synchronized(model, last=i == len(parts) - 1):
            loss = mean_loss(model, part, config) * (len(part) / len(windows))
            loss.backward()
        total += loss.detach()
    return total


def mean_loss(model: nn.Module, windows: Tensor, config: TrainConfig) -> Tensor:
    """Return the mean cross-entropy in nats of predicting each token of the windows from those before it."""
    windows = windows.to(config.device)
    with torch.autocast(config.device, torch.bfloat16, enabled=config.precision == "bfloat16"):
        logits = model(windows[:, :-1])
    logits = getattr(logits, "logits", logits)  # transformers' models have more to say
    return F.cross_entropy(logits.float().flatten(0, 1), windows[:, 1:].flatten())


@torch.no_grad()
def evaluate(model: nn.Module, windows: Tensor, config: TrainConfig, group: Processes = _ALONE) -> float:
    """Return bits per token on ``windows`` ``[count, context + 1]``; each window starts without context."""
    model.eval()
    own = group.share(windows)
    total = sum(mean_loss(model, part, config).item() * len(part) for part in own.split(64) if len(part))
    # FSDP2 gathers weights in every forward: whoever has fewer of them joins for nothing.
    most = -(-len(windows) // group.size)
    for _ in range(-(-most // 64) - -(-len(own) // 64)):
        mean_loss(model, windows[:1], config)
    model.train()
    return group.sums(total)[0] / len(windows) / math.log(2)


def _held_out(training: Training, windows: Tensor, step: int) -> float:
    run = training.run
    value = evaluate(training.wrapped, windows, run.config, run.group) / run.corpus.bytes_per_token
    if not math.isfinite(value):
        raise DivergedError(
            f"the held-out loss is {value} at step {step} of {training.phase.name}, though that of training is finite; "
            f"{_ADVICE}; {_last_good(training)}"
        )
    return value


def _diverged(training: Training) -> DivergedError:
    """Return the error of a step that was not finite, after running it again to find where that began."""
    run, found = training.run, training.guard.found()
    step, loss, norm = found or (0, math.nan, math.nan)
    training.method.steps = step - 1  # more were taken before the guard was asked
    begins = run.group.gathered(origin(training.model, lambda: gradient(training, step - 1)))
    where = next((name for name in begins if name is not None), None)
    message = (
        f"the loss is {loss:.4g} and the norm of its gradient {norm:.4g} at step {step} of {training.phase.name}; "
        + (f"not finite first: {where}" if where else "run again it is finite")
        + f"; {_ADVICE}; {_last_good(training)}"
    )
    run.log.add(phase=training.phase.name, step=step, note=message)
    return DivergedError(message)


_ADVICE = "lower --lr (or --qat-lr and --scale-lr)"


def _last_good(training: Training) -> str:
    saved = checkpoints.newest_first(training.run.folder(training.phase.name))
    return f"the last good checkpoint is {saved[0]}" if saved else "there is no checkpoint of this phase yet"


def _seed(seed: int, purpose: str, step: int) -> int:
    """Return 64 bits that depend on all three; what is drawn at a step needs no generator's state to be saved."""
    return int.from_bytes(hashlib.sha256(f"{seed} {purpose} {step}".encode()).digest()[:8], "little", signed=True)


def _warn_of_floor(training: Training, entry: dict[str, Any]) -> None:
    count, total = entry["scales_at_floor"], sum(s.numel() for s in scales_of(training.model))
    when = f" by step {entry['step']} of {training.phase.name}"
    message = f"{floor_message(count, total, when)}, here --scale-lr below {training.run.config.training.scale_lr:g}"
    training.run.display.say(message)
    training.run.log.add(phase=training.phase.name, step=entry["step"], note=message)


def _check_weights(training: Training, step: int) -> None:
    """Raise DivergedError if weights are not finite, though loss and gradient were: the optimizer made them so."""
    broken = (name for name, p in training.model.named_parameters() if not local_part(p.detach()).isfinite().all())
    if where := next(filter(None, training.run.group.gathered(next(broken, None))), None):
        message = (
            f"{where} is not finite after step {step} of {training.phase.name}, though loss and gradient were; "
            f"{_ADVICE}; {_last_good(training)}"
        )
        training.run.log.add(phase=training.phase.name, step=step, note=message)
        raise DivergedError(message)
