"""Functions for DTensors (sharded over processes) that do not import torch.distributed.tensor.

That import takes most of a second. Without it no DTensor can exist, so `sys.modules` tells whether there is one.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

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
