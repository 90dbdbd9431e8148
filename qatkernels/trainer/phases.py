"""The phases of a run, in order: one or more in full precision, then one for each bit width."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ..methods.schedules import classic, cosine, fused, split, wsd
from ..nn import QuantConfig
from ..nn.selection import Rules, choose
from ..plan.formula import optimal_qat_fraction
from . import models
from .config import OWN_DECAY, ConfigError, TrainConfig
from .methods import MethodConfig


@dataclass(frozen=True)
class Phase:
    """One training run within the run: in full precision, or at one bit width.

    Attributes:
        name: name of its folder.
        bits: bit width of the weights; None for full precision.
        steps: number of steps.
        lr: peak learning rate.
        weight_decay: weight decay of matrices.
        rate: learning rate at each step, as a factor of the peak.
        start: name of the phase whose weights this one starts from; None for the initial weights.
        takes_optimizer: whether it also continues the optimizer of ``start``, as if the two phases were one.
        keeps_state: whether its last state is kept, so that another phase can continue from it.
        first: steps that its initial weights were trained for in earlier phases.
        quantization: what the linear layers are quantized to; None in full precision.
        embeddings: what embeddings of tokens and heads that are tied to them are quantized to; None to leave them.
        method: training method of the quantized weights.
    """

    name: str
    bits: float | None
    steps: int
    lr: float
    weight_decay: float
    rate: Callable[[int], float]
    start: str | None = None
    takes_optimizer: bool = False
    keeps_state: bool = False
    first: int = 0
    quantization: QuantConfig | None = None
    embeddings: QuantConfig | None = None
    method: MethodConfig = field(default_factory=MethodConfig)


def phases(config: TrainConfig) -> list[Phase]:
    """Return the phases of a run, in order.

    With ``cosine`` and ``wsd`` there is one phase in full precision, and every bit width starts from its end. With
    ``classic`` and ``fused`` the bit widths may leave full precision at different steps. They share the training at the
    constant learning rate, in parts that continue each other (``fp<steps>``). With ``fused`` QAT starts from the end of
    a part, with ``classic`` from a cooldown that starts at the end of a part (``cooled<steps>``).

    Raises:
        ConfigError: if warmup and cooldown do not fit into the steps, or there is no QAT fraction for a bit width.
    """
    if config.training.schedule in OWN_DECAY:
        first = Phase(
            "fp",
            None,
            config.training.steps,
            config.training.lr,
            config.training.weight_decay,
            own_decay(config, config.training.steps),
        )
        quantized = (quantized_from(config, bits, config.training.qat_steps, first) for bits in config.bits)
        return [first, *(replace(phase, rate=own_decay(config, config.training.qat_steps)) for phase in quantized)]
    splits = {bits: steps_of(config, bits) for bits in config.bits}
    cooldowns = {full: _cooldown(config, full) for full, _ in splits.values()}
    trunk = trunk_parts(config, sorted({full - cooldown for full, cooldown in cooldowns.items()}))
    cooled = {full: cooled_from(config, trunk[full - c], c) if c else trunk[full] for full, c in cooldowns.items()}
    branches = [phase for phase in cooled.values() if not phase.keeps_state]
    quantized = (quantized_from(config, bits, steps, cooled[full]) for bits, (full, steps) in splits.items())
    return [*trunk.values(), *branches, *quantized]


def steps_of(config: TrainConfig, bits: float) -> tuple[int, int]:
    """Return the number of full-precision steps and of QAT steps for one bit width.

    Raises:
        ConfigError: if the formula gives no QAT fraction, or the tokens are fewer than two steps.
    """
    if config.training.tokens is None:
        return config.training.steps, config.training.qat_steps
    try:
        fraction = config.training.qat_fraction
        if not isinstance(fraction, float):
            fraction = optimal_qat_fraction(quantized_parameters(config), config.training.tokens, bits)
        return split(round(config.training.tokens / (config.training.batch * config.shape.context)), fraction)
    except ValueError as error:
        raise ConfigError(f"--tokens {config.training.tokens} at {bits:g} bits: {error}") from error


def quantized_parameters(config: TrainConfig) -> int:
    """Return how many weights `quantize_model` will quantize: the N in the formula of the QAT fraction."""
    with torch.device("meta"):
        model = models.build(config.described)
    chosen = choose(model, Rules(QuantConfig(), None, models.excluded(model)))
    weights = {layer.weight for layer, choice in chosen.items() if isinstance(choice, QuantConfig)}
    return sum(weight.numel() for weight in weights if isinstance(weight, Tensor))


def own_decay(config: TrainConfig, steps: int) -> Callable[[int], float]:
    """Return the schedule of a phase that has its own warmup and decay."""
    warmup = int(config.training.warmup * steps)
    if config.training.schedule == "cosine":
        return lambda step: cosine(step, steps, warmup)
    return lambda step: wsd(step, steps, warmup, int(config.training.cooldown * steps), shape=config.training.decay)


def _cooldown(config: TrainConfig, full: int) -> int:
    """Return the steps of the cooldown at the end of ``full`` steps in full precision."""
    schedule, warmup = config.training.schedule, _warmup(config)
    cooldown = int(config.training.cooldown * full) if schedule == "classic" else 0
    if full - cooldown < max(warmup, 1):
        raise ConfigError(
            f"--schedule {schedule} leaves {full} steps in full precision, fewer than the warmup ({warmup}) "
            f"and the cooldown ({cooldown}) need; lower --qat-fraction, --warmup or --cooldown, or give more --tokens"
        )
    return cooldown


def _warmup(config: TrainConfig) -> int:
    """Return the steps of the warmup in full precision, which all bit widths share."""
    total = config.training.steps + config.training.qat_steps
    if config.training.tokens is not None:
        total = round(config.training.tokens / (config.training.batch * config.shape.context))
    return int(config.training.warmup * total)


def trunk_parts(config: TrainConfig, stops: list[int]) -> dict[int, Phase]:
    """Return the parts of the training at the constant learning rate, by the step at which they end."""
    parts: dict[int, Phase] = {}
    before: Phase | None = None  # the part before
    for stop in stops:
        first = before.first + before.steps if before else 0
        rate = functools.partial(_shifted, by=first, rate=functools.partial(
            classic, steps=stop, qat_steps=0, warmup=_warmup(config)
        ))  # fmt: skip
        before = parts[stop] = Phase(
            f"fp{stop}", None, stop - first, config.training.lr, config.training.weight_decay, rate,
            before.name if before else None, takes_optimizer=before is not None, keeps_state=True, first=first,
        )  # fmt: skip
    return parts


def cooled_from(config: TrainConfig, trunk: Phase, cooldown: int) -> Phase:
    """Return the cooldown that starts at the end of a part with the constant learning rate."""
    first = trunk.first + trunk.steps
    full = first + cooldown
    rate = functools.partial(_shifted, by=first, rate=functools.partial(
        classic, steps=full, qat_steps=0, warmup=_warmup(config), cooldown=cooldown, shape=config.training.decay
    ))  # fmt: skip
    return Phase(
        f"cooled{full}",
        None,
        cooldown,
        config.training.lr,
        config.training.weight_decay,
        rate,
        trunk.name,
        takes_optimizer=True,
        first=first,
    )


def quantized_from(config: TrainConfig, bits: float, steps: int, start: Phase) -> Phase:
    """Return the QAT phase of one bit width, which starts from the end of another phase: re-warmup, then decay."""
    rewarmup = int(config.training.warmup * steps)
    rate = functools.partial(fused, steps=steps, qat_steps=steps, rewarmup=rewarmup, shape=config.training.decay)
    return Phase(
        f"w{bits:g}", bits, steps, config.training.qat_lr, 0.0, rate, start.name, first=start.first + start.steps,
        quantization=config.quantization(bits), embeddings=config.quantized_embeddings(bits),
        method=config.method_config,
    )  # fmt: skip


def _shifted(step: int, *, by: int, rate: Callable[[int], float]) -> float:
    return rate(step + by)
