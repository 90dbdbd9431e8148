"""The settings of a run. Each is a field here and a command line option of the same name."""

from __future__ import annotations

import functools
import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch

from .. import files
from ..grids import paretoq
from ..methods.schedules import DECAYS
from ..units import count
from . import models
from .demo_model import ModelConfig
from .methods import METHODS, MethodConfig
from .parallel import MODES

#: Schedules by name: what happens to the learning rate, and where QAT starts (`phases.py`).
SCHEDULES = ("cosine", "wsd", "classic", "fused")
#: Those in which each phase warms up and decays on its own.
OWN_DECAY = ("cosine", "wsd")


class ConfigError(ValueError):
    """A setting cannot be used; the message names it, its value and what is allowed."""


def _option(
    default: Any, text: str, group: str, resumable: bool = False, parse: Callable[[str], Any] | None = None
) -> Any:
    """A field that is also a command line option; a resumed run may change it only if it is ``resumable``."""
    return field(default=default, metadata={"help": text, "group": group, "resumable": resumable, "parse": parse})


def fraction(text: str) -> float | str:
    """Return a share, or the word ``auto``; argparse names this function when the text is neither."""
    return text if text == "auto" else float(text)


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides the result of a run. `qatkernels train --help` lists the fields with their meaning.

    Raises:
        ConfigError: if a field has a value that cannot be used.
    """

    out: str = _option("runs/demo", "folder for checkpoints, log and report", "run", resumable=True)
    data: str | None = _option(
        None, "text file or folder; this Python's standard library sources if not given", "run", True
    )
    bits: tuple[float, ...] = _option((4, 2, 1.58, 1), "bit widths to train; more may be added later", "run", True)
    model: str = _option(
        models.DEMO, "demo; a folder or file that `qatkernels train` left; or a folder with the config.json of a "
        "causal language model of transformers, its weights and tokenizer.json if they are there (extra hf)", "run",
    )  # fmt: skip
    act_bits: int | None = _option(
        None,
        "bit width of the activations, 2 to 8, a scale for each token; not quantized if not given",
        "run",
        parse=int,
    )
    method: str = _option("qat", "how quantized weights are trained: qat, winq or squat", "run")
    seed: int = _option(0, "seed of the initial weights and of the batches", "run")
    device: str = _option("auto", "cpu, cuda, or auto: cuda where there is one", "run")
    parallel: str = _option(
        "none", "several processes, started by torchrun: ddp, or fsdp (FSDP2, sharded checkpoints)", "run", True
    )
    precision: str = _option(
        "auto", "float32, or bfloat16 autocast; auto: bfloat16 where the hardware multiplies it", "run"
    )

    width: int = _option(192, "features of the residual stream", "model")
    depth: int = _option(3, "transformer blocks", "model")
    heads: int = _option(3, "attention heads", "model")
    context: int = _option(128, "bytes that a window predicts", "model")

    batch: int = _option(16, "windows in a step", "training")
    accumulate: int = _option(1, "parts of a batch that go through the model one after another", "training")
    steps: int = _option(900, "steps in full precision", "training")
    qat_steps: int = _option(200, "steps of quantization-aware training at each bit width", "training")
    tokens: int | None = _option(
        None, "bytes of both phases together, such as 10M, instead of --steps and --qat-steps", "training", parse=count
    )
    qat_fraction: float | str = _option(
        "auto", "share of --tokens to train quantized; auto: the planner's, for each width", "training", parse=fraction
    )
    schedule: str = _option(
        "auto", "cosine: each phase has a warmup and a cosine decay of its own; wsd: a warmup, a constant part and a "
        "decay; classic: warmup, constant, cooldown, "
        "then QAT with re-warmup and decay; fused: no cooldown, QAT starts from the constant rate and decays; "
        "auto: classic with --tokens, else cosine", "training",
    )  # fmt: skip
    cooldown: float = _option(
        0.2,
        "share of the full-precision steps that the classic cooldown takes, of each phase's the decay of wsd",
        "training",
    )
    decay: str = _option("sqrt", "shape of the decays of wsd, classic and fused: linear, sqrt or cosine", "training")
    lr: float = _option(2e-3, "peak learning rate in full precision", "training")
    qat_lr: float = _option(1e-3, "peak learning rate of quantization-aware training", "training")
    scale_lr: float = _option(1e-4, "peak learning rate of the quantizers' scales", "training")
    weight_decay: float = _option(0.1, "decay of weight matrices in full precision (QAT has none)", "training")
    beta1: float = _option(0.9, "AdamW's decay of the first moment", "training")
    beta2: float = _option(0.95, "AdamW's decay of the second moment", "training")
    warmup: float = _option(0.05, "share of a phase's steps over which the learning rate rises", "training")
    clip: float = _option(1.0, "largest norm of the gradient", "training")

    reset_every: int | None = _option(
        None, "steps of QAT between resets, 0 for none; a quarter of them if not given", "winq", parse=int
    )
    reset_weight: float = _option(0.4, "weight of a reset on the quantized value, in [0, 1]", "winq")
    reset_until: float = _option(1.0, "share of QAT after which there are no more resets", "winq")
    noise_std: float = _option(1e-3, "standard deviation of the noise on weights", "winq")
    scale_noise_std: float | None = _option(
        None, "standard deviation of the noise on scales; that on weights if not given", "winq", parse=float
    )
    two_sided: bool = _option(False, "average the gradient over the noise and its mirror image", "winq")
    samples: int = _option(1, "draws of the noise that a step averages over", "winq")

    rho: float = _option(0.05, "radius of the perturbation", "squat")
    target: str = _option("quantized", "what is perturbed: quantized (after rounding) or latent (before)", "squat")
    norm: str = _option("l2", "norm of the perturbation: l2 or asam", "squat")
    eta: float = _option(0.01, "added to every weight's size under asam", "squat")
    scale_every: int = _option(1, "sharpness steps between steps of the scales", "squat")
    minibatch: str = _option("same", "batch of the step of the scales: same or next", "squat")

    eval_every: int = _option(50, "steps between evaluations on held-out text", "evaluation")
    eval_windows: int = _option(256, "held-out windows in an evaluation", "evaluation")
    tensorboard: bool = _option(
        False, "also write the log for TensorBoard, to tensorboard/ (extra tensorboard)", "evaluation", True
    )
    log_every: int = _option(10, "steps between training losses in the log", "evaluation")
    stats_every: int | None = _option(
        None, "steps of QAT between counts of flipped codes in the log; none if not given", "evaluation", True, int
    )
    save_every: int = _option(100, "steps between checkpoints", "evaluation", resumable=True)
    keep_last: int = _option(2, "checkpoints that are kept while a phase trains", "evaluation", resumable=True)
    keep_every: int | None = _option(
        None, "steps between models that are kept in each phase's folder; none if not given", "evaluation", True, int
    )

    def __post_init__(self) -> None:
        if isinstance(self.bits, list):
            object.__setattr__(self, "bits", tuple(self.bits))
        for entry in fields(self):
            check_type(entry.name, str(entry.type), getattr(self, entry.name))
        _check_ranges(self)
        if not self.bits or len(set(self.bits)) != len(self.bits):
            raise ConfigError(f"--bits is {self.bits}, must be one or more different bit widths")
        try:
            for bits in self.bits:
                paretoq(bits)
            _ = self.shape
        except ValueError as error:
            raise ConfigError(f"--{error}") from error  # they name what is wrong first
        if self.precision not in ("auto", "float32", "bfloat16"):
            raise ConfigError(f"--precision is {self.precision!r}, must be auto, float32 or bfloat16")
        for name, allowed in (
            ("schedule", ("auto", *SCHEDULES)), ("decay", tuple(DECAYS)), ("method", METHODS),
            ("target", ("quantized", "latent")), ("norm", ("l2", "asam")), ("minibatch", ("same", "next")),
            ("parallel", MODES),
        ):  # fmt: skip
            if getattr(self, name) not in allowed:
                raise ConfigError(f"--{name} is {getattr(self, name)!r}, must be one of {', '.join(allowed)}")
        if self.schedule == "wsd" and self.warmup + self.cooldown > 1:
            raise ConfigError(
                f"--warmup is {self.warmup} and --cooldown {self.cooldown}, must be at most 1 together under wsd"
            )
        if self.act_bits is not None and not 2 <= self.act_bits <= 8:
            raise ConfigError(f"--act-bits is {self.act_bits}, must be in [2, 8]")
        if self.accumulate > self.batch:
            raise ConfigError(f"--accumulate is {self.accumulate}, must be at most --batch, {self.batch}")
        if self.parallel == "fsdp" and self.method == "squat" and self.target == "quantized":
            raise ConfigError("--target is quantized, must be latent with --parallel fsdp: gradients are sharded there")
        share = self.qat_fraction
        if share != "auto" and not (isinstance(share, float) and 0 < share < 1):
            raise ConfigError(f"--qat-fraction is {share}, must be auto or in (0, 1)")
        if share != "auto" and self.tokens is None:
            raise ConfigError(f"--qat-fraction is {share}, a share of --tokens: give --tokens too, or use --qat-steps")
        if self.tokens is not None and self.schedule in OWN_DECAY:
            raise ConfigError(f"--schedule is {self.schedule}, must be classic or fused with --tokens")
        if self.device not in ("auto", "cpu", "cuda"):
            raise ConfigError(f"--device is {self.device!r}, must be auto, cpu or cuda")

    @property
    def shape(self) -> ModelConfig:
        """Shape of the demo's model."""
        return ModelConfig(self.width, self.depth, self.heads, self.context)

    @functools.cached_property
    def described(self) -> dict[str, Any]:
        """What the model is built from."""
        return models.describe(self.model, self.shape)

    @property
    def method_config(self) -> MethodConfig:
        """How quantized weights are trained."""
        given = {entry.name: getattr(self, entry.name) for entry in fields(MethodConfig) if entry.name != "name"}
        return MethodConfig(self.method, **given)

    def resolved(self) -> TrainConfig:
        """Return the configuration with ``auto`` replaced by what this machine has.

        Raises:
            ConfigError: if CUDA is asked for and missing, or the model is.
        """
        try:
            vocab, longest = models.limits(self.described)
            drawn = not models.weight_files(self.model)
        except ValueError as error:
            raise ConfigError(str(error)) from error
        if vocab < 256 and models.tokenizer(self.model) is None:
            raise ConfigError(
                f"--model is {self.model}, whose {vocab} tokens are too few for bytes: give it a tokenizer.json"
            )
        if drawn and self.steps == 0 and self.tokens is None:
            raise ConfigError(f"--steps is 0, must be at least 1 with --model {self.model}, which has no weights")
        if self.tensorboard and importlib.util.find_spec("tensorboard") is None:
            raise ConfigError("--tensorboard needs it: pip install qatkernels[tensorboard]")
        if longest is not None and self.context > longest:
            raise ConfigError(f"--context is {self.context}, must be at most {longest} for --model {self.model}")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ConfigError("--device is cuda, but PyTorch sees no CUDA device; must be cpu or auto here")
        device = self.device if self.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
        precision = self.precision
        if precision == "auto":
            precision = "bfloat16" if device == "cuda" or _multiplies_bfloat16() else "float32"
        schedule = self.schedule
        if schedule == "auto":
            schedule = "cosine" if self.tokens is None else "classic"
        return replace(self, device=device, precision=precision, schedule=schedule)


