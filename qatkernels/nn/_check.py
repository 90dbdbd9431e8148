"""Look for what makes quantization-aware training go wrong without an error: one forward and backward, and a table."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .._torch_compat import tree_leaves
from ..dtensor import is_dtensor, local_part
from ..grids import MIN_SCALE
from ._pack_model import packed_modules
from ._quantize_model import quantized_modules
from .activation import ACTS, LearnedActivation, learned_acts
from .config import without_inputs
from .floor import count_act_at_floor, count_at_floor
from .packed_linear import Packed
from .quantized import OFFLOADED, Quantized, is_offloaded, reparametrization
from .quantizer import initial_scale
from .replaced import message, replaced_layers
from .replay import untouched

#: A learned scale does not fit its weights if it is more than this many times larger or smaller than a fresh one.
FAR = 4.0


@dataclass
class LayerCheck:
    """What :func:`check` found about one layer.

    Attributes:
        name: name of the layer in the model.
        kind: its class and quantization.
        calls: how often the forward passes called it.
        scale_grad: norm of the gradient of its scales; None if there was none.
        at_floor: scales at or below ``MIN_SCALE`` whose weights are not all zero.
        not_finite: scales and zero points that are infinite or NaN.
        scale_ratio: median of its scales over those that a fresh layer with the same weight would have.
        problems: what is wrong, a sentence each.
        notes: what may be intended.
    """

    name: str
    kind: str
    calls: int = 0
    scale_grad: float | None = None
    at_floor: int = 0
    not_finite: int = 0
    scale_ratio: float = math.nan
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@dataclass
class CheckReport:
    """The result of :func:`check`; ``print`` shows it as a table.

    Attributes:
        layers: one entry for each quantized or packed layer.
        problems: what is wrong with the model as a whole.
        notes: what may be intended.
    """

    layers: list[LayerCheck]
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether no problem was found."""
        return not self.problems and not any(layer.problems for layer in self.layers)

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON-able values; a number that is not finite is None."""
        layers = [
            {
                name: None if isinstance(value, float) and not math.isfinite(value) else value
                for name, value in asdict(layer).items()
            }
            for layer in self.layers
        ]
        return {"ok": self.ok, "layers": layers, "problems": self.problems, "notes": self.notes}

    def __str__(self) -> str:
        head = ("layer", "quantized to", "calls", "scale grad", "at floor", "not finite", "scale/fresh")
        rows = [
            (
                layer.name or "(the model)", layer.kind, str(layer.calls),
                "none" if layer.scale_grad is None else f"{layer.scale_grad:.2e}",
                str(layer.at_floor), str(layer.not_finite),
                "" if math.isnan(layer.scale_ratio) else f"{layer.scale_ratio:.2f}",
            )
            for layer in self.layers
        ]  # fmt: skip
        widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
        lines = [
            "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in (head, *rows)
        ]
        for label, pick in (("problem", lambda x: x.problems), ("note", lambda x: x.notes)):
            lines += [f"{label}: {layer.name or 'the model'} {text}" for layer in self.layers for text in pick(layer)]
            lines += [f"{label}: {text}" for text in pick(self)]
        broken = len(self.problems) + sum(len(layer.problems) for layer in self.layers)
        lines.append(f"{len(self.layers)} layers checked, {broken or 'no'} problem{'s' * (broken > 1)} found")
        return "\n".join(lines)


def check(model: nn.Module, *inputs: Any, loss_fn: Callable[[Any], Tensor] | None = None, **kwargs: Any) -> CheckReport:
    """Run a quantized model forward and backward once, and report what would go wrong in training without an error.

        print(qatkernels.check(model, batch))

    It looks for layers that are never called, layers whose scales get no gradient (the model reads ``layer.weight``
    itself, as transformers' Mamba does), scales at the floor or not finite, scales that do not fit their weights,
    quantized layers that something replaced by plain ones (``resize_token_embeddings`` of transformers), weights that
    the model changes in place (as RWKV does between training and evaluation), and for parametrizations, pruning and
    adapters on top of quantized layers.

    The model runs in training mode with a backward, and in eval mode without. Afterwards its parameters, gradients,
    buffers, modes and torch's random state are restored.

    Args:
        model: a model with quantized or packed layers, on the device that it runs on; not sharded.
        *inputs: passed to the model.
        loss_fn: makes a scalar of the model's output. By default this is the output's ``loss`` if it has one, else the
            mean square of all floating point tensors in the output.
        **kwargs: passed to the model.

    Returns:
        A report; ``report.ok`` says whether no problem was found, ``str(report)`` is a table with an explanation of
        each problem.

    Raises:
        ValueError: if the model has no quantized and no packed layer, is offloaded, or its output has nothing to make a
            loss of.
    """
    model = getattr(model, "_orig_mod", model)  # of torch.compile: hooks of a compiled model would compile it anew
    quantized, packed = quantized_modules(model), packed_modules(model)
    if not quantized and not packed:
        raise ValueError("model has no quantized and no packed layer: call quantize_model first")
    rows = {name: LayerCheck(name, _kind(layer)) for name, layer in {**quantized, **packed}.items()}
    report = CheckReport(list(rows.values()), [message(*item) for item in replaced_layers(model).items()])
    trains = any(parameter.requires_grad for parameter in model.parameters())
    if not trains:  # as after PEFT's merge_and_unload
        report.notes.append("no parameter of the model requires grad, so the backward was left out")
    for name, layer in quantized.items():
        if is_offloaded(layer):
            raise ValueError(f"{name or 'the model'} cannot be checked: {OFFLOADED.format('check')}")
        if problem := layer.misfit():
            raise ValueError(f"{name or 'the model'} cannot be checked: {problem}")
        _look_at_scales(rows[name], layer)
        _look_on_top(rows[name], layer)
    for module in model.modules():
        for name, layer in quantized.items():
            if getattr(module, "base_layer", None) is layer:  # PEFT's name for what an adapter wraps
                rows[name].notes.append(
                    f"has an adapter on top ({type(module).__name__}): merging it changes the weight, call "
                    "layer.reset_scale() after that"
                )
    waiting = [n for n, m in model.named_modules() if isinstance(m, LearnedActivation) and not bool(m.initialized)]
    if waiting:
        report.notes.append(
            f"{len(waiting)} activation scales have not been initialized ({waiting[0]}): the first batch in training "
            "mode sets them, or calibrate(model, batch); the forward in eval mode was left out"
        )

    def run(training: bool) -> None:
        model.train(training)
        before = _fingerprints(quantized)
        with torch.set_grad_enabled(training):
            output = model(*inputs, **kwargs)
            if training and quantized and trains:
                _loss(output, loss_fn).backward()
        for name in quantized:
            if not torch.equal(before[name], _fingerprint(quantized[name])):
                rows[name].problems.append(
                    f"has a weight that the model changes in place in its forward in {_mode(training)} mode, which "
                    "leaves the scales behind: turn that off in the model's configuration, or exclude the layer from "
                    "quantize_model"
                )

    layers = {**quantized, **packed}
    with _kept(quantized), untouched(model, gradients=True), _counted(layers, rows), torch.random.fork_rng():
        first = not model.training  # so that the last forward is in the mode that the model was in
        for training in (first, not first):
            if training or not waiting:
                run(training)
        for name, layer in quantized.items():
            _look_at_gradient(rows[name], layer)
    for name in packed:
        if not rows[name].calls:
            rows[name].problems.append("is never called by the forward of these inputs")
    return report


def _kind(layer: nn.Module) -> str:
    if isinstance(layer, Quantized):
        return layer.described
    assert isinstance(layer, Packed)
    return f"packed, bits={layer.weight.grid.bits}, scheme={layer.weight.grid.scheme}"


def _mode(training: bool) -> str:
    return "training" if training else "eval"


def _fingerprints(layers: dict[str, Quantized]) -> dict[str, Tensor]:
    return {name: _fingerprint(layer) for name, layer in layers.items()}


@torch.no_grad()
def _fingerprint(layer: Quantized) -> Tensor:
    """Return two numbers that change with the weight."""
    weight = local_part(layer.weight.detach())
    return torch.stack([weight.sum(dtype=torch.float64), weight.norm(dtype=torch.float32).double()])


@contextmanager
def _kept(layers: dict[str, Quantized]) -> Iterator[None]:
    """Restore activation scales, which a first batch may initialize."""
    acts = [act for layer in layers.values() for act in learned_acts(layer).values()]
    values_before = [(p, p.detach().clone()) for act in acts for p in act.parameters()]
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, value in values_before:
                parameter.copy_(value)
        for act in acts:
            act._forget()  # the values of a first batch are gone


@contextmanager
def _counted(layers: dict[str, Any], rows: dict[str, LayerCheck]) -> Iterator[None]:
    """Count the calls of layers."""

    def count(row: LayerCheck) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            row.calls += 1

        return hook

    handles = [layer.register_forward_pre_hook(count(rows[name])) for name, layer in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _loss(output: Any, loss_fn: Callable[[Any], Tensor] | None) -> Tensor:
    """Return a scalar that depends on the output."""
    if loss_fn is not None:
        return loss_fn(output)
    if isinstance(loss := getattr(output, "loss", None), Tensor):
        return loss
    leaves = tree_leaves(dict(output) if isinstance(output, dict) else output)
    parts = [t.float().square().mean() for t in leaves if isinstance(t, Tensor) and t.requires_grad and t.numel()]
    if not parts:
        raise ValueError(
            "the model's output has no floating point tensor that requires grad, so there is nothing to make a loss "
            "of: give loss_fn, and see that the parameters require grad"
        )
    return torch.stack([part.to(parts[0].device) for part in parts]).sum()


@torch.no_grad()
def _look_at_scales(row: LayerCheck, layer: Quantized) -> None:
    """Count scales that are at the floor or not finite, and compare scales with those of a fresh layer."""
    if layer.awaits_inputs and not layer.was_trained_awaiting:  # as by DDP, which broadcasts those of the first process
        row.notes.append(
            "has scales that were not set from its inputs, though its scale_init is 'activation': call "
            "calibrate(model, batch) before training"
        )
    weight, scale = local_part(layer.weight.detach()), local_part(layer.scale.detach())
    points = [scale] if layer.zero_point is None else [scale, local_part(layer.zero_point.detach())]
    row.not_finite = sum(int((~t.isfinite()).sum()) for t in points)
    row.at_floor = int(count_at_floor(weight, scale))
    if row.not_finite:
        row.problems.append(f"has {row.not_finite} scales that are not finite: its outputs are NaN or infinite")
    if row.at_floor:
        row.problems.append(
            f"has {row.at_floor} of {scale.numel()} scales at the floor of 1e-5, whose weights compute next to "
            "nothing: give scales a smaller learning rate (qatkernels.param_groups), and call layer.reset_scale()"
        )
    for name, act in learned_acts(layer).items():
        _look_at_activation(row, name, act)
    if not weight.isfinite().all():
        row.problems.append("has weights that are not finite")
        return
    if is_dtensor(layer.weight) or is_dtensor(layer.scale):  # of which this process has a part
        return
    fresh = initial_scale(layer.weight, without_inputs(layer.config))[0]
    alive = (fresh > MIN_SCALE) & scale.isfinite()
    if scale.shape == fresh.shape and alive.any():
        row.scale_ratio = float((scale[alive] / fresh[alive]).median())
        if not 1 / FAR <= row.scale_ratio <= FAR:
            row.problems.append(
                f"has scales {row.scale_ratio:.3g} times as large as its weights ask for: if something changed the "
                "weights in place (a merged adapter, another checkpoint), call layer.reset_scale()"
            )


def _look_at_activation(row: LayerCheck, name: str, act: LearnedActivation) -> None:
    """Report a learned scale of the input or the output that is at the floor or not finite."""
    learned = [local_part(parameter.detach()) for parameter in act.parameters()]
    what, again = ACTS[name], f"and call layer.{name}.reset_parameters(), so that the next training batch sets it"
    if not all(bool(t.isfinite().all()) for t in learned):
        row.problems.append(f"has a scale or zero point of its {what} that is not finite: find out why, {again}")
    elif int(count_act_at_floor(learned[0], act.initialized)):
        row.problems.append(
            f"has the scale of its {what} at the floor of 1e-5, so that next to nothing is left of the {what}: give "
            f"scales a smaller learning rate (qatkernels.param_groups), {again}"
        )


def _look_on_top(row: LayerCheck, layer: Quantized) -> None:
    """Report a weight that is computed from other parameters."""
    if how := reparametrization(layer):
        row.problems.append(
            f"is {how}: WinQ and SQuAT cannot change such a weight, and where a width has no zero a pruned weight is "
            "not zero; make it permanent and quantize after that"
        )


def _look_at_gradient(row: LayerCheck, layer: Quantized) -> None:
    """Report a layer that was not called, or whose scales got no gradient."""
    grad = layer.scale.grad
    row.scale_grad = None if grad is None else float(local_part(grad).norm())
    if not row.calls and grad is None:
        row.problems.append(
            "is never called by the forward of these inputs: either they do not reach it, or the model reads its "
            "weight itself and bypasses quantization; exclude it from quantize_model"
        )
    elif grad is None and layer.scale.requires_grad:
        row.problems.append(
            "is called, but its scales get no gradient: what it computes does not reach the loss, or it runs under "
            "torch.no_grad()"
        )
    elif row.scale_grad is not None and not math.isfinite(row.scale_grad):
        row.problems.append("has a gradient of its scales that is not finite")
