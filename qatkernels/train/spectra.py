"""The loss surface of checkpoints of `qatkernels train`: their spectra on one text, as JSON and as a picture."""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from torch import Tensor, nn

from ..hessian import HessianOperator, gradient_norm_ratio, sharpness, spectrum
from ..hessian import report as pictures
from ..hessian.lanczos import basis_bytes
from ..nn import QuantConfig, quantize_model, quantized_modules, quantized_weights
from ..ops import cross_entropy
from . import checkpoint, data
from .checkpoint import CheckpointError
from .config import ConfigError
from .model import ModelConfig, Transformer
from .report import _clock, _machine
from .values import check_seed

_DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class SpectrumConfig:
    """What `qatkernels spectrum` is asked for; `parser` describes the fields."""

    checkpoints: tuple[str, ...]
    out: str = "runs/spectrum"
    data: str | None = None
    windows: int = 16
    batches: int = 1
    probes: int = 20
    steps: int = 60
    block: int = 1
    seed: int = 0
    near_zero: float = 1.5e-3
    rho: float = 0.05
    dtype: str = "float32"
    basis_dtype: str | None = None
    basis_device: str | None = None
    engine: str = "reverse"
    checkpointing: bool = False
    device: str = "auto"
    restart: bool = False

    def __post_init__(self) -> None:
        if not self.checkpoints:
            raise ConfigError("give a checkpoint")
        for name in ("windows", "batches", "probes", "steps", "block"):
            if getattr(self, name) < 1:
                raise ConfigError(f"--{name} is {getattr(self, name)}, must be at least 1")
        try:
            check_seed("--seed", self.seed)
        except ValueError as error:
            raise ConfigError(str(error)) from error
        for name in ("near_zero", "rho"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"--{name.replace('_', '-')} is {getattr(self, name)}, must be positive and finite")
        if self.basis_device is not None:
            try:
                torch.empty(0, device=self.basis_device)
            except (RuntimeError, AssertionError) as error:
                reason = str(error).splitlines()[0]
                raise ConfigError(f"--basis-device is {self.basis_device}, cannot be used here ({reason})") from error
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ConfigError("--device is cuda, but PyTorch sees no CUDA device; must be cpu or auto here")
        if self.checkpointing and self.engine != "reverse":
            raise ConfigError("--checkpointing is for --engine reverse")


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    found = argparse.ArgumentParser(
        prog="qatkernels spectrum",
        description="Estimate the spectrum of the Hessian of the training loss at checkpoints of `qatkernels train`,\n"
        "with respect to the quantized weights, by stochastic Lanczos quadrature.",
        epilog="written to --out:\n"
        "  report.json    extreme eigenvalues, masses, traces, sharpness, and the density by bins\n"
        "  spectra.png    densities, and near-zero mass and largest eigenvalue over training\n"
        "  ritz/          Ritz values and weights of each checkpoint; a second call computes only what is missing\n\n"
        "examples:\n"
        "  qatkernels spectrum runs/demo/w4 runs/demo/w2 runs/demo/w1\n"
        "  qatkernels spectrum runs/demo/w2 --probes 5 --steps 40 --windows 4",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
    )
    found.add_argument(
        "checkpoints", nargs="+", metavar="CKPT", help="folder with model.safetensors, or a .safetensors file"
    )
    defaults = {entry.name: entry.default for entry in fields(SpectrumConfig)}

    def option(name: str, text: str, **rest: Any) -> None:
        default = defaults[name]
        shown = "" if default is None or default is False else f" (default: {default})"
        if default is False:
            rest["action"] = "store_true"
        else:
            rest = {"type": str if default is None else type(default)} | rest
        found.add_argument(f"--{name.replace('_', '-')}", help=text + shown, **rest)

    option("out", "folder for the results")
    option("data", "text file or folder; what the checkpoint was trained on if not given", metavar="PATH")
    option("windows", "windows of text in a batch", metavar="N")
    option("batches", "batches that the loss is the mean of", metavar="N")
    option("probes", "random vectors", metavar="N")
    option("steps", "Lanczos steps from each", metavar="N")
    option("block", "probes that share a pass over the batches, and memory for as many bases", metavar="N")
    option("seed", "seed of windows and probes", metavar="N")
    option("near_zero", "eigenvalues below this in magnitude are near zero", metavar="X")
    option("rho", "radius of the sharpness", metavar="X")
    option("dtype", "dtype of the products", choices=("float32", "float64"))
    option("basis_dtype", "dtype that the Krylov basis is kept in; --dtype if not given", choices=tuple(_DTYPES))
    option("basis_device", "where the Krylov basis is kept, cpu say; --device if not given", metavar="DEVICE")
    option("engine", "how products are computed", choices=("reverse", "forward"))
    option("checkpointing", "recompute the blocks' activations instead of keeping them")
    option("device", "cpu, cuda, or auto: cuda where there is one", choices=("auto", "cpu", "cuda"))
    option("restart", "compute again what --out holds already")
    return found


