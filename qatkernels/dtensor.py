"""Functions for DTensors (sharded over processes) that do not import torch.distributed.tensor.

That import takes most of a second. Without it no DTensor can exist, so `sys.modules` tells whether there is one.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor
    from typing_extensions import TypeIs

#: What a rule returns: placements of the outputs and of the arguments, for each way to shard a call along one dimension
#: of the mesh.
Shardings = list[tuple[list[Any], list[Any]]]
#: How calls of an op may be sharded, by the op. Rules are functions of the op's arguments, as torch's
#: ``register_sharding`` takes them.
RULES: dict[Any, Callable[..., Shardings]] = {}
_registered = False


def is_dtensor(value: Any) -> TypeIs[DTensor]:
    """Whether a value is a DTensor. With the first one, the rules for sharded calls of ops are given to torch."""
    module = sys.modules.get("torch.distributed.tensor")
    if module is None or not isinstance(value, module.DTensor):
        return False
    if not _registered:
        _register_rules()
    return True


def _register_rules() -> None:
    global _registered
    from torch.distributed.tensor.experimental import register_sharding

    for op, rule in RULES.items():
        register_sharding(op)(rule)
    _registered = True


def is_fsdp(module: nn.Module) -> bool:
    """Whether ``fully_shard`` (FSDP2) manages a module."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and isinstance(module, fsdp.FSDPModule)


def local_part(tensor: Tensor) -> Tensor:
    """Return this process's shard of a DTensor, and any other tensor as it is."""
    return tensor.to_local() if is_dtensor(tensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """Return the full tensor of a DTensor, and any other tensor as it is. All processes must call this."""
    return tensor.full_tensor() if is_dtensor(tensor) else tensor


def gathered(tensor: DTensor, dims: int) -> Tensor:
    """Return a DTensor gathered along the first dimensions of its mesh; a DTensor on the others, if there are others.

    Its gradient is the mean over the processes of these dimensions, as FSDP2's is. All processes must call this, and
    run the backward.

    Args:
        tensor: the tensor.
        dims: how many dimensions of the mesh FSDP2 shards parameters over.
    """
    return _Gathered.apply(tensor, dims)


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Any, dims: int) -> Tensor:
        from torch.distributed.tensor import DTensor, Replicate

        mesh, placements = tensor.device_mesh, tensor.placements
        ctx.mesh, ctx.placements, ctx.dims = mesh, placements, dims
        ctx.layout = {"shape": tensor.shape, "stride": tensor.stride()}
        if dims == mesh.ndim:
            return whole(tensor.detach())
        rest = mesh[mesh.mesh_dim_names[dims:]]
        here = tensor.detach().redistribute(placements=[Replicate()] * dims + list(placements[dims:])).to_local()
        return DTensor.from_local(here, rest, placements[dims:], run_check=False, **ctx.layout)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Any) -> Any:
        from torch.distributed.tensor import DTensor, Partial

        dims, rest = ctx.dims, ctx.placements[ctx.dims :]
        here = grad.redistribute(placements=rest).to_local() if is_dtensor(grad) else grad
        partial = [*[Partial()] * dims, *rest]
        parts = DTensor.from_local(here.contiguous(), ctx.mesh, partial, run_check=False, **ctx.layout)
        return parts.redistribute(placements=ctx.placements) / math.prod(ctx.mesh.shape[:dims]), None


def part_of_sum(tensor: Any) -> Tensor:
    """Return what each process adds of a tensor that all have, so that the sum over the processes has it once.

    Its gradient is that of one process; all have the same.
    """
    return _PartOfSum.apply(tensor)


class _PartOfSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: DTensor) -> Tensor:
        ctx.mesh, ctx.placements = tensor.device_mesh, tensor.placements
        return tensor.to_local() / tensor.device_mesh.size()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        from torch.distributed.tensor import DTensor

        return DTensor.from_local(grad, ctx.mesh, ctx.placements, run_check=False)


def follows(scale: Sequence[int], weight: Sequence[int], dim: int, parts: int) -> bool | None:
    """Whether scales are split with their weight where it is sharded.

    Args:
        scale: shape of the scales: leading dimensions of the weight's shape, or with groups instead of columns, or one.
        weight: shape of the weight.
        dim: dimension along which the weight is sharded.
        parts: number of shards.

    Returns:
        True if they are, False if every shard needs all of them, and None if shards would split groups.
    """
    if dim >= len(scale) or scale[dim] == 1:
        return False
    if scale[dim] == weight[dim]:
        return True
    return None if scale[dim] % parts or weight[dim] % parts else True


