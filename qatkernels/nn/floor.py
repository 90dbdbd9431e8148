"""Scales at the smallest value, where kernels clamp them: counting them, and the text of the warning."""

from __future__ import annotations

import torch
from torch import Tensor

from ..dtensor import local_part
from ..grids import MIN_SCALE


def count_at_floor(weight: Tensor, scale: Tensor) -> Tensor:
    """Return how many scales are at the floor though their weights are not all zero, without a device sync.

    Args:
        weight: ``[..., K]``.
        scale: scales of its rows, of its groups, or one for all of it.
    """
    low = (scale <= MIN_SCALE).flatten()
    if not low.numel() or not weight.numel():
        return low.new_zeros((), dtype=torch.int64)
    return (low & weight.reshape(low.numel(), -1).ne(0).any(-1)).sum()


def count_act_at_floor(scale: Tensor, initialized: Tensor) -> Tensor:
    """Return how many learned scales of activations are at the floor, none before a batch set them.

    Args:
        scale: the scale; of a sharded one, what this process holds.
        initialized: whether a batch set it, a boolean scalar; a DTensor has it in every process.
    """
    return ((scale <= MIN_SCALE) & local_part(initialized)).sum()


def floor_message(count: int, total: int, when: str = "") -> str:
    """Return a warning that names how many scales are at the floor, and the cause."""
    return (
        f"{count} of {total} scales have fallen to the smallest value ({MIN_SCALE:g}){when}; what they scale "
        "computes next to nothing. The learning rate of the scales is too large: take qatkernels.param_groups"
    )