@dataclass(frozen=True)
class Loaded:
    """A checkpoint: its model, and what was written beside it."""

    name: str
    model: nn.Module
    params: list[Tensor]
    header: dict[str, Any]
    file: Path


def load(path: str | Path) -> Loaded:
    """Rebuild the model of a checkpoint.

    Args:
        path: folder with ``model.safetensors``, or such a file.

    Raises:
        CheckpointError: if there is none, or it does not describe a model of `qatkernels train`.
    """
    folder = Path(path)
    file = folder if folder.suffix == ".safetensors" else folder / "model.safetensors"
    tensors, header = checkpoint.load(file)
    try:
        model: nn.Module = Transformer(ModelConfig(**header["model"]))
        quantization, exclude = header["quantization"], tuple(header["exclude"])
        # In full precision, the weights that the quantized models quantize.
        quantized = quantize_model(model, QuantConfig.from_dict(quantization or {}), exclude=exclude)
        weights: list[Tensor] = list(quantized_weights(quantized))
        if quantization is None:
            names = [name for name, p in quantized.named_parameters() if any(p is w for w in weights)]
            model = Transformer(ModelConfig(**header["model"]))
            weights = [p for name, p in model.named_parameters() if name in names]
        else:
            model = quantized
        model.load_state_dict(tensors)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"{file} is no model that `qatkernels train` wrote ({str(error).splitlines()[0]})"
        ) from error
    phase: str = header["phase"]
    return Loaded(phase if file.stem == "model" else f"{phase}-{file.stem}", model.eval(), weights, header, file)


def run(config: SpectrumConfig, say: Callable[[str], None] | None = None) -> dict[str, Any]:
    """Analyse checkpoints.

    Args:
        config: what to do.
        say: receives lines of text about the progress; a progress bar on the terminal if None.

    Returns:
        The report, as it is written to ``report.json``.

    Raises:
        CheckpointError: if a checkpoint cannot be read, or ``out`` not be written to.
        ConfigError: if a setting cannot be used.
        DataError: if the text cannot be used.
        NotFiniteError: if a model's products are not finite.
    """
    auto = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(auto if config.device == "auto" else config.device)
    models = [load(path) for path in config.checkpoints]
    context = min(m.header["model"]["context"] for m in models)
    corpus = data.load(config.data or _trained_on(models[0]), context)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        batches = [corpus.batch(config.windows, context).to(device) for _ in range(config.batches)]
    out = Path(config.out)
    with checkpoint.exclusive(out), Display(len(models) * config.probes * config.steps, say) as display:
        display.say(_memory(config, max(sum(p.numel() for p in m.params) for m in models), device))
        found = [_analysed(m, config, batches, device, corpus.sha256, display, i) for i, m in enumerate(models)]
        report = {
            "settings": {k: v for k, v in asdict(config).items() if k not in ("checkpoints", "out", "restart")},
            "machine": _machine(),
            "text": {"source": corpus.source, "sha256": corpus.sha256, "context": context},
            "checkpoints": [pictures.summary(entry) for entry in found],
        }
        checkpoint.write(out / "report.json", pictures.write(report))
        with checkpoint.explained("written", out / "spectra.png"):
            pictures.plot(found, out / "spectra.png")
    return report


class Display:
    """Progress: a bar on a terminal, a line for each checkpoint everywhere.

    Args:
        total: products of all checkpoints.
        say: receives lines instead of the terminal.
    """

    def __init__(self, total: int, say: Callable[[str], None] | None) -> None:
        console = Console(stderr=True, highlight=False)
        self._bar = Progress(
            TextColumn("{task.description}"), BarColumn(bar_width=None), TextColumn("{task.fields[note]}"),
            console=console, transient=True, disable=say is not None or not console.is_terminal,
        )  # fmt: skip
        self._say = say or (lambda line: self._bar.console.print(line, soft_wrap=True))
        self._total, self._done, self._here, self._until = total, 0, 0, 0

    def __enter__(self) -> Display:
        self._bar.start()
        self._task = self._bar.add_task("", total=self._total, note="")
        self._began = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def say(self, text: str) -> None:
        """Print a line."""
        self._say(text)

    def skip(self, name: str, products: int) -> None:
        """Pass over a checkpoint that was done before."""
        self._done += products
        self._say(f"{name:<14} was done before")

    def begin(self, name: str, products: int) -> None:
        """Start a checkpoint that takes so many products."""
        self._until = self._done + products
        self._bar.update(self._task, completed=self._done, description=name)

    def advance(self, products: int) -> None:
        """Count products."""
        self._done, self._here = self._done + products, self._here + products
        left = (time.perf_counter() - self._began) / self._here * (self._total - self._done)
        note = f"{self._done}/{self._total} products, {_clock(left)} left"
        self._bar.update(self._task, completed=self._done, note=note)

    def end(self, text: str) -> None:
        """Announce the result of a checkpoint; an invariant subspace may have taken fewer products than announced."""
        self._done = self._until
        self._say(text)