def sharded_dims(tensor: DTensor) -> dict[int, int]:
    """Return the dimensions along which a DTensor is sharded, by the dimension of the mesh."""
    # FSDP2 shards what tensor parallel has sharded by a placement of its own class.
    dims = {i: getattr(placement, "dim", None) for i, placement in enumerate(tensor.placements)}
    return {i: dim for i, dim in dims.items() if dim is not None}


def splits_groups(scale: Tensor, weight: DTensor) -> bool:
    """Whether groups of a weight, which share a scale, lie in several shards."""
    shards = [(dim, weight.device_mesh.size(i)) for i, dim in sharded_dims(weight).items()]
    return any(follows(scale.shape, weight.shape, *shard) is None for shard in shards)


def splits_columns(weight: DTensor) -> bool:
    """Whether the last dimension of a weight is sharded."""
    return weight.ndim - 1 in sharded_dims(weight).values()


def beside(scale: Any, weight: DTensor) -> Tensor:
    """Return scales such that each process has those of its part of the weight; their gradient comes back as they were.

    Where shards of the weight split groups, scales are whole, and the op will gather the weight.
    """
    from torch.distributed.tensor import Replicate

    if scale.placements == weight.placements and scale.numel() > 1 and scale.shape[0] == weight.shape[0]:
        return scale
    placements: list[Any] = [Replicate()] * weight.device_mesh.ndim
    for i, dim in sharded_dims(weight).items():
        if follows(scale.shape, weight.shape, dim, weight.device_mesh.size(i)):
            placements[i] = weight.placements[i]
    split_with: Tensor = scale.redistribute(weight.device_mesh, placements)
    return split_with


def replicated(tensor: Tensor, like: DTensor) -> DTensor:
    """Return a tensor, that of the first process, as a DTensor that every process of a mesh has."""
    from torch.distributed.tensor import Replicate, distribute_tensor

    return distribute_tensor(tensor, like.device_mesh, [Replicate()] * like.device_mesh.ndim)


def summed(tensor: DTensor) -> Tensor:
    """Return a DTensor without sums that are still to be taken over processes; what is sharded stays so."""
    from torch.distributed.tensor import Replicate

    placements = [Replicate() if placement.is_partial() else placement for placement in tensor.placements]
    taken: Tensor = tensor.redistribute(tensor.device_mesh, placements)
    return taken


def for_own_tokens(tensor: DTensor) -> Tensor:
    """Return the full tensor of a DTensor, for tokens that differ between processes; its gradient is their sum."""
    from torch.distributed.tensor import Partial

    full: Any = on_every_process(tensor)
    used: Tensor = full.to_local(grad_placements=[Partial()] * tensor.device_mesh.ndim)
    return used


def on_every_process(tensor: Any) -> Tensor:
    """Return a DTensor such that every process has the whole of it; the gradient comes back as it was."""
    from torch.distributed.tensor import Replicate

    whole_there: Tensor = tensor.redistribute(tensor.device_mesh, [Replicate()] * tensor.device_mesh.ndim)
    return whole_there


def total(sums: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Return the sum over all weights of a value that each process computed from its local parts.

    All processes must call this.

    Args:
        sums: for each weight, the weight and the value of its local part.
    """
    import torch.distributed as dist

    device = sums[0][1].device
    result = torch.zeros_like(sums[0][1])
    sharded: dict[Any, Tensor] = {}
    groups: dict[Any, list[Any]] = {}
    for weight, value in sums:
        value = value.to(device)
        if is_dtensor(weight):
            key = (weight.device_mesh, weight.placements)
            sharded[key] = sharded[key] + value if key in sharded else value.clone()
            groups[key] = [weight.device_mesh.get_group(i) for i in sharded_dims(weight)]
        else:
            result = result + value
    for key, value in sharded.items():
        for group in groups[key]:
            dist.all_reduce(value, group=group)
        result = result + value
    return result


def mean_over(tensor: DTensor, value: Tensor) -> Tensor:
    """Return the mean of a value over the processes that share a DTensor. All of them must call this."""
    import torch.distributed as dist

    mesh, result = tensor.device_mesh, value.detach().clone()
    for i in range(mesh.ndim):
        dist.all_reduce(result, group=mesh.get_group(i))
    return result / mesh.size()


def reduce_in_every_backward(model: nn.Module) -> None:
    """Let FSDP2 reduce the gradients of a model over the processes in every backward.

    FSDP2 has no getter for this flag, so it cannot be restored. Loops set it for each micro-batch anyway.
    """
    for module in model.modules():
        if is_fsdp(module):
            module.set_requires_gradient_sync(True, recurse=False)  # type: ignore[operator]