def check_type(name: str, type_of: str, value: Any) -> None:
    """Raise ConfigError if a field of the type that it is annotated with may not hold a value. True is no number.

    Args:
        name: the field's.
        type_of: ``Field.type``.
        value: what it is given.
    """
    if value is None and type_of.endswith(" | None"):
        return
    kind, right = _TYPES[type_of.removesuffix(" | None")]
    if not right(value):
        raise ConfigError(f"--{name.replace('_', '-')} is {value!r}, must be {kind}")


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


#: What a field may hold by its annotation. Settings are written as JSON: numbers are Python's own.
_TYPES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "str": ("a string", lambda value: isinstance(value, str)),
    "bool": ("true or false", lambda value: isinstance(value, bool)),
    "int": ("a whole number", _whole),
    "float": ("a number", _number),
    "float | str": ("auto or a number", lambda value: value == "auto" or _number(value)),
    "tuple[float, ...]": ("numbers", lambda value: isinstance(value, tuple) and all(map(_number, value))),
}
_SHARES = ("warmup", "cooldown", "reset_weight", "reset_until")


def _check_ranges(config: TrainConfig) -> None:
    for entry in fields(config):
        name, value = entry.name, getattr(config, entry.name)
        if not _number(value) or name == "seed":
            continue
        try:
            size = float(value)
        except OverflowError:  # an integer of hundreds of digits
            size = math.inf
        counts = isinstance(entry.default, int) or name in ("tokens", "keep_every", "stats_every")
        least = 1 if counts else 0
        if name == "steps" and config.model != models.DEMO:
            least = 0  # it has been trained before
        if name in _SHARES:
            right, limits = 0 <= value <= 1, "in [0, 1]"
        elif name in ("beta1", "beta2"):
            right, limits = 0 <= value < 1, "in [0, 1)"
        elif name == "clip":
            right, limits = 0 < size < math.inf, "positive and finite"
        else:
            right = least <= size < math.inf
            limits = f"at least {least}" + ("" if counts and size < math.inf else " and finite")
        if not right:
            raise ConfigError(f"--{name.replace('_', '-')} is {value}, must be {limits}")


