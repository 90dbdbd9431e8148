"""Dynamic activation quantization: symmetric integers per token, the scale taken from the token itself.

The straight-through rule is the identity (nothing is ever clipped) and the scale gets no gradient, so forward mode and
every higher derivative are the identity too.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..arguments import check_integers, check_tensors
from ._autograd import OpFunction
from ._op import define


def _reference(x: Tensor, bits: int) -> Tensor:
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    qmax = 2.0 ** (bits - 1) - 1
    values = x.to(wide)
    if x.numel() == 0:
        return torch.empty_like(x)
    # The smallest normal number keeps an all-zero token at zero; a scale floor of 1e-5 would erase small activations.
    scale = (values.abs().amax(-1, keepdim=True) / qmax).clamp_min(torch.finfo(torch.float32).tiny)
    codes = torch.round((values / scale).clamp(-qmax, qmax))
    return ((codes + 0.0) * scale).to(x.dtype)


DYNAMIC = define(
    "fake_quantize_dynamic", "Tensor x, int bits",
    """
    x: float [*T, K]
    require 2 <= bits <= 8; bits is {bits}, must be 2 to 8
    -> out: like(x) [*T, K]
    """,
    reference=_reference,
)  # fmt: skip


class FakeQuantizeDynamic(OpFunction):
    """y = Q(x) with the identity as its derivative."""

    op = DYNAMIC
    saves = ()

    @classmethod
    def gradients(cls, ctx: Any, kept: Any, *gs: Any) -> dict[str, Tensor | None]:
        """The identity."""
        return {"x": gs[0]}

    @classmethod
    def tangent(cls, ctx: Any, kept: Any, tangents: Any) -> Any:
        """The identity, in memory of its own."""
        return tangents.x.clone()


def fake_quantize_dynamic(x: Tensor, bits: int = 8) -> Tensor:
    """Fake-quantize activations to symmetric integers, one scale per token.

    Args:
        x: activations ``[..., features]``, float32, bfloat16, float16 or float64; the last dimension shares a scale.
        bits: 2 to 8.

    Returns:
        Tensor like ``x`` with values ``s * round(x / s)``, ``s = max(abs(x)) / (2**(bits - 1) - 1)`` per token. A token
        that holds NaN or an infinity becomes NaN.

    Raises:
        TypeError: if an argument is of another type, naming it.
        RuntimeError: if ``bits`` or the dtype does not fit.
    """
    check_tensors(x=x)
    check_integers(bits=bits)
    y: Tensor = DYNAMIC.call(x, bits)
    return y
