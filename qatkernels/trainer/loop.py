"""The reference training loop: full precision first, then quantization-aware training from it at each bit width.

The learning rate, the batch and all random numbers of a step depend on the configuration and the step number only. So
a checkpoint needs no more than the model, the optimizer's moments and the step. A run that was killed and resumed ends
with the same weights as one that was not: bit for bit on a CPU, on the same machine with the same number of threads.

    out/run.json          the configuration; a run with another configuration in this folder is an error
    out/log.jsonl         one line per logged step
    out/<phase>/          fp, then w4, w2, w1.58, w1 (phases.py). While the phase trains: its newest states
                          (checkpoints.py). At its end: model.safetensors, and phase.json, which is written last.
                          With keep_every also step-<n>.safetensors, the model at every keep_every-th step
    out/report.json       table and curves of the run; report.html shows them. An interrupted run leaves what it has
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
from ..files import CheckpointError
from ..methods.distillation import distillation_loss
from ..nn import CalibrationReport, calibrate, quantized_modules
from ..nn.activation import scales_of
from ..nn.floor import floor_message
from ..nn.quantizer import scales_come_later
from . import checkpoints, data, models, report, run_folder, saving
from .build import build_model, build_optimizer, build_teacher
from .config import ConfigError, TrainConfig
from .display import TrainingDisplay
from .guard import DivergedError, Guard, find_non_finite
from .methods import QAT
from .parallel import Processes, joined
from .phases import Phase, phases
from .signals import Interrupted, Stop
from .state import Run, Training

_ONE_PROCESS = Processes()
#: Windows of training text from which scales are set (``scale_init="activation"``).
CALIBRATION_WINDOWS = 32


def train(config: TrainConfig, *, restart: bool = False, say: Callable[[str], None] | None = None) -> dict[str, Any]:
    """Train, or resume the run in the folder ``config.out``. Sets torch's seed.

    Args:
        config: the configuration.
        restart: first delete the run that is in ``config.out``.
        say: called with each line about the progress. If None, a progress bar is shown on the terminal.

    Returns:
        The report that is written to ``report.json``.

    Raises:
        ConfigError: if a setting or model cannot be used here, or a setting differs from the run that is resumed.
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
            try:
                results, log = run_phases(config, corpus, plan, say, group)
            except (Interrupted, DivergedError) as stop:
                if group.first:
                    _report_unfinished(config, corpus, plan, str(stop))
                raise
            written = report.write(out, config.settings(), corpus, plan, results, log) if group.first else {}
            first_process_report: dict[str, Any] = group.gathered(written)[0]
            return first_process_report


def _report_unfinished(config: TrainConfig, corpus: data.Corpus, plan: list[Phase], why: str) -> None:
    """Write the report of what there is of a run that stopped, if it can be written."""
    out = Path(config.out)
    # On a full disk the error that stopped the run says more than one about its report, which the resumed run writes.
    with contextlib.suppress(CheckpointError):
        results = saving.results_so_far(out, plan)
        report.write(out, config.settings(), corpus, plan, results, report.Log(out / "log.jsonl", writes=False), why)