def _multiplies_bfloat16() -> bool:
    """Whether this CPU has bfloat16 arithmetic; without it autocast is slower than float32."""
    known = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return bool(known.get("avx512_bf16") or known.get("amx_bf16"))


def read_run(path: Path) -> dict[str, Any]:
    """Return what is in a ``run.json``.

    Raises:
        CheckpointError: if it cannot be read or is damaged.
    """
    try:
        found: dict[str, Any] = files.read_json(path)
    except files.DamagedError as error:
        raise files.CheckpointError(f"{error.what}; give another --out, or --restart to start over") from error
    return found


def resumed(given: dict[str, Any]) -> TrainConfig:
    """Return the configuration of the run in ``given["out"]``, changed only by what else is given.

    Args:
        given: fields of :class:`TrainConfig` by name, as few as there are.

    Raises:
        ConfigError: if there is no run, or a field is not known.
        CheckpointError: if its configuration is damaged.
    """
    out = given.get("out", TrainConfig.out)
    path = Path(out) / "run.json"
    if not path.exists():
        raise ConfigError(f"--out is {out}, which holds no run to resume")
    stored = read_run(path)
    stored.pop("data_sha256", None)
    try:
        return TrainConfig(**{**stored, "bits": tuple(stored["bits"]), **given, "out": out})
    except (KeyError, TypeError) as error:
        raise ConfigError(f"{path} is not a configuration that this version knows ({error})") from error
