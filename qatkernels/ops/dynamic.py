"""Dynamic activation quantization: each token is quantized to symmetric integers, with a scale computed from the token.

The straight-through rule is the identity, because nothing is clipped, and the scale gets no gradient. So forward mode
and double backward are the identity too.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..arguments import check_integers, check_tensors
from ..arithmetic import quotient
from ..dtensor import is_dtensor
from ._autograd import OpFunction
from ._op import define


def _reference(x: Tensor, bits: int) -> Tensor:
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    qmax = 2.0 ** (bits - 1) - 1
    values = x.to(wide)
    if x.numel() == 0:
        return torch.empty_like(x)
    # The floor keeps a token of zeros at zero. It is the smallest normal number, because 1e-5, as for weights, would
    # round small activations to zero.
    scale = quotient(values.abs().amax(-1, keepdim=True), qmax).clamp_min(torch.finfo(torch.float32).tiny)
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
    def gradients(cls, ctx: Any, saved: Any, *gs: Any) -> dict[str, Tensor | None]:
        """Return the gradient of y."""
        return {"x": gs[0]}

    @classmethod
    def tangent(cls, ctx: Any, saved: Any, tangents: Any) -> Any:
        """Return a copy of the tangent of x, which has its own memory, as y has."""
        return tangents.x.clone()


def fake_quantize_dynamic(x: Tensor, bits: int = 8) -> Tensor:
    """Fake-quantize activations to symmetric integers, one scale per token.

    Args:
        x: activations ``[..., features]``, float32, bfloat16, float16 or float64; a token is a row of features.
        bits: 2 to 8.

    Returns:
        Tensor like ``x`` with values ``s * round(x / s)``, where ``s = max(abs(x)) / (2**(bits - 1) - 1)`` per token. A
        token with a NaN or an infinity becomes NaN.

    Raises:
        TypeError: if an argument has another type, naming it.
        RuntimeError: if ``bits`` or the dtype does not fit.
    """
    check_tensors(x=x)
    check_integers(bits=bits)
    is_dtensor(x)  # gives torch the rules for sharded calls
    y: Tensor = DYNAMIC.call(x, bits)
    return y
