"""Hessian spectra of checkpoints of `qatkernels train` on one text, as JSON and as a page."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import MISSING, asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from torch import Tensor, nn

from .. import files
from ..hessian import HessianOperator, gradient_norm_ratio, sharpness, spectrum
from ..hessian.lanczos import basis_bytes
from ..methods.values import check_seed
from ..nn import QuantConfig, quantize_model, quantized_modules, quantized_weights
from ..nn.quantizer import RHO
from ..ops import cross_entropy
from ..options import AT_LEAST_1, POSITIVE, ConfigError, check, option
from . import data, run_folder, spectra_page
from . import spectra_report as tables
from .display import Display
from .models import DEMO, build, limits, load_trained, tokenizer
from .report import as_json, machine, refresh_page

_DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class SpectrumConfig:
    """The settings of `qatkernels spectrum`.

    Raises:
        ConfigError: if a setting cannot be used.
    """

    checkpoints: tuple[str, ...] = option(
        MISSING, "folder with model.safetensors, or a .safetensors file", metavar="CKPT", positional=True
    )
    out: str = option("runs/spectrum", "folder for the results")
    data: str | None = option(
        None, "text file or folder; the text that the checkpoint was trained on if not given", metavar="PATH"
    )
    context: int | None = option(
        None, "tokens in a window; the context that the checkpoints were trained with if not given", AT_LEAST_1
    )
    windows: int = option(16, "windows of text in a batch", AT_LEAST_1)
    batches: int = option(1, "batches; the loss is their mean", AT_LEAST_1)
    probes: int = option(20, "random start vectors (probes)", AT_LEAST_1)
    steps: int = option(60, "Lanczos steps from each probe", AT_LEAST_1)
    block: int = option(
        1, "probes that share a pass over the batches; each needs memory for its own Krylov basis", AT_LEAST_1
    )
    seed: int = option(0, "seed of windows and probes")
    near_zero: float = option(1.5e-3, "eigenvalues below this in magnitude count as near zero", POSITIVE)
    rho: float = option(RHO, "radius of the perturbation that measures sharpness", POSITIVE)
    dtype: Literal["float32", "float64"] = option("float32", "dtype of the Hessian-vector products: float32 or float64")
    basis_dtype: Literal["float32", "float64", "bfloat16"] | None = option(
        None, "dtype to store the Krylov basis in: float32, float64 or bfloat16; --dtype if not given",
        metavar="DTYPE",
    )  # fmt: skip
    basis_device: str | None = option(
        None, "device to store the Krylov basis on, such as cpu; --device if not given", metavar="DEVICE"
    )
    engine: Literal["reverse", "forward"] = option(
        "reverse", "how products are computed: reverse (double backward) or forward (forward over reverse)"
    )
    checkpointing: bool = option(False, "recompute activations of the blocks instead of keeping them")
    device: Literal["auto", "cpu", "cuda"] = option("auto", "cpu, cuda, or auto: cuda where there is one")
    restart: bool = option(False, "compute again the results that --out already holds")

    def __post_init__(self) -> None:
        if not self.checkpoints:
            raise ConfigError("give a checkpoint")
        check(self)
        try:
            check_seed("--seed", self.seed)
        except ValueError as error:
            raise ConfigError(str(error)) from error
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


@dataclass(frozen=True)
class Loaded:
    """A checkpoint.

    Attributes:
        name: name for messages and files.
        model: the model in eval mode.
        params: the weights that are quantized, or would be if the model were.
        header: the header of its file.
        file: the file with its weights.
    """

    name: str
    model: nn.Module
    params: list[Tensor]
    header: dict[str, Any]
    file: Path


def load(path: str | Path) -> Loaded:
    """Rebuild the model of a checkpoint.

    Args:
        path: a folder with ``model.safetensors``, or a ``.safetensors`` file.

    Raises:
        CheckpointError: if the file is missing or damaged, or was not written by `qatkernels train`.
    """
    trained = load_trained(Path(path))
    model, about, file = trained.model, trained.about, trained.file
    weights: list[Tensor] = list(quantized_weights(model))
    if about["quantization"] is None:  # take the weights that a quantized version of this model would quantize
        twin = quantize_model(build(about["model"]), QuantConfig(), exclude=about["exclude"], warn_below=0)
        quantized = set(quantized_weights(twin))
        names = {name for name, p in twin.named_parameters() if p in quantized}
        weights = [p for name, p in model.named_parameters() if name in names]
    phase: str = about["phase"]
    return Loaded(phase if file.stem == "model" else f"{phase}-{file.stem}", model.eval(), weights, about, file)


def run(config: SpectrumConfig, say: Callable[[str], None] | None = None) -> dict[str, Any]:
    """Compute the spectra of checkpoints.

    Args:
        config: the settings.
        say: called with each line about the progress. If None, a progress bar is shown on the terminal.

    Returns:
        The report that is written to ``report.json``.

    Raises:
        CheckpointError: if a checkpoint cannot be read, or ``out`` cannot be written to.
        ConfigError: if a setting cannot be used.
        DataError: if the text cannot be used.
        NotFiniteError: if a model's products are not finite.
    """
    auto = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(auto if config.device == "auto" else config.device)
    models = [load(path) for path in config.checkpoints]
    context = _context(config, models)
    corpus = data.load(config.data or _run_settings(models[0]).get("data"), context, _tokenizer(models))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        batches = [corpus.batch(config.windows, context).to(device) for _ in range(config.batches)]
    out = Path(config.out)
    with run_folder.exclusive(out), Display(len(models) * config.probes * config.steps, "products", say) as display:
        display.say(_memory_note(config, max(sum(p.numel() for p in m.params) for m in models), device))
        entries = [_analyse(m, config, batches, device, corpus, display, i) for i, m in enumerate(models)]
        report = {
            "settings": {k: v for k, v in asdict(config).items() if k not in ("checkpoints", "out", "restart")},
            "machine": machine(),
            "text": {"source": corpus.source, "sha256": corpus.sha256, "context": context},
            "checkpoints": [tables.summary(entry) for entry in entries],
        }
        files.write(out / "report.json", as_json(report))
        files.write(out / "report.html", spectra_page.page(report))
        refresh_page(out.parent)
    return report


def _memory_note(config: SpectrumConfig, n: int, device: torch.device) -> str:
    """Return a line with the memory of the Krylov basis, which grows with parameters times steps."""
    dtype = config.basis_dtype or config.dtype
    size = basis_bytes(n, min(config.steps, n), _DTYPES[dtype], min(config.block, config.probes))
    return (
        f"Krylov basis: {config.steps} vectors of {n:,} in {dtype} on {config.basis_device or device}, "
        f"{size * 1e-6:,.0f} MB" + (f" for {config.block} probes at once" if config.block > 1 else "")
    )


def _run_settings(model: Loaded) -> dict[str, Any]:
    """Return the run.json of the run that a checkpoint belongs to; empty if there is none beside the checkpoint."""
    for folder in (model.file.parent, model.file.parent.parent):
        if (folder / "run.json").exists():
            run = files.read_json(folder / "run.json")
            for name, kind, allowed in (
                ("data", str, "a path or null; give --data"),
                ("context", int, "a number of tokens or null; give --context"),
                ("model", str, "a path or null"),
            ):
                if not isinstance(run.get(name), kind | None):
                    raise files.CheckpointError(
                        f"{folder / 'run.json'} has {name} {run[name]!r:.80}, must be {allowed}"
                    )
            return run
    return {}


def _context(config: SpectrumConfig, models: Sequence[Loaded]) -> int:
    """Return the length of the windows: ``--context``, or the shortest context that a checkpoint was trained with."""
    trained: list[Any] = [m.header["model"].get("context") or _run_settings(m).get("context") for m in models]
    if config.context is None and None in trained:
        file = models[trained.index(None)].file
        raise ConfigError(f"--context is not given, and no run.json beside {file} has it; must be a number of tokens")
    context: int = min(trained) if config.context is None else config.context
    for model in models:
        longest = limits(model.header["model"])[1]
        if longest is not None and context > longest:
            raise ConfigError(f"--context is {context}, must be at most {longest}, the context of {model.file}")
    return context


def _tokenizer(models: Sequence[Loaded]) -> Path | None:
    """Return the tokenizer that the checkpoints share, None for bytes.

    It lies beside a checkpoint, or in the folder of the model that its run started from.

    Raises:
        ConfigError: if the checkpoints have different tokenizers.
    """
    tokenizers = []
    for model in models:
        places = (str(model.file.parent), _run_settings(model).get("model", DEMO))
        candidates = (tokenizer(place) for place in places if "transformers" in model.header["model"])
        tokenizers.append(next((file for file in candidates if file), None))
    if len({file and file.read_bytes() for file in tokenizers}) > 1:
        raise ConfigError(
            "the checkpoints have different tokenizers, so their losses cannot be compared; give checkpoints with the "
            "same tokenizer"
        )
    return tokenizers[0]


def mean_loss(model: nn.Module, windows: Tensor) -> Tensor:
    """Return the mean cross-entropy in nats of predicting each token of the windows from those before it."""
    logits = model(windows[:, :-1])
    # transformers' models return an object with more than the logits
    return cross_entropy(getattr(logits, "logits", logits), windows[:, 1:])


def _analyse(
    loaded: Loaded,
    config: SpectrumConfig,
    batches: list[Tensor],
    device: torch.device,
    corpus: data.Corpus,
    display: Display,
    index: int,
) -> dict[str, Any]:
    """Return the results of one checkpoint: stored ones if nothing changed since, else computed ones."""
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
    if not config.restart and (stored := stored_entry(file, identity)) is not None:
        display.begin(loaded.name, work)
        display.say(f"{loaded.name:<14} was done before")
        return stored
    display.begin(loaded.name)
    end = display.done + work
    model = loaded.model.to(device)
    op = HessianOperator(
        model, mean_loss, batches, loaded.params, engine=config.engine, dtype=_DTYPES[config.dtype],
        checkpoint=config.checkpointing,
    )  # fmt: skip

    def loss() -> Tensor:
        total = torch.stack([mean_loss(model, batch) for batch in batches])
        return total.mean()

    result = spectrum(
        op, config.probes, config.steps, seed=config.seed, near_zero=config.near_zero, block=config.block,
        basis_dtype=_DTYPES[config.basis_dtype] if config.basis_dtype else None, basis_device=config.basis_device,
        advance=display.advance,
    )  # fmt: skip
    with torch.no_grad():
        nats = float(loss())
    training = loaded.header["result"]
    targets = ("latent", "quantized") if loaded.header["quantization"] else ("latent",)
    entry = {
        "identity": identity,
        "name": loaded.name,
        "phase": loaded.header["phase"],
        "bits": training.get("bits"),
        "step": training["steps"],
        "bits_per_byte": nats / math.log(2) / corpus.bytes_per_token,
        "clamped": clamped(model),
        "gradient_norm_ratio": gradient_norm_ratio(loss, loaded.params),
        "sharpness": {target: _sharpness(model, loss, config.rho, target, loaded.params) for target in targets},
        "spectrum": result.to_dict(),
    }
    files.write_json(file, entry, sealed=True, indent=None)
    model.cpu()
    display.done = end  # Lanczos may stop early, at an invariant subspace
    display.say(f"{loaded.name:<14} {tables.line(entry)}")
    return entry


def stored_entry(file: Path, identity: dict[str, Any]) -> dict[str, Any] | None:
    """Return the stored results if they are for the same settings, text and weights, else None.

    Raises:
        CheckpointError: if the file exists but cannot be read or is damaged.
    """
    if not file.exists():
        return None
    stored = files.read_json(file)
    return stored if stored.get("identity") == identity else None


def clamped(model: nn.Module) -> float:
    """Return the fraction of quantized weights outside the pass-through range: their rows of the Hessian are zero."""
    passed = [
        torch.autograd.grad(layer.quantized_weight().sum(), layer.weight)[0]
        for layer in quantized_modules(model).values()
    ]
    return sum(int((g == 0).sum()) for g in passed) / max(sum(g.numel() for g in passed), 1)


def _sharpness(model: nn.Module, loss: Callable[[], Tensor], rho: float, target: str, params: list[Tensor]) -> float:
    return sharpness(model, loss, rho, target=target, params=None if target == "quantized" else params).value


def show(report: dict[str, Any], out: str) -> None:
    """Print the report, and the paths of its files."""
    console = Console(highlight=False)
    # Into a pipe, rich would cut the table at 80 columns, and numbers would be lost.
    console.width = max(console.width, 140)
    console.print(tables.table(report))
    console.print(f"{out}/report.json, {out}/report.html", soft_wrap=True)