def run_phases(
    config: TrainConfig, corpus: data.Corpus, plan: list[Phase], say: Callable[[str], None] | None = None,
    group: Processes = _ONE_PROCESS,
) -> tuple[list[dict[str, Any]], report.Log]:  # fmt: skip
    """Run phases in order, except those that are finished. They need not be the phases of the configuration.

    Args:
        config: the resolved configuration. The caller must have locked ``config.out`` (:func:`run_folder.exclusive`).
        corpus: the text.
        plan: the phases. A phase comes after the one that it starts from, unless that one is finished already.
        say: called with each line about the progress.
        group: the processes that train together.

    Returns:
        The result of each phase, and the log.

    Raises:
        Interrupted: on SIGINT or SIGTERM, after a checkpoint.
    """
    out = Path(config.out)
    batch, parts = config.training.batch, config.training.accumulate
    if batch % group.size or batch // group.size < parts:
        raise ConfigError(
            f"--batch is {batch}, must be a multiple of the {group.size} processes, and at least {group.size * parts}: "
            f"--accumulate is {parts}"
        )
    vocab, _ = models.limits(config.described)
    largest = max(int(corpus.train.max()), int(corpus.held_out.max()))
    if 0 < vocab <= largest:
        raise ConfigError(
            f"--model is {config.model}, whose tokenizer.json makes token {largest} of --data, must be below {vocab}, "
            "the vocab_size in its config.json"
        )
    if group.first:
        saving.open_run(out, config, corpus)
    group.wait()
    log = report.Log(out / "log.jsonl", group.first, out / "tensorboard" if config.evaluation.tensorboard else None)
    if not group.first:
        say = _ignore
    with Stop() as stop, TrainingDisplay(sum(phase.steps for phase in plan), say) as display:
        run = Run(config, corpus, log, display, stop, group)
        results = [saving.finished_result(run, phase) or run_phase(run, phase) for phase in plan]
        log.close()
        run.stop_if_asked()  # a signal during the very last step must reach the caller too
        return results, log


def _ignore(line: str) -> None:
    """Drop a line: only the first process prints."""


def begin(run: Run, phase: Phase, resuming: bool = False) -> Training:
    """Build the model, optimizer and method of a phase, before its first step.

    Args:
        run: the objects that all phases share.
        phase: the phase.
        resuming: whether a saved state is loaded next, so that scales are not searched.
    """
    with scales_come_later() if resuming else contextlib.nullcontext():
        model = build_model(run.config, phase, _seed(run.config.seed, "weights", 0))
    if resuming:
        for layer in quantized_modules(model).values():
            layer.awaits_inputs = False
    elif phase.quantization is not None and phase.quantization.scale_init == "activation":
        torch.manual_seed(_seed(run.config.seed, "calibration", 0))  # the same text in every process
        windows = run.corpus.batch(CALIBRATION_WINDOWS, run.config.shape.context)
        calibrate_on(model.eval(), windows, run.config)
    wrapped = run.group.wrap(model)  # FSDP2 replaces the parameters, so the optimizer must be built after this
    optimizer = build_optimizer(model, run.config, phase)
    method = phase.method.start(model, optimizer, phase.steps) if phase.bits is not None else QAT(model, False)
    teacher = build_teacher(run.config, phase)
    return Training(run, phase, model.train(), wrapped, optimizer, method, Guard(optimizer, run.config.device), teacher)


