"""Arithmetic that gives the same bits on every device."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def quotient(x: Tensor, by: float) -> Tensor:
    """Return ``x / by``, correctly rounded if the dtype of ``x`` holds ``by``.

    On CUDA torch multiplies by the reciprocal if the divisor is a number, which rounds twice. It divides by a tensor on
    the same device. The reciprocal of a power of two is exact.
    """
    if abs(math.frexp(by)[0]) == 0.5:
        return x / by
    return x / torch.full((), by, dtype=x.dtype, device=x.device)
