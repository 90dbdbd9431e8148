"""The settings of a run, in tables. Each setting is a field here and a command-line option of the same name."""

from __future__ import annotations

import functools
import importlib.util
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from .. import files
from ..methods.distillation import DistillationConfig
from ..methods.schedules import DECAYS
from ..methods.squat import SQuATConfig
from ..methods.stable_qat import StableQATConfig
from ..methods.winq import WinQConfig
from ..nn import QuantConfig
from ..nn.quant_embedding import for_embeddings
from ..options import AT_LEAST_0, AT_LEAST_1, POSITIVE, SHARE, ConfigError, Range, Settings, check, flag, option, table
from ..units import count
from . import models
from .demo_model import ModelConfig
from .methods import METHODS, MethodConfig
from .parallel import MODES

#: Schedules by name. A schedule decides the learning rate, and the step at which QAT starts (`phases.py`).
SCHEDULES = ("cosine", "wsd", "classic", "fused")
#: The schedules in which each phase has its own warmup and decay.
OWN_DECAY = ("cosine", "wsd")


def fraction(text: str) -> float | str:
    """Return a fraction, or the word ``auto``. argparse shows the name of this function in its error message."""
    return text if text == "auto" else float(text)


def bit_width(text: str) -> float:
    """Return a number, an int where it is integral. argparse shows the name of this function in its error message."""
    value = float(text)
    return int(value) if value.is_integer() else value


@dataclass(frozen=True)
class TrainingConfig:
    """Length of the phases, and settings of the optimizer."""

    batch: int = option(16, "windows (sequences) in a step", AT_LEAST_1)
    accumulate: int = option(1, "micro-batches that a batch is split into (gradient accumulation)", AT_LEAST_1)
    steps: int = option(900, "steps in full precision", AT_LEAST_0)
    qat_steps: int = option(200, "steps of quantization-aware training at each bit width", AT_LEAST_1)
    tokens: int | None = option(
        None, "tokens of both phases together, such as 10M; replaces --steps and --qat-steps", AT_LEAST_1, parse=count
    )
    qat_fraction: Literal["auto"] | float = option(
        "auto",
        "fraction of --tokens to train quantized; auto: what `qatkernels plan` computes for each bit width",
        parse=fraction,
    )
    schedule: Literal["auto", "cosine", "wsd", "classic", "fused"] = option(
        "auto",
        "cosine: each phase has its own warmup and cosine decay; wsd: each phase has a warmup, a constant rate and a "
        "decay; classic: warmup, constant rate, cooldown, then QAT with re-warmup and decay; fused: no cooldown, QAT "
        "starts from the constant rate and decays; auto: classic with --tokens, else cosine",
    )
    cooldown: float = option(
        0.2,
        "classic: length of the cooldown, as a fraction of the full-precision steps; wsd: length of the decay, as a "
        "fraction of the steps of its phase",
        SHARE,
    )
    decay: str = option("sqrt", "shape of the decay of wsd, classic and fused: linear, sqrt or cosine")
    lr: float = option(2e-3, "peak learning rate in full precision", AT_LEAST_0)
    qat_lr: float = option(1e-3, "peak learning rate of quantization-aware training", AT_LEAST_0)
    scale_lr: float = option(1e-4, "peak learning rate of the quantizers' scales", AT_LEAST_0)
    weight_decay: float = option(
        0.1, "weight decay of matrices in full precision (QAT has no weight decay)", AT_LEAST_0
    )
    beta1: float = option(0.9, "AdamW's decay of the first moment", Range(0, 1, open_high=True))
    beta2: float = option(0.95, "AdamW's decay of the second moment", Range(0, 1, open_high=True))
    warmup: float = option(0.05, "length of the warmup, as a fraction of the steps of its phase", SHARE)
    clip: float = option(1.0, "norm that gradients are clipped to", POSITIVE)

    def __post_init__(self) -> None:
        check(self)
        if self.decay not in DECAYS:
            raise ConfigError(f"--decay is {self.decay!r}, must be one of {', '.join(DECAYS)}")
        if self.schedule == "wsd" and self.warmup + self.cooldown > 1:
            raise ConfigError(
                f"--warmup is {self.warmup} and --cooldown {self.cooldown}, must be at most 1 together under wsd"
            )
        if self.accumulate > self.batch:
            raise ConfigError(f"--accumulate is {self.accumulate}, must be at most --batch, {self.batch}")
        share = self.qat_fraction
        if share != "auto" and not (isinstance(share, float) and 0 < share < 1):
            raise ConfigError(f"--qat-fraction is {share}, must be auto or in (0, 1)")
        if share != "auto" and self.tokens is None:
            raise ConfigError(
                f"--qat-fraction is {share}, a fraction of --tokens: give --tokens too, or use --qat-steps"
            )
        if self.tokens is not None and self.schedule in OWN_DECAY:
            raise ConfigError(f"--schedule is {self.schedule}, must be classic or fused with --tokens")


