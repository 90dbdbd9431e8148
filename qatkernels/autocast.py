"""Which dtype torch.autocast computes a product in."""

from __future__ import annotations

import torch
from torch import Tensor

from ._torch_compat import any_autocast


def autocast_dtype(tensor: Tensor) -> torch.dtype | None:
    """Return the dtype that autocast casts ``tensor`` to for a product, or None where it leaves it as it is."""
    if not any_autocast():
        return None
    device, dtypes = tensor.device.type, (torch.float32, torch.bfloat16, torch.float16)  # float64 is left alone
    if tensor.dtype in dtypes and device != "meta" and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return None


def compute_dtype(tensor: Tensor) -> torch.dtype | None:
    """Return the 16-bit dtype that autocast computes with a float32 ``tensor`` in, or None where it does not."""
    return autocast_dtype(tensor) if tensor.dtype is torch.float32 else None
