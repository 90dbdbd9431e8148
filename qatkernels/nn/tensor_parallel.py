"""Tensor parallelism for quantized and packed layers: torch's styles, which know their scales and codes.

    from qatkernels.nn.tensor_parallel import ColwiseParallel, RowwiseParallel

    plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
    torch.distributed.tensor.parallel.parallelize_module(block, mesh, plan)

For layers that are not of this library they are torch's own. This module is not imported by `qatkernels.nn`, because
torch.distributed.tensor takes most of a second to import.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor import parallel as torch_parallel

from ..ops import PackedWeight
from .packed_linear import PackedEmbedding, PackedLinear
from .quant_embedding import QuantEmbedding
from .quant_linear import QuantLinear


class ColwiseParallel(torch_parallel.ColwiseParallel):
    """torch's ColwiseParallel, also for QuantLinear and PackedLinear: each process has some of the rows.

    Scales, zero points, codes and bias are split with the rows; one scale for the whole weight, and the learned scales
    of inputs and outputs, stay whole in every process, and their gradients are summed. Codes are those of one process
    bit for bit.

    Raises:
        ValueError: by ``parallelize_module``, for an embedding of this library, whose columns share scales: give it
            :class:`RowwiseParallel`.
    """

    def _partition_linear_fn(self, name: str, module: nn.Module, device_mesh: DeviceMesh) -> None:
        if not _partition(module, device_mesh, 0):
            super()._partition_linear_fn(name, module, device_mesh)

    def _partition_embedding_fn(self, name: str, module: nn.Module, device_mesh: DeviceMesh) -> None:
        if isinstance(module, QuantEmbedding | PackedEmbedding):
            raise ValueError(
                f"{type(module).__name__} cannot be split by columns, which share the scales of their rows: use "
                "RowwiseParallel"
            )
        super()._partition_embedding_fn(name, module, device_mesh)


class RowwiseParallel(torch_parallel.RowwiseParallel):
    """torch's RowwiseParallel, also for QuantLinear and PackedLinear: each process has some of the columns.

    Scales of groups are split with the columns. A scale of a row, or of the whole weight, is in every process, and the
    processes sum its gradient. Sums over columns have another order than in one process; codes are the same bit for
    bit. If the processes would split a group, the weight is gathered in every forward, which is right and slow.

    A :class:`QuantEmbedding` is split by rows, as torch splits an ``nn.Embedding``.

    Raises:
        ValueError: by ``parallelize_module``, if processes would split a byte or a group of a packed layer, or for a
            :class:`PackedEmbedding`.
    """

    def _partition_linear_fn(self, name: str, module: nn.Module, device_mesh: DeviceMesh) -> None:
        if not _partition(module, device_mesh, 1):
            super()._partition_linear_fn(name, module, device_mesh)

    def _partition_embedding_fn(self, name: str, module: nn.Module, device_mesh: DeviceMesh) -> None:
        if isinstance(module, PackedEmbedding):
            raise ValueError("PackedEmbedding cannot be sharded: leave it out of the plan, and it is whole everywhere")
        if isinstance(module, QuantEmbedding):
            _shard_parameters(module, device_mesh, {"weight": 0, "scale": 0, "zero_point": 0})
        else:
            super()._partition_embedding_fn(name, module, device_mesh)


def _partition(module: nn.Module, mesh: DeviceMesh, dim: int) -> bool:
    """Shard a module along dimension 0 or 1 of its weight, if it belongs to a layer of this library.

    torch calls this for the layer and then for its modules; what is left alone is replicated.
    """
    if isinstance(module, PackedWeight):
        _shard_codes(module, mesh, dim)
        return True
    if isinstance(module, PackedLinear):
        if module.bias is not None:
            _shard_parameters(module, mesh, {"bias": 0 if dim == 0 else None})
        return True
    if isinstance(module, QuantLinear):
        columns = module.group_size is not None and module.scale.shape[1] % mesh.size() == 0
        scales = None if module.config.per_tensor else 0 if dim == 0 else 1 if columns else None
        dims = {"weight": dim, "bias": 0 if dim == 0 else None, "scale": scales, "zero_point": scales}
        _shard_parameters(module, mesh, dims)
        return True
    return type(module) is not nn.Linear and "weight" not in module._parameters


def _shard_parameters(module: nn.Module, mesh: DeviceMesh, dims: dict[str, int | None]) -> None:
    """Replace parameters by DTensors, each sharded along a dimension, or whole in every process where that is None."""
    for name, dim in dims.items():
        parameter = module._parameters.get(name)
        if parameter is None:
            continue
        if parameter.numel() == 1:
            dim = None
        sharded = distribute_tensor(parameter.detach(), mesh, [Replicate() if dim is None else Shard(dim)])
        module._parameters[name] = nn.Parameter(sharded, requires_grad=parameter.requires_grad)


def _shard_codes(weight: PackedWeight, mesh: DeviceMesh, dim: int) -> None:
    """Replace codes, scales and zero points by DTensors."""
    groups, parts = weight.scale.shape[-1], mesh.size()
    one_scale = groups == 1
    if dim == 1:
        cols = weight.cols
        if cols % parts or cols // parts * weight.bits % 8 or not (one_scale or groups % parts == 0):
            raise ValueError(
                f"the weight of {weight.layer or 'this layer'} has {cols} columns of {weight.bits} bits and {groups} "
                f"scales a row: {parts} processes would split a byte or a group. Use ColwiseParallel, or fewer "
                "processes"
            )
    buffers: dict[str, Any] = weight._buffers
    for name, tensor in buffers.items():
        if isinstance(tensor, Tensor):
            whole = dim == 1 and one_scale and name != "packed"
            buffers[name] = distribute_tensor(tensor, mesh, [Replicate() if whole else Shard(dim)])
