"""The reference training loop: full precision first, then quantization-aware training from it at each bit width.

Everything a step needs is a function of the configuration and the step number: the learning rate, the batch, any
random draw. A checkpoint is therefore the model, the optimizer's moments and one integer, and a run that was killed and
started again ends with the same weights, bit for bit on a CPU (same machine, same number of threads), as one that was
not.

    out/run.json          the configuration; another one is refused here
    out/log.jsonl         one line for each logged step
    out/<phase>/          fp, then w4, w2, w1.58, w1 (phases.py): state.safetensors while it trains,
                          then model.safetensors and, last of all, config.json;
                          step-<n>.safetensors, its model at every keep_every-th step before
    out/report.json       the table and the curves, also as curves.png
"""

from __future__ import annotations

import hashlib
import math
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..nn import quantize_model, quantized_modules
from . import checkpoint, data, report
from .checkpoint import CheckpointError
from .config import ConfigError, TrainConfig
from .methods import QAT
from .model import Transformer
from .phases import EXCLUDED, Phase, phases


class DivergedError(RuntimeError):
    """The loss is no longer a number."""


class Interrupted(Exception):
    """A signal stopped the run after a checkpoint was written."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.number = number


@dataclass(frozen=True)
class _Run:
    """What every phase shares."""

    config: TrainConfig
    corpus: data.Corpus
    log: report.Log
    display: report.Display
    stop: _Stop

    def folder(self, name: str) -> Path:
        return Path(self.config.out) / name


def train(config: TrainConfig, *, restart: bool = False, say: Callable[[str], None] | None = None) -> dict[str, Any]:
    """Train, or go on with what an earlier call with the same ``out`` left. Sets torch's seed.

    Args:
        config: the configuration.
        restart: delete what ``config.out`` holds of an earlier run first.
        say: receives lines of text about the progress; a progress bar on the terminal if None.

    Returns:
        The report, as it is written to ``report.json``.

    Raises:
        ConfigError: if a setting cannot be used here, or differs from the run that is being resumed.
        DataError: if the text cannot be used.
        CheckpointError: if ``out`` cannot be written to, is in use, or holds a damaged checkpoint.
        DivergedError: if the loss is not finite.
        Interrupted: on SIGINT or SIGTERM, after a checkpoint.
    """
    config = config.resolved()
    corpus = data.load(config.data, config.context)
    out, plan = Path(config.out), phases(config)
    with checkpoint.exclusive(out):
        if restart:
            checkpoint.remove_run(out)
        results, log = run_phases(config, corpus, plan, say)
        return report.write(out, asdict(config), corpus, results, log)


def run_phases(
    config: TrainConfig, corpus: data.Corpus, plan: list[Phase], say: Callable[[str], None] | None = None
) -> tuple[list[dict[str, Any]], report.Log]:
    """Run phases in order, which may be others than those of the configuration; one that is finished is not run again.

    Args:
        config: the resolved configuration. The caller holds ``config.out``.
        corpus: the text.
        plan: each phase after the one that it starts from, unless that is finished.
        say: receives lines of text about the progress.

    Returns:
        The result of each phase, and the log.

    Raises:
        Interrupted: on SIGINT or SIGTERM, after a checkpoint.
    """
    out = Path(config.out)
    _open_run(out, config, corpus)
    log = report.Log(out / "log.jsonl")
    with _Stop() as stop, report.Display(sum(phase.steps for phase in plan), say) as display:
        run = _Run(config, corpus, log, display, stop)
        results = [_finished(run, phase) or run_phase(run, phase) for phase in plan]
        if stop.number:  # in the very last step: whoever called is asked to stop too
            raise Interrupted(stop.number)
        return results, log


def _open_run(out: Path, config: TrainConfig, corpus: data.Corpus) -> None:
    """Write run.json, or compare with the one that is there."""
    now = {**asdict(config), "bits": list(config.bits), "data_sha256": corpus.sha256}
    path = out / "run.json"
    if path.exists():
        before = checkpoint.read_json(path)
        free = {entry.name for entry in fields(config) if entry.metadata["resumable"]}
        for name in now.keys() - free:
            if before.get(name) != now[name]:
                option = "the text of --data" if name == "data_sha256" else f"--{name.replace('_', '-')}"
                raise ConfigError(
                    f"{option} is {now[name]}, but the run in {out} was started with {before.get(name)}; "
                    "give the same, another --out, or --restart to start over"
                )
    checkpoint.write_json(path, now)


class _Stop:
    """SIGINT and SIGTERM as a flag that is read between steps; a second signal acts at once."""

    def __enter__(self) -> _Stop:
        self.number: int | None = None
        self._before: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():
            self._before = {s: signal.signal(s, self._note) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.number = number
        signal.signal(number, self._before[number])

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


def run_phase(run: _Run, phase: Phase) -> dict[str, Any]:
    """Train one phase to its end, from its last checkpoint if it has one, and return its result."""
    if run.stop.number:
        raise Interrupted(run.stop.number)
    config, state_file = run.config, run.folder(phase.name) / "state.safetensors"
    model = build_model(run, phase)
    optimizer = build_optimizer(model, config, phase)
    method = phase.method.start(model, optimizer, phase.steps) if phase.bits is not None else QAT(model, False)
    progress = _Progress(phase.first)
    # With other bit widths than before a part at the constant rate may start elsewhere: its checkpoint is no use then.
    if state_file.exists() and checkpoint.load(state_file)[1].get("first", phase.first) == phase.first:
        progress = _restore(state_file, model, optimizer)
        method.load_state_dict(progress.method)
    elif phase.goes_on:
        _restore(run.folder(str(phase.start)) / "state.safetensors", model, optimizer)
    run.log.trim(phase.name, progress.step)
    run.display.begin(phase.name, progress.step)
    windows = run.corpus.evaluation(config.eval_windows, config.context)
    if progress.step == 0:  # of a quantized phase this is round-to-nearest: nothing has been trained at this width
        progress.start = _finite(evaluate(model, windows, config), {"phase": phase.name, "step": 0})
        run.log.add(phase=phase.name, step=0, held_out=progress.start)
        _keep(run, phase, model, 0)

    model.train()
    while progress.step < phase.steps:
        began = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * phase.rate(progress.step)
        draw = ("fp", phase.first + progress.step) if phase.bits is None else ("qat", progress.step)
        torch.manual_seed(_seed(config.seed, *draw))
        windows_of_step = run.corpus.batch(config.batch, config.context)
        loss = method.gradient(lambda: accumulated(model, windows_of_step, optimizer, config))  # noqa: B023
        nn.utils.clip_grad_norm_(model.parameters(), config.clip)
        optimizer.step()
        method.after_step()

        progress.step += 1
        last = progress.step == phase.steps
        entry = {"phase": phase.name, "step": progress.step}
        if progress.step % config.log_every == 0 or last:  # waits for the device, so it belongs to the measured time
            entry |= {"train": _finite(loss.item() / math.log(2), entry), "lr": optimizer.param_groups[0]["lr"]}
        progress.seconds += time.perf_counter() - began

        if phase.bits is not None and config.stats_every and progress.step % config.stats_every == 0:
            entry |= method.log()
        if progress.step % config.eval_every == 0 or last:
            progress.held_out = _finite(evaluate(model, windows, config), entry)
            entry |= {"held_out": progress.held_out}
        if len(entry) > 2:
            run.log.add(**entry)
        run.display.step(phase.name, entry, config.batch * config.context * progress.step / progress.seconds)
        if last:
            break
        _keep(run, phase, model, progress.step)
        if run.stop.number or progress.step % config.save_every == 0:
            progress.method = method.state_dict()
            checkpoint.save(state_file, _snapshot(model, optimizer), asdict(progress))
        if run.stop.number:
            raise Interrupted(run.stop.number)
    return _finish(run, phase, model, optimizer, progress)


def accumulated(model: nn.Module, windows: Tensor, optimizer: torch.optim.Optimizer, config: TrainConfig) -> Tensor:
    """Leave the gradient of the mean loss of the windows in ``.grad``, part by part, and return the loss."""
    optimizer.zero_grad()
    total = torch.zeros((), device=config.device)
    for part in windows.chunk(config.accumulate):
        loss = mean_loss(model, part, config) * (len(part) / len(windows))
        loss.backward()
        total += loss.detach()
    return total


def mean_loss(model: nn.Module, windows: Tensor, config: TrainConfig) -> Tensor:
    """Return the mean cross-entropy in nats of predicting each byte of the windows from those before it."""
    windows = windows.to(config.device)
    with torch.autocast(config.device, torch.bfloat16, enabled=config.precision == "bfloat16"):
        logits = model(windows[:, :-1])
    return F.cross_entropy(logits.float().flatten(0, 1), windows[:, 1:].flatten())


@torch.no_grad()
def evaluate(model: nn.Module, windows: Tensor, config: TrainConfig) -> float:
    """Return bits per byte on ``windows`` ``[count, context + 1]``; each window starts without context."""
    model.eval()
    total = sum(mean_loss(model, part, config).item() * len(part) for part in windows.split(64))
    model.train()
    return total / len(windows) / math.log(2)


def build_model(run: _Run, phase: Phase) -> nn.Module:
    """Return a new model for the first phase, and for the others that of the phase they start from, quantized."""
    torch.manual_seed(_seed(run.config.seed, "weights", 0))
    model: nn.Module = Transformer(run.config.model)
    if phase.start is not None:
        trained, _ = checkpoint.load(run.folder(phase.start) / "model.safetensors")
        model.load_state_dict(trained)
    if phase.quantization is not None:
        model = quantize_model(model, phase.quantization, exclude=EXCLUDED)
    return model.to(run.config.device)


def build_optimizer(model: nn.Module, config: TrainConfig, phase: Phase) -> torch.optim.Optimizer:
    """Return AdamW with a group for weight matrices, one for scales and zero points, and one for the rest.

    Only the first decays. Scales have a learning rate of their own: Adam moves every parameter by about the learning
    rate, and a scale is a hundred times smaller than a row of weights is long.
    """
    weights: list[Tensor] = []
    scales: list[Tensor] = []
    rest: list[Tensor] = []
    for name, parameter in model.named_parameters():
        is_scale = name.endswith((".scale", ".zero_point"))
        is_matrix = parameter.ndim >= 2 and not name.startswith("embedding")
        (scales if is_scale else weights if is_matrix else rest).append(parameter)
    groups = [
        {"params": weights, "peak": phase.lr, "weight_decay": phase.weight_decay},
        {"params": scales, "peak": config.scale_lr, "weight_decay": 0.0},
        {"params": rest, "peak": phase.lr, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], betas=(config.beta1, config.beta2), fused=True)


@dataclass
class _Progress:
    """How far a phase is, and how many steps its weights had seen before; part of its checkpoint."""

    first: int = 0
    step: int = 0
    seconds: float = 0.0
    start: float = math.nan
    held_out: float = math.nan
    method: dict[str, Any] = field(default_factory=dict)


def _seed(seed: int, purpose: str, step: int) -> int:
    """Return 64 bits that depend on all three; what is drawn at a step needs no generator's state to be saved."""
    return int.from_bytes(hashlib.sha256(f"{seed} {purpose} {step}".encode()).digest()[:8], "little", signed=True)


