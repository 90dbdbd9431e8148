"""The local part of quantized layers: all of a layer, or under FSDP2 this process's shard of rows or groups."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor, nn

from ..dtensor import (
    beside,
    follows,
    is_dtensor,
    local_part,
    sharded_dims,
    splits_columns,
    splits_groups,
    whole,
)
from ..nn import quantized_modules
from ..nn.quantized import Quantized, check_weights


class Part(NamedTuple):
    """The local part of a layer's weight, and the scales and zero points with which forwards quantize that part."""

    weight: Tensor
    scale: Tensor
    zero_point: Tensor | None


def layers_by_weight(model: nn.Module) -> dict[str, Quantized]:
    """Return the quantized layers by name. Of layers that share a weight, only the first is listed.

    Raises:
        ValueError: if there is no quantized layer, a weight is computed (pruned, or parametrized by weight_norm), or
            layers share a weight and quantize it differently.
    """
    by_weight: dict[int, tuple[str, Quantized]] = {}
    check_parameters(quantized_modules(model))
    for name, module in quantized_modules(model).items():
        first_name, first = by_weight.setdefault(id(module.weight), (name, module))
        if module.scale is not first.scale or module.config != first.config:
            raise ValueError(
                f"{first_name} and {name} share a weight but quantize it differently: give both the same scales and "
                "configuration"
            )
    if not by_weight:
        raise ValueError("the model has no quantized layer: call quantize_model first")
    return dict(by_weight.values())


def check_parameters(layers: dict[str, Quantized]) -> None:
    """Raise ValueError if a layer's weight is computed: a change of it would be lost, and it has no gradient."""
    check_weights(layers, "WinQ's resets and SQuAT's perturbations would be lost, and statistics of the past")


def local(name: str, module: Quantized, *, whole_rows: bool = False) -> Part:
    """Return the local part of a layer.

    Scales that several shards need (those of split rows, or of the whole weight) are gathered, so all processes must
    call this.

    Args:
        name: name of the layer, for error messages.
        module: the layer.
        whole_rows: whether what shares a scale must be whole: weights are rotated.

    Raises:
        ValueError: if the weight is computed, it is sharded and its scale is not, the shards split a group, or with
            ``whole_rows`` a row with one scale.
    """
    check_parameters({name: module})
    weight, (scale, zero_point) = module.weight.detach(), module.quantizer.stored(module.scale, module.zero_point)
    scale, zero_point = scale.detach(), None if zero_point is None else zero_point.detach()
    if not is_dtensor(weight):
        return Part(weight, whole(scale), None if zero_point is None else whole(zero_point))
    if scale.numel() == 1:
        return Part(local_part(weight), whole(scale), None if zero_point is None else whole(zero_point))
    if not is_dtensor(scale):
        raise ValueError(
            f"{name} has a weight sharded as {weight.placements} and a scale that is not sharded, must have both as "
            "DTensors: shard them with fully_shard, shard_scales or a style of qatkernels.nn.tensor_parallel"
        )
    if whole_rows and module.group_size is None and splits_columns(weight):
        raise ValueError(
            f"{name} has a weight sharded as {weight.placements}, which splits rows between processes, and a rotation "
            "needs them whole: shard rows, as fully_shard and ColwiseParallel do, or leave the rotation out"
        )
    if splits_groups(scale, weight):
        raise ValueError(
            f"{name} has a weight sharded as {weight.placements}, which splits groups of {module.group_size} columns "
            "between processes: shard rows, as fully_shard and ColwiseParallel do, or fewer processes"
        )
    here = local_part(beside(scale, weight)), None if zero_point is None else local_part(beside(zero_point, weight))
    return Part(local_part(weight), *here)


def locals_of(layers: dict[str, Quantized], *, whole_rows: bool = False) -> Iterator[tuple[Quantized, Part]]:
    """Yield each layer with its local part, which may be empty; ``whole_rows`` is for :func:`local`."""
    for name, module in layers.items():
        yield module, local(name, module, whole_rows=whole_rows)


def holders(module: Quantized) -> int:
    """Return how many processes have a part of the weights that one scale serves."""
    weight, scale = module.weight, module.scale
    if not is_dtensor(weight):
        return 1
    sizes = {dim: weight.device_mesh.size(i) for i, dim in sharded_dims(weight).items()}
    return math.prod(n for dim, n in sizes.items() if follows(scale.shape, weight.shape, dim, n) is False)
