"""The local part of quantized layers: all of a layer, or under FSDP2 this process's shard of rows or groups."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor, nn

from ..dtensor import is_dtensor, local_part, whole
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


def local(name: str, module: Quantized) -> Part:
    """Return the local part of a layer.

    If the whole weight has one scale, that scale is gathered, so all processes must call this.

    Args:
        name: name of the layer, for error messages.
        module: the layer.

    Raises:
        ValueError: if the weight is computed, or the shards split a row or a group.
    """
    check_parameters({name: module})
    weight, (scale, zero_point) = module.weight.detach(), module.quantizer.stored(module.scale, module.zero_point)
    scale, zero_point = scale.detach(), None if zero_point is None else zero_point.detach()
    if not is_dtensor(weight):
        return Part(weight, whole(scale), None if zero_point is None else whole(zero_point))
    if scale.numel() == 1:
        return Part(local_part(weight), whole(scale), None if zero_point is None else whole(zero_point))
    from torch.distributed.tensor import Replicate, Shard

    sharded = {p.dim for p in weight.placements if isinstance(p, Shard)}
    same = is_dtensor(scale) and scale.placements == weight.placements
    simple = all(isinstance(p, Replicate) or type(p) is Shard for p in weight.placements)
    # Sharding along columns gives equal chunks. They do not split a group if the number of groups divides evenly.
    groups_complete = sharded <= {0} or (
        module.group_size is not None and scale.shape[1] % weight.device_mesh.size() == 0
    )
    if not (same and simple and groups_complete):
        raise ValueError(
            f"{name} has a weight sharded as {weight.placements} and a scale as {getattr(scale, 'placements', None)}; "
            "rows (or groups) must be whole in each process: shard both along dimension 0, as fully_shard does"
        )
    return Part(local_part(weight), local_part(scale), None if zero_point is None else local_part(zero_point))


def locals_of(layers: dict[str, Quantized]) -> Iterator[tuple[Quantized, Part]]:
    """Yield each layer with its local part, which may be empty."""
    for name, module in layers.items():
        yield module, local(name, module)
