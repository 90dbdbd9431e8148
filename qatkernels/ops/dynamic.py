"""Dynamic activation quantization: symmetric integers per token, the scale taken from the token itself.

The straight-through rule is the identity (nothing is ever clipped) and the scale gets no gradient, so forward mode and
every higher derivative are the identity too.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..arguments import check_integers, check_tensors
from ._op import Function, define


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


class FakeQuantizeDynamic(Function):
    """y = Q(x) with the identity as its derivative."""

    @staticmethod
    def forward(x: Tensor, bits: int) -> Tensor:
        return Function.run(torch.ops.qatkernels.fake_quantize_dynamic.default, x, bits)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        return g, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: Any) -> Tensor:
        return tangent.clone()


torch.library.register_autograd("qatkernels::fake_quantize_dynamic", FakeQuantizeDynamic.backward)


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
    if torch.compiler.is_compiling():
        return torch.ops.qatkernels.fake_quantize_dynamic(x, bits)
    return FakeQuantizeDynamic.apply(x, bits)