def _finite(value: float, entry: dict[str, Any]) -> float:
    if not math.isfinite(value):
        raise DivergedError(
            f"the loss is {value} at step {entry['step']} of {entry['phase']}; lower --lr (or --qat-lr and --scale-lr)"
        )
    return value


def _snapshot(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return model and optimizer as one flat dictionary of tensors."""
    tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state[parameter].items():
            tensors[f"optimizer.{name}.{key}"] = value
    return tensors


def _restore(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> _Progress:
    """Load what :func:`_snapshot` gave into a model and an optimizer that were just built."""
    tensors, header = checkpoint.load(path)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    order = [names[id(p)] for group in optimizer.param_groups for p in group["params"]]
    try:
        model.load_state_dict({n.removeprefix("model."): t for n, t in tensors.items() if n.startswith("model.")})
        moments = {
            i: {key: tensors[f"optimizer.{name}.{key}"] for key in ("step", "exp_avg", "exp_avg_sq")}
            for i, name in enumerate(order)
            if f"optimizer.{name}.step" in tensors  # a parameter that has not moved yet has none
        }
        optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})
        return _Progress(**header)
    except (KeyError, TypeError, RuntimeError) as error:
        raise CheckpointError(
            f"{path} does not fit this model ({error}); delete it to start that phase again"
        ) from error


def _finished(run: _Run, phase: Phase) -> dict[str, Any] | None:
    """Return the result of a phase that an earlier call finished."""
    path = run.folder(phase.name) / "config.json"
    if not path.exists():
        return None
    result: dict[str, Any] = checkpoint.read_json(path)["result"]
    run.display.begin(phase.name, phase.steps)
    return result


def _finish(
    run: _Run, phase: Phase, model: nn.Module, optimizer: torch.optim.Optimizer, progress: _Progress
) -> dict[str, Any]:
    """Write the trained model, then config.json, whose presence says that the phase is finished."""
    folder = run.folder(phase.name)
    result = {
        "phase": phase.name,
        "bits": phase.bits,
        "start": phase.start,
        "first": phase.first,
        "steps": phase.steps,
        "start_bits_per_byte": progress.start,
        "bits_per_byte": progress.held_out,
        "seconds": progress.seconds,
        "tokens_per_second": run.config.batch * run.config.context * phase.steps / progress.seconds,
        **sizes(model),
    }
    described = _described(run, phase, result)
    checkpoint.save(folder / "model.safetensors", model.state_dict(), described)
    if phase.kept:
        checkpoint.save(folder / "state.safetensors", _snapshot(model, optimizer), asdict(progress))
    checkpoint.write_json(folder / "config.json", described)
    if not phase.kept:
        (folder / "state.safetensors").unlink(missing_ok=True)
    run.display.end(result)
    return result


def _keep(run: _Run, phase: Phase, model: nn.Module, step: int) -> None:
    """Write the model at this step, if it is one to keep, as a file that is like that of a finished phase."""
    if run.config.keep_every is not None and step % run.config.keep_every == 0:
        described = _described(
            run, phase, {"phase": phase.name, "bits": phase.bits, "first": phase.first, "steps": step}
        )
        checkpoint.save(run.folder(phase.name) / f"step-{step:06d}.safetensors", model.state_dict(), described)


def _described(run: _Run, phase: Phase, result: dict[str, Any]) -> dict[str, Any]:
    """Return what is written beside a model."""
    return {
        "phase": phase.name,
        "model": asdict(run.config.model),
        "quantization": phase.quantization and phase.quantization.to_dict(),
        "exclude": list(EXCLUDED),
        "result": result,
    }


def sizes(model: nn.Module) -> dict[str, int]:
    """Count parameters, and bytes once packed: codes at the grid's storage width, everything else in float32."""
    layers = quantized_modules(model).values()
    weights = sum(layer.weight.numel() for layer in layers)
    scales = sum(layer.scale.numel() for layer in layers)
    packed = 4 * scales + sum(-(-layer.weight.numel() * layer.grid.storage_bits // 8) for layer in layers)
    total = sum(parameter.numel() for parameter in model.parameters())
    return {
        "parameters": total - scales,
        "quantized_parameters": weights,
        "quantized_bytes": packed,
        "model_bytes": packed + 4 * (total - weights - scales),
    }