def _memory(config: SpectrumConfig, n: int, device: torch.device) -> str:
    """Return what is known before the first product: the memory that grows with parameters times steps."""
    dtype = config.basis_dtype or config.dtype
    size = basis_bytes(n, min(config.steps, n), _DTYPES[dtype], min(config.block, config.probes))
    return (
        f"Krylov basis: {config.steps} vectors of {n:,} in {dtype} on {config.basis_device or device}, "
        f"{size * 1e-6:,.0f} MB" + (f" for {config.block} probes at once" if config.block > 1 else "")
    )


def _trained_on(model: Loaded) -> str | None:
    """Return the text that a checkpoint's run was given, as its run.json has it."""
    for folder in (model.file.parent, model.file.parent.parent):
        if (folder / "run.json").exists():
            text = checkpoint.read_json(folder / "run.json").get("data")
            if text is not None and not isinstance(text, str):
                raise CheckpointError(
                    f"{folder / 'run.json'} has data {text!r:.80}, must be a path or null; give --data"
                )
            return text
    return None


def mean_loss(model: nn.Module, windows: Tensor) -> Tensor:
    """Return the mean cross-entropy in nats of predicting each byte of the windows from those before it."""
    return cross_entropy(model(windows[:, :-1]), windows[:, 1:])


def _analysed(
    loaded: Loaded,
    config: SpectrumConfig,
    batches: list[Tensor],
    device: torch.device,
    text: str,
    display: Display,
    index: int,
) -> dict[str, Any]:
    """Return everything about one checkpoint, from an earlier call's file where it is the same."""
    identity = {
        "settings": {
            k: v
            for k, v in asdict(config).items()
            if k not in ("checkpoints", "out", "restart", "data", "device", "basis_device")
        },
        "text": text,
        "weights": checkpoint.digest(loaded.model.state_dict()),
    }
    work = config.probes * config.steps
    file = Path(config.out) / "ritz" / f"{index:02d}-{loaded.name}.json"
    if not config.restart and (before := found_before(file, identity)) is not None:
        display.skip(loaded.name, work)
        return before
    display.begin(loaded.name, work)
    model = loaded.model.to(device)
    op = HessianOperator(
        model, mean_loss, batches, loaded.params, engine=config.engine, dtype=_DTYPES[config.dtype],
        checkpoint=config.checkpointing,
    )  # fmt: skip

    def loss() -> Tensor:
        total = torch.stack([mean_loss(model, batch) for batch in batches])
        return total.mean()

    found = spectrum(
        op, config.probes, config.steps, seed=config.seed, near_zero=config.near_zero, block=config.block,
        basis_dtype=_DTYPES[config.basis_dtype] if config.basis_dtype else None, basis_device=config.basis_device,
        advance=display.advance,
    )  # fmt: skip
    with torch.no_grad():
        nats = float(loss())
    result = loaded.header["result"]
    targets = ("latent", "quantized") if loaded.header["quantization"] else ("latent",)
    entry = {
        "identity": identity,
        "name": loaded.name,
        "phase": loaded.header["phase"],
        "bits": result.get("bits"),
        "step": result["steps"],
        "bits_per_byte": nats / math.log(2),
        "clamped": clamped(model),
        "gradient_norm_ratio": gradient_norm_ratio(loss, loaded.params),
        "sharpness": {target: _sharpness(model, loss, config.rho, target, loaded.params) for target in targets},
        "spectrum": found.to_dict(),
    }
    checkpoint.write_json(file, entry, sealed=True, indent=None)
    model.cpu()
    display.end(f"{loaded.name:<14} {pictures.line(entry)}")
    return entry


def found_before(file: Path, identity: dict[str, Any]) -> dict[str, Any] | None:
    """Return what an earlier call with the same settings, text and weights found, None if there is none.

    Raises:
        CheckpointError: if the file is there and cannot be read or is damaged.
    """
    if not file.exists():
        return None
    before = checkpoint.read_json(file)
    return before if before.get("identity") == identity else None


def clamped(model: nn.Module) -> float:
    """Return the share of quantized weights that the gradient does not pass: their rows of the Hessian are zero."""
    passed = [
        torch.autograd.grad(layer.quantized_weight().sum(), layer.weight)[0]
        for layer in quantized_modules(model).values()
    ]
    return sum(int((g == 0).sum()) for g in passed) / max(sum(g.numel() for g in passed), 1)


def _sharpness(model: nn.Module, loss: Callable[[], Tensor], rho: float, target: str, params: list[Tensor]) -> float:
    return sharpness(model, loss, rho, target=target, params=None if target == "quantized" else params).value


def show(report: dict[str, Any], out: str) -> None:
    """Print the report, and where its files are."""
    console = Console(highlight=False)
    # Cut off at the 80 columns of a pipe it would lose its numbers.
    console.width = max(console.width, 140)
    console.print(pictures.table(report))
    console.print(f"{out}/report.json, {out}/spectra.png", soft_wrap=True)


def configured(argv: Sequence[str]) -> SpectrumConfig:
    """Return the configuration that a command line asks for."""
    given = vars(parser().parse_args(argv))
    return SpectrumConfig(**{**given, "checkpoints": tuple(given["checkpoints"])})
