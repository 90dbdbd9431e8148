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

from .. import files
from ..hessian import HessianOperator, gradient_norm_ratio, sharpness, spectrum
from ..hessian.lanczos import basis_bytes
from ..methods.values import check_seed
from ..nn import QuantConfig, quantize_model, quantized_modules, quantized_weights
from ..ops import cross_entropy
from . import data, run_folder
from . import spectra_report as pictures
from .config import ConfigError
from .models import DEMO, build, limits, load_trained, tokenizer
from .report import _clock, _machine

_DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class SpectrumConfig:
    """What `qatkernels spectrum` is asked for; `parser` describes the fields."""

    checkpoints: tuple[str, ...]
    out: str = "runs/spectrum"
    data: str | None = None
    context: int | None = None
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
        if self.context is not None and self.context < 1:
            raise ConfigError(f"--context is {self.context}, must be at least 1")
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
    option(
        "context",
        "tokens in a window; as many as the checkpoints were trained with if not given",
        type=int,
        metavar="N",
    )
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
    """A checkpoint: its model, the weights that are quantized or would be, and what was written beside it."""

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
    trained = load_trained(Path(path))
    model, about, file = trained.model, trained.about, trained.file
    weights: list[Tensor] = list(quantized_weights(model))
    if about["quantization"] is None:  # the weights that the quantized models quantize
        twin = quantize_model(build(about["model"]), QuantConfig(), exclude=about["exclude"], warn_below=0)
        quantized = set(quantized_weights(twin))
        names = {name for name, p in twin.named_parameters() if p in quantized}
        weights = [p for name, p in model.named_parameters() if name in names]
    phase: str = about["phase"]
    return Loaded(phase if file.stem == "model" else f"{phase}-{file.stem}", model.eval(), weights, about, file)


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
    context = _context(config, models)
    corpus = data.load(config.data or _run_of(models[0]).get("data"), context, _tokenizer(models))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        batches = [corpus.batch(config.windows, context).to(device) for _ in range(config.batches)]
    out = Path(config.out)
    with run_folder.exclusive(out), Display(len(models) * config.probes * config.steps, say) as display:
        display.say(_memory(config, max(sum(p.numel() for p in m.params) for m in models), device))
        found = [_analysed(m, config, batches, device, corpus, display, i) for i, m in enumerate(models)]
        report = {
            "settings": {k: v for k, v in asdict(config).items() if k not in ("checkpoints", "out", "restart")},
            "machine": _machine(),
            "text": {"source": corpus.source, "sha256": corpus.sha256, "context": context},
            "checkpoints": [pictures.summary(entry) for entry in found],
        }
        files.write(out / "report.json", pictures.write(report))
        with files.explained("written", out / "spectra.png"):
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


def _run_of(model: Loaded) -> dict[str, Any]:
    """Return the run.json of the run that a checkpoint is of, empty if it lies elsewhere."""
    for folder in (model.file.parent, model.file.parent.parent):
        if (folder / "run.json").exists():
            run = files.read_json(folder / "run.json")
            for name, kind, wanted in (
                ("data", str, "a path or null; give --data"),
                ("context", int, "a number of tokens or null; give --context"),
                ("model", str, "a path or null"),
            ):
                if not isinstance(run.get(name), kind | None):
                    raise files.CheckpointError(f"{folder / 'run.json'} has {name} {run[name]!r:.80}, must be {wanted}")
            return run
    return {}


def _context(config: SpectrumConfig, models: Sequence[Loaded]) -> int:
    """Return the length of the windows: what was asked for, or the shortest that a checkpoint was trained with."""
    trained: list[Any] = [m.header["model"].get("context") or _run_of(m).get("context") for m in models]
    if config.context is None and None in trained:
        file = models[trained.index(None)].file
        raise ConfigError(f"--context is not given, and no run.json beside {file} says it; must be a number of tokens")
    context: int = min(trained) if config.context is None else config.context
    for model in models:
        longest = limits(model.header["model"])[1]
        if longest is not None and context > longest:
            raise ConfigError(f"--context is {context}, must be at most {longest}, the context of {model.file}")
    return context


def _tokenizer(models: Sequence[Loaded]) -> Path | None:
    """Return the tokenizer that the checkpoints share, beside one or its run's; None for bytes.

    Raises:
        ConfigError: if they do not share one.
    """
    found = []
    for model in models:
        places = (str(model.file.parent), _run_of(model).get("model", DEMO))
        known = (tokenizer(place) for place in places if "transformers" in model.header["model"])
        found.append(next((file for file in known if file), None))
    if len({file and file.read_bytes() for file in found}) > 1:
        raise ConfigError("the checkpoints have different tokenizers; their losses are not on the same tokens")
    return found[0]


def mean_loss(model: nn.Module, windows: Tensor) -> Tensor:
    """Return the mean cross-entropy in nats of predicting each token of the windows from those before it."""
    logits = model(windows[:, :-1])
    return cross_entropy(getattr(logits, "logits", logits), windows[:, 1:])  # transformers' models have more to say


def _analysed(
    loaded: Loaded,
    config: SpectrumConfig,
    batches: list[Tensor],
    device: torch.device,
    corpus: data.Corpus,
    display: Display,
    index: int,
) -> dict[str, Any]:
    """Return everything about one checkpoint, from an earlier call's file where it is the same."""
    identity = {
        "settings": {
            k: v
            for k, v in asdict(config).items()
            if k not in ("checkpoints", "out", "restart", "data", "context", "device", "basis_device")
        },
        "text": corpus.sha256,
        "context": batches[0].shape[1] - 1,
        "weights": files.digest(loaded.model.state_dict()),
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
        "bits_per_byte": nats / math.log(2) / corpus.bytes_per_token,
        "clamped": clamped(model),
        "gradient_norm_ratio": gradient_norm_ratio(loss, loaded.params),
        "sharpness": {target: _sharpness(model, loss, config.rho, target, loaded.params) for target in targets},
        "spectrum": found.to_dict(),
    }
    files.write_json(file, entry, sealed=True, indent=None)
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
    before = files.read_json(file)
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
