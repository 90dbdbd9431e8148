"""Parameter groups for an optimizer: scales get a learning rate that fits their size, and never decay."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from ..dtensor import local_part, whole
from ._quantize_model import quantized_modules
from .activation import ACTS, LearnedActivation, learned_acts, scales_of
from .config import QuantConfig
from .floor import count_act_at_floor, count_at_floor
from .quantized import Quantized

#: With the default ``scale_lr``, one step changes a scale by this share of the relative change of a weight. At 1, some
#: scales reach zero within 250 steps of AdamW at 1, 2, 4 and 8 bits; at 0.1 none does.
RELATIVE_RATE = 0.1


def param_groups(
    model: nn.Module, *, lr: float, scale_lr: float | None = None, weight_decay: float = 0.0
) -> list[dict[str, Any]]:
    """Return the trainable parameters of a quantized model as groups for a torch optimizer.

        optimizer = torch.optim.AdamW(qatkernels.param_groups(model, lr=1e-3, weight_decay=0.1))

    Adam and similar optimizers move every parameter by about the learning rate, whatever its gradient. A scale is much
    smaller than a weight: at 8 bits about a hundredth of it. With the learning rate of weights, scales cross zero
    within a few steps, and their rows compute nothing from then on.

    Each group has a ``"name"``, so that an optimizer for matrices (Muon) can be given the matrices only:

    - ``"weights"``: matrices and everything of more dimensions, except embeddings; the only group that decays;
    - ``"scales"``: scales and zero points of weights and activations;
    - ``"others"``: biases, norms, embeddings.

    Args:
        model: a model that :func:`quantize_model` returned, wrapped (DDP, FSDP2) or not. Take the groups after moving
            and wrapping it.
        lr: learning rate of weights and others.
        scale_lr: learning rate of scales and zero points. If None it follows from the model (our rule): a tenth of
            ``lr``, times the size of the scales over the size of their weights (its median over layers of the same
            configuration; each configuration has a group of its own, all named ``"scales"``). Zero points count in
            codes, and get a tenth of ``lr`` over the size of the weights.
        weight_decay: decay of the group ``"weights"``.

    Returns:
        Groups with ``"params"``, ``"lr"``, ``"weight_decay"`` and ``"name"``; none is empty. Frozen parameters are left
        out.

    Raises:
        ValueError: if a rate or the decay is negative or not finite, the model has no quantized layer, or ``scale_lr``
            is None and cannot be computed (a model on meta, an activation scale that is not initialized).
    """
    for name, value in (("lr", lr), ("scale_lr", scale_lr), ("weight_decay", weight_decay)):
        _check_rate(name, value, optional=name == "scale_lr")
    if not (layers := quantized_modules(model)):
        raise ValueError("model has no quantized layer: call quantize_model first")

    rates = [(scale_lr, scales_of(model))] if scale_lr is not None else _fitting_rates(layers, lr * RELATIVE_RATE)
    return param_groups_from_rates(model, lr, weight_decay, rates)


def param_groups_from_rates(
    model: nn.Module, lr: float, weight_decay: float, scale_rates: Sequence[tuple[float, Sequence[nn.Parameter]]] = ()
) -> list[dict[str, Any]]:
    """Return the groups of :func:`param_groups` for learning rates of the scales that the caller chose.

    For loops that also train in full precision: the model need not be quantized, and nothing is checked.

    Args:
        model: the model, wrapped or not.
        lr: learning rate of weights and others.
        weight_decay: decay of the group ``"weights"``.
        scale_rates: learning rates, each with the scales and zero points that get it. A scale in none of them is in no
            group.

    Returns:
        Groups with ``"params"``, ``"lr"``, ``"weight_decay"`` and ``"name"``, as :func:`param_groups` returns them.
    """
    learned = set(map(id, scales_of(model)))
    embeddings = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    rest = [p for p in model.parameters() if id(p) not in learned]
    matrix = {id(p) for p in rest if p.ndim >= 2 and id(p) not in embeddings}
    parts = [
        ("weights", lr, weight_decay, [p for p in rest if id(p) in matrix]),
        *(("scales", rate, 0.0, scales) for rate, scales in scale_rates),
        ("others", lr, 0.0, [p for p in rest if id(p) not in matrix]),
    ]
    groups = []
    for name, rate, decay, parameters in parts:
        if trained := [p for p in dict.fromkeys(parameters) if p.requires_grad]:
            groups.append({"params": trained, "lr": rate, "weight_decay": decay, "name": name})
    return groups


@torch.no_grad()
def scales_at_floor(model: nn.Module) -> dict[str, int]:
    """Count the scales at or below ``MIN_SCALE`` (1e-5), where every kernel clamps them, by layer.

    A row of zeros has such a scale from the start and is not counted, and neither is the scale of activations that no
    batch has set. Any other row, input or output with one computes next to nothing: the scale's learning rate is too
    large, see :func:`param_groups`. Waits for the device.

    Args:
        model: a quantized model; of a sharded one, what this process holds is counted.

    Returns:
        The number of such scales by the name of the layer, or of its quantizer of the input (``"0.act"``) or the output
        (``"0.out_act"``), without those that have none.
    """
    layers = {name: layer for name, layer in quantized_modules(model).items() if not layer.scale.is_meta}
    counts = {
        name: int(count_at_floor(local_part(layer.weight.detach()), local_part(layer.scale.detach())))
        for name, layer in layers.items()
    }
    for name, act in model.named_modules():
        if isinstance(act, LearnedActivation) and not act.scale.is_meta:
            counts[name] = int(count_act_at_floor(local_part(act.scale.detach()), act.initialized))
    return {name: count for name, count in counts.items() if count}


def _check_rate(name: str, value: Any, optional: bool) -> None:
    if optional and value is None:
        return
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
        also = ", or None to take it from the size of the scales" if optional else ""
        raise ValueError(f"{name} is {value!r}, must be a finite number of at least 0{also}")


@torch.no_grad()
def _fitting_rates(layers: dict[str, Quantized], share: float) -> list[tuple[float, list[nn.Parameter]]]:
    """Return learning rates, and their parameters, that change scales by ``share`` over the size of a weight.

    Each parameter appears once, however many layers share it.
    """
    alike: dict[QuantConfig, dict[str, Quantized]] = {}
    for name, layer in layers.items():
        alike.setdefault(layer.config, {})[name] = layer
    rates: list[tuple[float, list[nn.Parameter]]] = []
    known: set[int] = set()

    def add(rate: float, parameters: Iterable[nn.Parameter | None]) -> None:
        new = {id(p): p for p in parameters if p is not None and id(p) not in known}
        known.update(new)
        if new:
            rates.append((rate, list(new.values())))

    for same in alike.values():
        sizes = [_size(name, layer.weight) for name, layer in same.items()]
        size = median([s for s in sizes if s > 0] or [1.0])
        relative = share / size
        scale = median([_mean(layer.scale) for layer in same.values()])
        add(relative * scale, (layer.scale for layer in same.values()))
        add(relative, (layer.zero_point for layer in same.values()))
        for end in ACTS:  # inputs and outputs have scales of different sizes
            acts = {name: act for name, layer in same.items() if (act := learned_acts(layer).get(end)) is not None}
            if acts:
                add(relative * median(_sizes_of_acts(acts)), (a._parameters.get("scale") for a in acts.values()))
                add(relative, (a._parameters.get("zero_point") for a in acts.values()))
    return rates


def _sizes_of_acts(acts: Mapping[str, LearnedActivation]) -> list[float]:
    """Return the scale of each learned quantizer of activations, by the name of its layer."""
    for name, act in acts.items():
        if not bool(act.initialized):
            raise ValueError(
                f"scale_lr is None, and the activation scale of {name or 'the model'} has not been "
                "initialized, so that its size is unknown: call calibrate(model, batch) first, or give scale_lr"
            )
    return [_mean(act.scale) for act in acts.values()]


def _size(name: str, weight: Tensor) -> float:
    """Return the root mean square of a weight."""
    if weight.is_meta:
        raise ValueError(
            f"scale_lr is None, and the weight of {name or 'the model'} is on meta, so that its size is unknown: "
            "give scale_lr, or take the groups when the weights are there"
        )
    norm = torch.linalg.vector_norm(weight.detach(), dtype=torch.float32)
    return float(whole(norm)) / math.sqrt(max(weight.numel(), 1))


def _mean(scale: Tensor) -> float:
    return float(whole(scale.detach().abs().mean()))
