"""The dtype in which a matrix product is computed under torch.autocast."""

from __future__ import annotations

import torch
from torch import Tensor

from ._torch_compat import any_autocast


def autocast_dtype(tensor: Tensor) -> torch.dtype | None:
    """Return the dtype that autocast casts ``tensor`` to for a product, or None if it does not cast it."""
    if not any_autocast():
        return None
    device, dtypes = tensor.device.type, (torch.float32, torch.bfloat16, torch.float16)  # float64 is never cast
    if tensor.dtype in dtypes and device != "meta" and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return None


def compute_dtype(tensor: Tensor) -> torch.dtype | None:
    """Return the dtype of :func:`autocast_dtype` for a float32 ``tensor``, and None for any other dtype."""
    return autocast_dtype(tensor) if tensor.dtype is torch.float32 else None
