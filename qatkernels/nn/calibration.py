"""Calibration: batches are run through a model, and what they show of its activations sets scales."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..dtensor import is_dtensor
from .activation import LearnedActivation
from .config import without_inputs
from .grouped_quant_linear import GroupedQuantLinear, expert_of_tokens
from .quantized import OFFLOADED, Quantized, is_offloaded
from .quantizer import initial_scale

#: Why scales of a layer are those of "mse".
NOT_CALLED = "no token reached it"


@dataclass
class CalibrationReport:
    """What :func:`calibrate` set. ``str`` says it in a few lines.

    Attributes:
        activations: names of the quantizers of activations whose scales were set.
        layers: names of the layers whose weight scales were set from their inputs (``scale_init="activation"``).
        fallbacks: names of layers, and of single experts (``"up[3]"``), whose scales were searched by ``"mse"``
            instead, and why.
        tokens: inputs that each layer of ``layers`` got, by its name.
    """

    activations: list[str] = field(default_factory=list)
    layers: list[str] = field(default_factory=list)
    fallbacks: dict[str, str] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [
            f"scales of {len(self.activations)} activations set",
            f"scales of {len(self.layers)} weights set from their inputs",
        ]
        return "\n".join((*lines, *(f"{name}: {why}, scales by 'mse'" for name, why in self.fallbacks.items())))


@torch.no_grad()
def calibrate(
    model: nn.Module, *args: Any, batches: Iterable[Any] | None = None, **kwargs: Any
) -> CalibrationReport:  # fmt: skip
    """Run batches through a model and set the scales that need them: those that no batch has set yet.

    These are the scales of activations that are learned (``act_scheme="lsq"`` and ``"lsq+"``, ``out_bits``), which the
    first batch sets; and the scales of weights whose configuration says ``scale_init="activation"``. For the latter
    every call of a layer adds the squares of its inputs, before their own quantization, to one float64 number for each
    input feature. These layers compute with their weights in full precision meanwhile, so that errors of the layers
    before them do not distort their inputs. After the last batch the scales with the smallest error of the layer's
    output are searched (:func:`search_scale`). Layers that share a weight and its scales are searched for the inputs of
    all of them together. A layer or an expert that no token reached gets the scales of ``"mse"``; the report names it.

    Calibrate before training, and before FSDP or DDP wraps the model, with the same batches in each process. Weight
    scales that were loaded from a state dict, or set by an earlier call, stay as they are.

    Args:
        model: a quantized model, in training or eval mode.
        *args: one batch: ``model(*args, **kwargs)`` is called.
        batches: several batches, in place of ``args``: each a tensor, a tuple of positional arguments, or a mapping of
            keyword arguments; ``kwargs`` go to every call.
        **kwargs: passed to the model.

    Returns:
        What was set, and what could not be.

    Raises:
        RuntimeError: if the batches did not reach all activation quantizers.
        ValueError: if there is no batch, an input is not finite, no token reached any of the layers whose weight scales
            need it, the scales of such a layer were trained already, or its weight is sharded or offloaded.

    >>> import torch, qatkernels as qk
    >>> model = qk.quantize_model(torch.nn.Linear(8, 4), qk.QuantConfig(bits=2, scale_init="activation"))
    >>> print(qk.nn.calibrate(model, batches=[torch.randn(16, 8), torch.randn(16, 8)]))
    scales of 0 activations set
    scales of 1 weights set from their inputs
    """
    if batches is not None and args:
        raise ValueError("batches and positional arguments are given, give one of them")
    model = getattr(model, "_orig_mod", model)  # of torch.compile, which would compile the hooks
    acts = {n: m for n, m in model.named_modules() if isinstance(m, LearnedActivation) and not m.ready}
    layers = {n: m for n, m in model.named_modules() if isinstance(m, Quantized) and m.awaits_inputs}
    for name, layer in layers.items():
        _check_settable(name, layer)
    collected = {layer: _Moments(layer) for layer in layers.values()}
    with _calibrating(acts.values()), _observed(collected):
        _run(model, [args] if batches is None else batches, kwargs)
    if missed := sum(not act.ready for act in acts.values()):
        raise RuntimeError(f"the batch did not reach {missed} of {len(acts)} activation quantizers")
    report = CalibrationReport(list(acts))
    if layers:
        _set_scales(layers, collected, report)
    return report


def _run(model: nn.Module, batches: Iterable[Any], kwargs: Mapping[str, Any]) -> None:
    count = 0
    for batch in batches:
        count += 1
        if isinstance(batch, Mapping):
            model(**batch, **kwargs)
        else:
            model(*(batch if isinstance(batch, tuple | list) else (batch,)), **kwargs)
    if not count:
        raise ValueError("batches is empty: calibration needs at least one batch")


@contextmanager
def _calibrating(acts: Iterable[LearnedActivation]) -> Iterator[None]:
    """Let quantizers of activations take their scales from the next batch, in eval mode too."""
    acts = list(acts)
    for act in acts:
        act.calibrating = True
    try:
        yield
    finally:
        for act in acts:
            act.calibrating = False


class _Moments:
    """The sum of squares of a layer's inputs by feature, and how many tokens it got; by expert for a stack.

    Attributes:
        squares: float64 ``[K]``, or ``[E, K]``.
        tokens: int64 ``[]``, or ``[E]``.
    """

    def __init__(self, layer: Quantized) -> None:
        leading, device = layer.weight.shape[:-2], layer.weight.device
        self.squares = torch.zeros((*leading, layer.in_features), dtype=torch.float64, device=device)
        self.tokens = torch.zeros(leading, dtype=torch.int64, device=device)

    def __call__(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Add the inputs of a call; a forward pre-hook."""
        given = dict(zip(("x", "offsets"), args, strict=False)) | kwargs
        x: Tensor = given["x"].detach().reshape(-1, self.squares.shape[-1])
        squares = (x if x.dtype == torch.float64 else x.float()).square()
        if isinstance(layer, GroupedQuantLinear):
            expert = expert_of_tokens(given["offsets"], len(x))
            # Tokens past the last offset are nobody's: they go to a row that is dropped.
            count = len(self.tokens) + 1
            sums = squares.new_zeros((count, x.shape[-1]), dtype=torch.float64)
            self.squares += sums.index_add_(0, expert, squares.double())[:-1]
            self.tokens += torch.bincount(expert, minlength=count)[:-1]
        else:
            self.squares += squares.sum(0, dtype=torch.float64)
            self.tokens += len(x)


