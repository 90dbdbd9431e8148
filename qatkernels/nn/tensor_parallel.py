"""Tensor parallelism for quantized and packed layers: torch's styles, which know their scales and codes.

    from qatkernels.nn.tensor_parallel import ColwiseParallel, RowwiseParallel

    plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
    torch.distributed.tensor.parallel.parallelize_module(block, mesh, plan)

For layers that are not of this library they are torch's own. This module is not imported by `qatkernels.nn`, because
torch.distributed.tensor takes most of a second to import.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor import parallel as torch_parallel

from ..ops import PackedWeight
from .grouped_quant_linear import GroupedQuantLinear
from .packed_linear import GroupedPackedLinear, Packed, PackedEmbedding
from .quant_embedding import QuantEmbedding
from .quant_linear import QuantLinear

#: Layers of a mixture's experts, which are called with the tokens and their offsets.
GROUPED = (GroupedQuantLinear, GroupedPackedLinear)
#: Dimensions of a weight ``[E, N, K]``, or ``[N, K]``, counted from its end.
EXPERTS, ROWS, COLUMNS = -3, -2, -1


class ColwiseParallel(torch_parallel.ColwiseParallel):
    """torch's ColwiseParallel, also for layers of this library: each process has some of the rows.

    Scales, zero points, codes and bias are split with the rows; one scale for the whole weight, and the learned scales
    of inputs and outputs, stay whole in every process, and their gradients are summed. Codes are those of one process
    bit for bit. Of stacked experts (:class:`GroupedQuantLinear`, :class:`GroupedPackedLinear`) each process has some of
    the rows of every expert.

    Raises:
        ValueError: by ``parallelize_module``, for an embedding of this library, whose columns share scales: give it
            :class:`RowwiseParallel`.
    """

    def _partition_linear_fn(self, name: str, module: nn.Module, device_mesh: DeviceMesh) -> None:
        if not shard(module, device_mesh, ROWS):
            super()._partition_linear_fn(name, module, device_mesh)

    def _partition_embedding_fn(self, name: str, module: nn.Module, device_mesh: DeviceMesh) -> None:
        if isinstance(module, QuantEmbedding | PackedEmbedding):
            raise ValueError(
                f"{type(module).__name__} cannot be split by columns, which share the scales of their rows: use "
                "RowwiseParallel"
            )
        super()._partition_embedding_fn(name, module, device_mesh)

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        if isinstance(module, GROUPED):
            return _of_experts(self, module, device_mesh)
        return super()._apply(module, device_mesh)


class RowwiseParallel(torch_parallel.RowwiseParallel):
    """torch's RowwiseParallel, also for layers of this library: each process has some of the columns.

    Scales of groups are split with the columns. A scale of a row, or of the whole weight, is in every process, and the
    processes sum its gradient. Sums over columns have another order than in one process; codes are the same bit for
    bit. If the processes would split a group, the weight is gathered in every forward, which is right and slow. Of
    stacked experts each process has some of the columns of every expert.

    A :class:`QuantEmbedding` is split by rows, as torch splits an ``nn.Embedding``.

    Raises:
        ValueError: by ``parallelize_module``, if processes would split a byte or a group of a packed layer, or for a
            :class:`PackedEmbedding`.
    """

    def _partition_linear_fn(self, name: str, module: nn.Module, device_mesh: DeviceMesh) -> None:
        if not shard(module, device_mesh, COLUMNS):
            super()._partition_linear_fn(name, module, device_mesh)

    def _partition_embedding_fn(self, name: str, module: nn.Module, device_mesh: DeviceMesh) -> None:
        if isinstance(module, PackedEmbedding):
            raise ValueError("PackedEmbedding cannot be sharded: leave it out of the plan, and it is whole everywhere")
        if isinstance(module, QuantEmbedding):
            shard_parameters(module, device_mesh, {"weight": 0, "scale": 0, "zero_point": 0})
        else:
            super()._partition_embedding_fn(name, module, device_mesh)

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        if not isinstance(module, GROUPED):
            return super()._apply(module, device_mesh)
        self.desired_input_layouts = (Shard(-1),)
        return _of_experts(self, module, device_mesh)


def _of_experts(style: Any, module: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """Apply one of the styles to stacked experts, whose second input, the offsets, is the same in every process."""

    def prepare(module: nn.Module, inputs: Any, mesh: DeviceMesh) -> Any:
        x = style._prepare_input_fn(style.input_layouts, style.desired_input_layouts, module, inputs, mesh)
        return (x, *inputs[1:])

    finish = partial(style._prepare_output_fn, style.output_layouts, style.use_local_output)
    split: Callable[..., None] = style._partition_linear_fn
    return distribute_module(module, mesh, split, prepare, finish)


def shard(module: nn.Module, mesh: DeviceMesh, dim: int) -> bool:
    """Shard a module along a dimension of its weight, if it belongs to a layer of this library.

    torch calls this for the layer and then for its modules; what is left alone is replicated.

    Args:
        module: the module.
        mesh: a mesh of one dimension.
        dim: ``EXPERTS``, ``ROWS`` or ``COLUMNS``.
    """
    if isinstance(module, PackedWeight):
        _shard_codes(module, mesh, dim)
        return True
    if isinstance(module, Packed):
        shard_parameters(module, mesh, {"bias": None if dim == COLUMNS else dim + 1})
        return True
    if isinstance(module, QuantLinear | GroupedQuantLinear):
        scale_dim: int | None = dim
        if module.config.per_tensor:
            scale_dim = -1 if dim == EXPERTS else None
        elif module.group_size is None:
            scale_dim = None if dim == COLUMNS else dim + 1
        elif dim == COLUMNS and module.scale.shape[-1] % mesh.size():
            scale_dim = None
        bias_dim = None if dim == COLUMNS else dim + 1
        dims = {"weight": dim, "bias": bias_dim, "scale": scale_dim, "zero_point": scale_dim}
        shard_parameters(module, mesh, dims)
        return True
    return type(module) is not nn.Linear and "weight" not in module._parameters


def shard_parameters(module: nn.Module, mesh: DeviceMesh, dims: dict[str, int | None]) -> None:
    """Replace parameters by DTensors, each sharded along a dimension, or whole in every process where that is None."""
    for name, dim in dims.items():
        parameter = module._parameters.get(name)
        if parameter is not None:
            placement = Replicate() if dim is None or parameter.numel() == 1 else Shard(dim % parameter.ndim)
            sharded = distribute_tensor(parameter.detach(), mesh, [placement])
            module._parameters[name] = nn.Parameter(sharded, requires_grad=parameter.requires_grad)


def _shard_codes(weight: PackedWeight, mesh: DeviceMesh, dim: int) -> None:
    """Replace codes, scales and zero points by DTensors."""
    groups, parts = weight.scale.shape[-1], mesh.size()
    one_scale = groups == 1
    if dim == COLUMNS:
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
            whole = dim == COLUMNS and one_scale and name != "packed"
            buffers[name] = distribute_tensor(tensor, mesh, [Replicate() if whole else Shard(dim % tensor.ndim)])