@dataclass(frozen=True)
class EvaluationConfig:
    """How often the run evaluates, logs and saves."""

    eval_every: int = option(50, "steps between evaluations on held-out text", AT_LEAST_1)
    eval_windows: int = option(256, "held-out windows (sequences) in an evaluation", AT_LEAST_1)
    tensorboard: bool = option(
        False, "also write the log for TensorBoard, to tensorboard/ (extra tensorboard)", resumable=True
    )
    log_every: int = option(10, "steps between training losses in the log", AT_LEAST_1)
    stats_every: int | None = option(
        None, "QAT steps between counts of flipped codes in the log; no counts if not given", AT_LEAST_1, resumable=True
    )
    save_every: int = option(100, "steps between checkpoints", AT_LEAST_1, resumable=True)
    keep_last: int = option(2, "newest checkpoints to keep while a phase trains", AT_LEAST_1, resumable=True)
    keep_every: int | None = option(
        None,
        "steps between copies of the model that stay in the folder of the phase; no copies if not given",
        AT_LEAST_1,
        resumable=True,
    )

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True, init=False)
class TrainConfig(Settings):
    """All settings of a run. `qatkernels train --help` lists them with their meaning.

    The constructor takes single settings by name, in whatever table they are, or whole tables, or both:

        TrainConfig(out="runs/x", bits=(2,), lr=1e-3, method="winq", samples=2)
        TrainConfig(out="runs/x", bits=(2,), method="winq", lr=1e-3, winq=WinQConfig(samples=2))

    Raises:
        ConfigError: if the value of a setting is not allowed.
        TypeError: if there is no setting of a given name.
    """

    own_table = "run"

    out: str = option("runs/demo", "folder for checkpoints, log and report", resumable=True)
    data: str | None = option(
        None, "text file or folder; the sources of Python's standard library if not given", resumable=True
    )
    bits: tuple[float, ...] = option(
        (4, 2, 1.58, 1), "bit widths to train; more may be added later", parse=bit_width, resumable=True, metavar="BITS"
    )
    model: str = option(
        models.DEMO,
        "demo; or a folder or file that `qatkernels train` wrote; or the folder of a causal language model of "
        "transformers with its config.json, and optionally its weights and tokenizer.json (extra hf)",
    )
    scheme: str = option("paretoq", "grids of the bit widths: paretoq (seq at 2 bits, lsq above), lsq, seq, affine")
    group_size: int | None = option(
        None, "input features that share a scale; one scale for each output feature if not given", AT_LEAST_1
    )
    scale_init: str | None = option(
        None,
        "how scales begin: max, mean, lsq, range, mse (a search for the smallest error of the weights) or activation "
        "(of the layers' outputs on training text); what suits the scheme if not given",
    )
    scale_dtype: Literal["float32", "bfloat16", "float16"] = option(
        "float32", "dtype that scales will be stored in; float16 for files of llama.cpp, so that they lose nothing"
    )
    zero_point_domain: Literal["float", "int"] = option(
        "float", "what zero points (scheme affine) will be stored as; int for files of other runtimes, which need it"
    )
    embeddings: int | None = option(
        None,
        "bit width of the embeddings of tokens and of heads that are tied to them, 2 to 8 (4 or more keep most of the "
        "model); not quantized if not given",
        Range(2, 8),
    )
    act_bits: int | None = option(
        None, "bit width of activations, 2 to 8, one scale per token; not quantized if not given", Range(2, 8)
    )
    method: str = option("qat", "how quantized weights are trained: qat, winq, squat or stableqat")
    weights: Literal["float32", "bfloat16", "stochastic"] = option(
        "float32",
        "what weights are while they are trained quantized: float32; bfloat16, rounded to nearest after each step, "
        "which loses small steps; or stochastic, bfloat16 rounded up or down at random",
    )
    seed: int = option(0, "seed of the initial weights and of the batches")
    device: Literal["auto", "cpu", "cuda"] = option("auto", "cpu, cuda, or auto: cuda where there is one")
    parallel: str = option(
        "none", "several processes, started by torchrun: ddp, or fsdp (FSDP2, sharded checkpoints)", resumable=True
    )
    precision: Literal["auto", "float32", "bfloat16"] = option(
        "auto", "float32, or bfloat16 autocast; auto: bfloat16 where the hardware supports it"
    )

    shape: ModelConfig = table(ModelConfig, "model")
    training: TrainingConfig = table(TrainingConfig)
    winq: WinQConfig = table(WinQConfig)
    squat: SQuATConfig = table(SQuATConfig)
    stableqat: StableQATConfig = table(StableQATConfig)
    distillation: DistillationConfig = table(DistillationConfig)
    evaluation: EvaluationConfig = table(EvaluationConfig)

    def __post_init__(self) -> None:
        if isinstance(self.bits, list):
            object.__setattr__(self, "bits", tuple(self.bits))
        super().__post_init__()
        if not self.bits or len(set(self.bits)) != len(self.bits):
            raise ConfigError(f"--bits is {self.bits}, must be one or more different bit widths")
        try:
            for bits in self.bits:
                self.quantization(bits)
                self.quantized_embeddings(bits)
        except ValueError as error:
            name, _, rest = str(error).partition(" ")  # the message starts with the name of a setting
            raise ConfigError(f"{flag(name)} {rest}") from error
        for name, allowed in (("method", METHODS), ("parallel", MODES)):
            if getattr(self, name) not in allowed:
                raise ConfigError(f"--{name} is {getattr(self, name)!r}, must be one of {', '.join(allowed)}")
        if self.parallel == "fsdp" and self.weights != "float32":
            raise ConfigError(f"--weights is {self.weights}, must be float32 with --parallel fsdp")
        if self.model == models.DEMO and self.training.steps < 1:  # another model may have been trained before
            raise ConfigError(f"--steps is {self.training.steps}, must be at least 1")

    @functools.cached_property
    def described(self) -> dict[str, Any]:
        """The values that the model is built from (:func:`models.describe`)."""
        return models.describe(self.model, self.shape)

    def quantization(self, bits: float) -> QuantConfig:
        """Return what the linear layers are quantized to at a bit width."""
        return QuantConfig(
            bits,
            self.scheme,
            group_size=self.group_size,
            scale_init=self.scale_init,
            scale_dtype=getattr(torch, self.scale_dtype),
            zero_point_domain=self.zero_point_domain,
            act_bits=self.act_bits,
        )

    def quantized_embeddings(self, bits: float) -> QuantConfig | None:
        """Return what embeddings are quantized to beside layers of a bit width, or None."""
        if self.embeddings is None:
            return None
        return replace(for_embeddings(self.quantization(bits)), bits=self.embeddings)

    @property
    def method_config(self) -> MethodConfig:
        """The training method and its settings."""
        return MethodConfig(self.method, self.winq, self.squat, self.stableqat)

    def resolved(self) -> TrainConfig:
        """Return the configuration with each ``auto`` replaced by the value for this machine.

        Raises:
            ConfigError: if CUDA is requested but not available, or the model cannot be used.
        """
        training, context = self.training, self.shape.context
        try:
            vocab, longest = models.limits(self.described)
            random_weights = not models.weight_files(self.model)
            tokenizer = models.tokenizer(self.model)
        except ValueError as error:
            raise ConfigError(str(error)) from error
        if vocab < 256 and tokenizer is None:
            raise ConfigError(
                f"--model is {self.model}, whose vocabulary of {vocab} tokens is too small to read bytes: give it a "
                "tokenizer.json"
            )
        if random_weights and training.steps == 0 and training.tokens is None:
            raise ConfigError(f"--steps is 0, must be at least 1 with --model {self.model}, which has no weights")
        if self.evaluation.tensorboard and importlib.util.find_spec("tensorboard") is None:
            raise ConfigError("--tensorboard needs the package tensorboard: pip install qatkernels[tensorboard]")
        if longest is not None and context > longest:
            raise ConfigError(f"--context is {context}, must be at most {longest} for --model {self.model}")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ConfigError("--device is cuda, but PyTorch sees no CUDA device; must be cpu or auto here")
        device = self.device if self.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
        precision = self.precision
        if precision == "auto":
            precision = "bfloat16" if device == "cuda" or _multiplies_bfloat16() else "float32"
        schedule = training.schedule
        if schedule == "auto":
            schedule = "cosine" if training.tokens is None else "classic"
        return self.changed(device=device, precision=precision, schedule=schedule)