def calibrate_on(model: nn.Module, windows: Tensor, config: TrainConfig) -> CalibrationReport:
    """Set the scales of a quantized model that need inputs (``scale_init="activation"``), and say what it took.

    Args:
        model: the model, on the device of the configuration.
        windows: int64 ``[count, context + 1]``; a batch is as large as a micro-batch of a step.
        config: the resolved configuration.
    """
    size = max(1, config.training.batch // config.training.accumulate)
    with torch.autocast(config.device, torch.bfloat16, enabled=config.precision == "bfloat16"):
        return calibrate(model, batches=(part[:, :-1].to(config.device) for part in windows.split(size)))


def run_phase(run: Run, phase: Phase) -> dict[str, Any]:
    """Train one phase to its end, from its newest state if there is one, and return its result."""
    run.stop_if_asked()
    config, states = run.config, checkpoints.newest_first(run.folder(phase.name))
    resuming = phase.quantization is not None and bool(run.group.any(len(states)))
    training = begin(run, phase, resuming)
    progress = saving.resume(training)
    if resuming and progress.step == 0:  # no state could be read
        training = begin(run, phase)
    run.display.begin(phase.name, progress.step)
    windows = run.corpus.evaluation(config.evaluation.eval_windows, config.shape.context)
    if progress.step == 0:  # in a quantized phase this is the loss of round-to-nearest, before any training
        progress.start = progress.held_out = _held_out(training, windows, 0)
        run.log.add(phase=phase.name, step=0, held_out=progress.start, **_codes(training))
        if config.evaluation.keep_every is not None:
            saving.keep_model(training, 0)

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
        # The guard syncs the device, so it is asked only in steps that sync anyway.
        if (logged or evaluated or saved or kept or last or stop) and training.guard.first_bad_step():
            raise _diverged(training)
        if logged or last:  # loss.item() syncs the device; that belongs to the measured time
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
        if last:
            entry |= _codes(training)
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
            saving.keep_model(training, progress.step)
        if stop or saved:
            saving.save(training, progress, config.evaluation.keep_last)
            run.stop_if_asked()
    return saving.finish(training, progress)


def _codes(training: Training) -> dict[str, Any]:
    """Return the log entry with the histograms of codes by layer; nothing for a model that is not quantized."""
    stats = training.method.stats
    return {} if stats is None else {"codes": stats.histograms()}


def take_step(training: Training, step: int) -> Tensor:
    """Take step ``step`` (from 0), and return the loss in nats at the weights before the step."""
    for group in training.optimizer.param_groups:
        group["lr"] = group["peak"] * training.phase.rate(step)
    loss = gradient(training, step)
    norm = nn.utils.clip_grad_norm_(training.model.parameters(), training.run.config.training.clip)
    training.guard.observe(step + 1, loss, whole(norm))
    training.optimizer.step()
    # After a non-finite step the optimizer skips all steps, and resets must be skipped too. first_bad_step() syncs the
    # device, so it is called only in a step that resets.
    if not (training.method.due and training.guard.first_bad_step()):
        training.method.after_step()
    return loss


def gradient(training: Training, step: int) -> Tensor:
    """Compute the gradient of a step into ``.grad``, and return the loss over the whole batch, in nats."""
    run, phase, config = training.run, training.phase, training.run.config
    torch.manual_seed(_seed(config.seed, *(("fp", phase.first + step) if phase.bits is None else ("qat", step))))
    windows = run.group.share(run.corpus.batch(config.training.batch, config.shape.context))
    loss: Tensor = training.method.gradient(
        lambda: accumulated(training.wrapped, windows, training.optimizer, config, run.group, training.teacher)
    )
    return run.group.mean(loss)


def accumulated(
    model: nn.Module,
    windows: Tensor,
    optimizer: torch.optim.Optimizer,
    config: TrainConfig,
    group: Processes = _ONE_PROCESS,
    teacher: nn.Module | None = None,
) -> Tensor:
    """Compute the gradient of the mean loss of the windows into ``.grad``, in micro-batches, and return the loss."""
    optimizer.zero_grad()
    total = torch.zeros((), device=config.device)
    parts = windows.chunk(config.training.accumulate)
    for i, part in enumerate(parts):
        with group.synchronized(model, last=i == len(parts) - 1):
            loss = mean_loss(model, part, config, teacher) * (len(part) / len(windows))
            loss.backward()
        total += loss.detach()
    return total


def mean_loss(model: nn.Module, windows: Tensor, config: TrainConfig, teacher: nn.Module | None = None) -> Tensor:
    """Return the mean loss in nats of predicting each token of the windows from those before it.

    The loss is the cross-entropy with the tokens; with a teacher, a weighted mean of that and of the divergence from
    the predictions of the teacher.
    """
    windows = windows.to(config.device)
    logits = _logits(model, windows, config)
    loss = F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
    if teacher is None:
        return loss
    with torch.no_grad():
        target = _logits(teacher, windows, config)
    distill, temperature = config.distillation.distill, config.distillation.temperature
    return (1 - distill) * loss + distill * distillation_loss(logits, target, temperature)


def _logits(model: nn.Module, windows: Tensor, config: TrainConfig) -> Tensor:
    """Return float32 logits for every token of the windows but the last."""
    with torch.autocast(config.device, torch.bfloat16, enabled=config.precision == "bfloat16"):
        logits = model(windows[:, :-1])
    return getattr(logits, "logits", logits).float()  # transformers' models return an object with more than the logits


@torch.no_grad()
def evaluate(model: nn.Module, windows: Tensor, config: TrainConfig, group: Processes = _ONE_PROCESS) -> float:
    """Return the loss in bits per token on ``windows`` ``[count, context + 1]``; each window starts without context."""
    model.eval()
    share = group.share(windows)
    total = sum(mean_loss(model, part, config).item() * len(part) for part in share.split(64) if len(part))
    # FSDP2 gathers weights in every forward, so all processes must make the same number of forwards. A process with
    # fewer windows makes the missing ones without using the result.
    largest_share = -(-len(windows) // group.size)
    for _ in range(-(-largest_share // 64) - -(-len(share) // 64)):
        mean_loss(model, windows[:1], config)
    model.train()
    return group.sums(total)[0] / len(windows) / math.log(2)


def _held_out(training: Training, windows: Tensor, step: int) -> float:
    run = training.run
    value = evaluate(training.wrapped, windows, run.config, run.group) / run.corpus.bytes_per_token
    if not math.isfinite(value):
        raise DivergedError(
            f"the held-out loss is {value} at step {step} of {training.phase.name}, though the training loss is "
            f"finite; {_ADVICE}; {_last_good(training)}"
        )
    return value


def _diverged(training: Training) -> DivergedError:
    """Run the first non-finite step again to find the module where it began, and return the error to raise."""
    run = training.run
    step, loss, norm = training.guard.first_bad_step() or (0, math.nan, math.nan)
    training.method.steps = step - 1  # the loop took more steps before it asked the guard
    places = run.group.gathered(find_non_finite(training.model, lambda: gradient(training, step - 1)))
    where = next((place for place in places if place is not None), None)
    message = (
        f"the loss is {loss:.4g} and the norm of its gradient {norm:.4g} at step {step} of {training.phase.name}; "
        + (f"the first non-finite value is {where}" if where else "it is finite when the step is run again")
        + f"; {_ADVICE}; {_last_good(training)}"
    )
    run.log.add(phase=training.phase.name, step=step, note=message)
    return DivergedError(message)


_ADVICE = "lower --lr (or --qat-lr and --scale-lr)"


def _last_good(training: Training) -> str:
    saved = checkpoints.newest_first(training.run.folder(training.phase.name))
    return f"the last good checkpoint is {saved[0]}" if saved else "there is no checkpoint of this phase yet"


def _seed(seed: int, purpose: str, step: int) -> int:
    """Return a 64-bit seed that depends on all arguments. With it no generator state needs to be saved."""
    return int.from_bytes(hashlib.sha256(f"{seed} {purpose} {step}".encode()).digest()[:8], "little", signed=True)


def _warn_of_floor(training: Training, entry: dict[str, Any]) -> None:
    count, total = entry["scales_at_floor"], sum(s.numel() for s in scales_of(training.model))
    when = f" by step {entry['step']} of {training.phase.name}"
    message = f"{floor_message(count, total, when)}, here --scale-lr below {training.run.config.training.scale_lr:g}"
    training.run.display.say(message)
    training.run.log.add(phase=training.phase.name, step=entry["step"], note=message)


def _check_weights(training: Training, step: int) -> None:
    """Raise DivergedError if the optimizer's step made a weight non-finite although loss and gradient were finite."""
    broken = (name for name, p in training.model.named_parameters() if not local_part(p.detach()).isfinite().all())
    if where := next(filter(None, training.run.group.gathered(next(broken, None))), None):
        message = (
            f"{where} is not finite after step {step} of {training.phase.name}, though loss and gradient were; "
            f"{_ADVICE}; {_last_good(training)}"
        )
        training.run.log.add(phase=training.phase.name, step=step, note=message)
        raise DivergedError(message)
