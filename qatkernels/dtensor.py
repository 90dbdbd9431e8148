"""Functions for DTensors (sharded over processes) that do not import torch.distributed.tensor.

That import takes most of a second. Without it no DTensor can exist, so `sys.modules` tells whether there is one.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor
    from typing_extensions import TypeIs


def is_dtensor(value: Any) -> TypeIs[DTensor]:
    """Whether a value is a DTensor."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(value, module.DTensor)


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


def gathered(tensor: Tensor) -> Tensor:
    """Return the full tensor of a DTensor; its gradient is the mean over the processes, as FSDP2's is.

    All processes must call this, and run the backward.
    """
    return _Gathered.apply(tensor)


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: DTensor) -> Tensor:
        ctx.mesh, ctx.placements = tensor.device_mesh, tensor.placements
        return whole(tensor.detach())

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        from torch.distributed.tensor import DTensor, Partial

        mesh = ctx.mesh
        parts = DTensor.from_local(grad.contiguous(), mesh, [Partial()] * mesh.ndim, run_check=False)
        return parts.redistribute(placements=ctx.placements) / mesh.size()
