"""What a run trains, in order: phases in full precision and, from the right one's end, one for each bit width."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch

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
        name: of its folder.
        bits: bit width of the weights; None for full precision.
        steps: how many it takes.
        lr: peak learning rate.
        weight_decay: of weight matrices.
        rate: factor of the peak at each of its steps.
        start: name of the phase whose weights it starts from; None for new weights.
        goes_on: whether it also takes over that phase's optimizer, as if the two were one.
        kept: whether another phase may go on from its end.
        first: steps that its weights have seen before.
        act_bits: bit width of the activations; None leaves them alone.
        method: how it trains quantized weights.
    """

    name: str
    bits: float | None
    steps: int
    lr: float
    weight_decay: float
    rate: Callable[[int], float]
    start: str | None = None
    goes_on: bool = False
    kept: bool = False
    first: int = 0
    act_bits: int | None = None
    method: MethodConfig = field(default_factory=MethodConfig)

    @property
    def quantization(self) -> QuantConfig | None:
        """What the linear layers are quantized to."""
        return None if self.bits is None else QuantConfig(bits=self.bits, act_bits=self.act_bits)


def phases(config: TrainConfig) -> list[Phase]:
    """Return what is trained, in order.

    With ``cosine`` and ``wsd`` that is one phase in full precision, from whose end every bit width starts. With
    ``classic`` and ``fused`` the widths may leave full precision at different steps. The constant learning rate up
    to there is trained once, in parts that go on from each other (``fp<steps>``); ``fused`` quantizes from their
    ends, ``classic`` from a cooldown that branches off (``cooled<steps>``).

    Raises:
        ConfigError: if the parts of the schedule do not fit into the steps, or no fraction is known for a width.
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
    branches = [phase for phase in cooled.values() if not phase.kept]
    quantized = (quantized_from(config, bits, steps, cooled[full]) for bits, (full, steps) in splits.items())
    return [*trunk.values(), *branches, *quantized]


def steps_of(config: TrainConfig, bits: float) -> tuple[int, int]:
    """Return the steps in full precision and quantized at one bit width.

    Raises:
        ConfigError: if the formula for the fraction has no answer, or the tokens are fewer than two steps.
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
    """Return how many weights `quantize_model` will quantize, the N that the formula for the fraction is about."""
    with torch.device("meta"):
        model = models.build(config.described)
    chosen = choose(model, Rules(QuantConfig(), None, models.excluded(model)))
    weights = {layer._parameters["weight"] for layer, found in chosen.items() if isinstance(found, QuantConfig)}
    return sum(weight.numel() for weight in weights if weight is not None)


def own_decay(config: TrainConfig, steps: int) -> Callable[[int], float]:
    """Return the schedule of a phase that warms up and decays on its own."""
    warmup = int(config.training.warmup * steps)
    if config.training.schedule == "cosine":
        return lambda step: cosine(step, steps, warmup)
    return lambda step: wsd(step, steps, warmup, int(config.training.cooldown * steps), shape=config.training.decay)


def _cooldown(config: TrainConfig, full: int) -> int:
    """Return the steps of the cooldown in a full-precision phase of ``full``."""
    schedule, warmup = config.training.schedule, _warmup(config)
    cooldown = int(config.training.cooldown * full) if schedule == "classic" else 0
    if full - cooldown < max(warmup, 1):
        raise ConfigError(
            f"--schedule {schedule} leaves {full} steps in full precision, fewer than the warmup ({warmup}) "
            f"and the cooldown ({cooldown}) need; lower --qat-fraction, --warmup or --cooldown, or give more --tokens"
        )
    return cooldown


def _warmup(config: TrainConfig) -> int:
    """Return the steps of the first warmup, the same for all bit widths."""
    total = config.training.steps + config.training.qat_steps
    if config.training.tokens is not None:
        total = round(config.training.tokens / (config.training.batch * config.shape.context))
    return int(config.training.warmup * total)


def trunk_parts(config: TrainConfig, stops: list[int]) -> dict[int, Phase]:
    """Return the parts of the training at a constant rate, by the step at which they end."""
    parts: dict[int, Phase] = {}
    before: Phase | None = None
    for stop in stops:
        first = before.first + before.steps if before else 0
        rate = functools.partial(_shifted, by=first, rate=functools.partial(
            classic, steps=stop, qat_steps=0, warmup=_warmup(config)
        ))  # fmt: skip
        before = parts[stop] = Phase(
            f"fp{stop}", None, stop - first, config.training.lr, config.training.weight_decay, rate,
            before.name if before else None, goes_on=before is not None, kept=True, first=first,
        )  # fmt: skip
    return parts


def cooled_from(config: TrainConfig, trunk: Phase, cooldown: int) -> Phase:
    """Return the cooldown that branches off from the end of a part at the constant rate."""
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
        goes_on=True,
        first=first,
    )


def quantized_from(config: TrainConfig, bits: float, steps: int, start: Phase) -> Phase:
    """Return QAT at one width from the end of another phase: re-warmup, then the decay."""
    rewarmup = int(config.training.warmup * steps)
    rate = functools.partial(fused, steps=steps, qat_steps=steps, rewarmup=rewarmup, shape=config.training.decay)
    return Phase(
        f"w{bits:g}", bits, steps, config.training.qat_lr, 0.0, rate, start.name, first=start.first + start.steps,
        act_bits=config.act_bits, method=config.method_config,
    )  # fmt: skip


def _shifted(step: int, *, by: int, rate: Callable[[int], float]) -> float:
    return rate(step + by)
