"""What this process holds of a quantized layer: everything, or under FSDP2 a shard of whole rows or groups."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..dtensor import is_dtensor, local_part, whole
from ..nn import quantized_modules
from ..nn.quantized import Quantized, check_weights


class Part(NamedTuple):
    """The local part of a layer's weight and what quantizes it."""

    weight: Tensor
    scale: Tensor
    zero_point: Tensor | None


def layers_by_weight(model: nn.Module) -> dict[str, Quantized]:
    """Return the quantized layers by name, one for each weight.

    Raises:
        ValueError: if there is none, one has a weight that is computed (pruned, or parametrized by weight_norm), or
            layers share a weight and quantize it differently.
    """
    first: dict[int, tuple[str, Quantized]] = {}
    check_parameters(quantized_modules(model))
    for name, module in quantized_modules(model).items():
        known, twin = first.setdefault(id(module.weight), (name, module))
        if module.scale is not twin.scale or module.config != twin.config:
            raise ValueError(f"{known} and {name} share a weight but not its scales: it has no one grid")
    if not first:
        raise ValueError("the model has no quantized layer: call quantize_model first")
    return dict(first.values())


def check_parameters(layers: dict[str, Quantized]) -> None:
    """Raise ValueError if a layer's weight is computed: what is written to it is lost, and it has no gradient."""
    check_weights(layers, "WinQ's resets and SQuAT's perturbations would be lost, and statistics of the past")


def local(name: str, module: Quantized) -> Part:
    """Return the local part of a layer; a scale for the whole weight is gathered, which all processes must join.

    Raises:
        ValueError: if the weight is computed, or sharded so that a row or a group is not whole.
    """
    check_parameters({name: module})
    weight, scale = module.weight.detach(), module.quantizer.stored(module.scale).detach()
    zero_point = None if module.zero_point is None else module.zero_point.detach()
    if not is_dtensor(weight):
        return Part(weight, local_part(scale), None if zero_point is None else local_part(zero_point))
    if scale.numel() == 1:
        return Part(local_part(weight), whole(scale), None if zero_point is None else whole(zero_point))
    from torch.distributed.tensor import Replicate, Shard

    sharded = {p.dim for p in weight.placements if isinstance(p, Shard)}
    same = is_dtensor(scale) and scale.placements == weight.placements
    simple = all(isinstance(p, Replicate) or type(p) is Shard for p in weight.placements)
    # Equal chunks of columns are whole groups if the groups divide evenly.
    unbroken = sharded <= {0} or (module.group_size is not None and scale.shape[1] % weight.device_mesh.size() == 0)
    if not (same and simple and unbroken):
        raise ValueError(
            f"{name} has a weight sharded as {weight.placements} and a scale as {getattr(scale, 'placements', None)}; "
            "rows (or groups) must be whole in each process: shard both along dimension 0, as fully_shard does"
        )
    return Part(local_part(weight), local_part(scale), None if zero_point is None else local_part(zero_point))


def locals_of(layers: dict[str, Quantized]) -> Iterator[tuple[Quantized, Part]]:
    """Yield each layer and its local part, which may be empty."""
    for name, module in layers.items():
        yield module, local(name, module)


def total(sums: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Return the sum of values that processes computed from their parts of weights.

    Args:
        sums: weights and the value of each one's local part.
    """
    device = sums[0][1].device
    everything = torch.zeros_like(sums[0][1])
    sharded: dict[Any, Tensor] = {}
    groups: dict[Any, list[dist.ProcessGroup]] = {}
    for weight, value in sums:
        value = value.to(device)
        if is_dtensor(weight):
            key = (weight.device_mesh, weight.placements)
            sharded[key] = sharded[key] + value if key in sharded else value.clone()
            groups[key] = [weight.device_mesh.get_group(i) for i, p in enumerate(weight.placements) if p.is_shard()]
        else:
            everything = everything + value
    for key, value in sharded.items():
        for group in groups[key]:
            dist.all_reduce(value, group=group)
        everything = everything + value
    return everything