@contextmanager
def _observed(collected: Mapping[Quantized, _Moments]) -> Iterator[None]:
    """Show every input of the layers to their collectors, and let the layers compute in full precision."""
    handles = [layer.register_forward_pre_hook(moments, with_kwargs=True) for layer, moments in collected.items()]
    try:
        for layer in collected:
            layer.quantizer.bypassed = True
        yield
    finally:
        for layer, handle in zip(collected, handles, strict=True):
            layer.quantizer.bypassed = False
            handle.remove()


def _check_settable(name: str, layer: Quantized) -> None:
    """Raise ValueError if the scales of a layer cannot be set from its inputs."""
    if is_dtensor(layer.weight):
        raise ValueError(
            f"{name or 'the model'} has a sharded weight, so its scales cannot be set from its inputs: calibrate "
            "before fully_shard, with the same batches in each process"
        )
    if layer.was_trained_awaiting:
        raise ValueError(
            f"the scales of {name or 'the model'} have changed since they were made, by training or by hand, and would "
            "be overwritten: calibrate before training, or call layer.reset_scale() to begin with new scales"
        )
    if is_offloaded(layer):
        raise ValueError(f"{name or 'the model'} cannot be calibrated: {OFFLOADED.format('calibrate')}")


def _set_scales(
    layers: Mapping[str, Quantized], collected: Mapping[Quantized, _Moments], report: CalibrationReport
) -> None:
    """Search the scales of layers for their inputs."""
    for name, layer in layers.items():
        if bad := int((~collected[layer].squares.isfinite()).sum()):
            raise ValueError(
                f"the inputs of {name or 'the model'} have inf or NaN in {bad} features, from which scales cannot be "
                "calibrated (no scale was changed): calibrate with other batches, or find out where they come from"
            )
    if not any(bool(moments.tokens.any()) for moments in collected.values()):
        raise ValueError(
            f"no token reached any of the {len(layers)} layers whose scale_init is 'activation': calibrate with "
            "batches that the model passes on to them"
        )
    sharing: dict[int, list[Quantized]] = {}
    for layer in layers.values():
        sharing.setdefault(id(layer.scale), []).append(layer)
    for same in sharing.values():
        squares, tokens = (
            torch.stack([getattr(collected[layer], part) for layer in same]).sum(0) for part in ("squares", "tokens")
        )
        names = [name or "the model" for name, layer in layers.items() if layer in same]
        if not tokens.any():
            same[0].set_scale(*initial_scale(same[0].weight, without_inputs(same[0].config)))
            for layer in same:
                layer.await_inputs()  # of another call
            report.fallbacks.update(dict.fromkeys(names, NOT_CALLED))
            continue
        same[0].set_scale(*initial_scale(same[0].weight, same[0].config, squares))
        idle = (tokens == 0).nonzero().flatten().tolist() if tokens.ndim else ()
        for name, layer in zip(names, same, strict=True):
            layer.awaits_inputs = False
            report.layers.append(name)
            report.tokens[name] = int(tokens.sum())
            report.fallbacks.update({f"{name}[{expert}]": NOT_CALLED for expert in idle})