def _multiplies_bfloat16() -> bool:
    """Whether this CPU has bfloat16 instructions; without them autocast is slower than float32."""
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def read_run(path: Path) -> dict[str, Any]:
    """Return the contents of a ``run.json``.

    Raises:
        CheckpointError: if the file cannot be read or is damaged.
    """
    try:
        stored: dict[str, Any] = files.read_json(path)
    except files.DamagedError as error:
        raise files.CheckpointError(f"{error.what}; give another --out, or --restart to start over") from error
    return stored


def resumed(given: dict[str, Any]) -> TrainConfig:
    """Return the configuration of the run in the folder ``given["out"]``, with the other given settings changed.

    Args:
        given: settings of :class:`TrainConfig` by name. Settings that are not given stay as they are in the run.

    Raises:
        ConfigError: if the folder holds no run, or there is no setting of a given name.
        CheckpointError: if the configuration of the run is damaged.
    """
    out = given.get("out", TrainConfig().out)
    path = Path(out) / "run.json"
    if not path.exists():
        raise ConfigError(f"--out is {out}, which holds no run to resume")
    stored = read_run(path)
    stored.pop("data_sha256", None)
    try:
        return TrainConfig(**{**stored, "bits": tuple(stored["bits"]), **given, "out": out})
    except (KeyError, TypeError) as error:
        raise ConfigError(f"{path} is not a configuration that this version knows ({error})") from error
