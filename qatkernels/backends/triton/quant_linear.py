"""A quantized linear layer and its tangent in Triton.

One kernel writes the quantized weight and its tangent, and the library multiplies. A kernel that quantizes tiles of the
weight and multiplies them at once would save the memory of two weights and move fewer bytes. But it quantizes a tile
again for every tile of tokens, and such a kernel took three times as long on an H100, with 64 tokens and fewer.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._launchers import launches
from .fake_quantize import fake_quantize_dual_out


@launches("quant_linear_dual")
def quant_linear_dual_out(
    x: Tensor, tangent_x: Tensor | None, tangent_w: Tensor | None, tangent_scale: Tensor | None,
    tangent_zero_point: Tensor | None, w: Tensor, scale: Tensor, zero_point: Tensor | None, seed: Tensor | None,
    grid: list[float], noise_std: float, scale_noise_std: float, grad_scale: float, transposed: bool,
    out: Tensor, tangent: Tensor,
) -> None:  # fmt: skip
    """Write y and its tangent. Arguments as the op's."""
    tangents = (tangent_w, tangent_scale, tangent_zero_point)
    call = (w, scale, zero_point, seed, grid, noise_std, scale_noise_std, grad_scale)
    q, v = torch.empty_like(w, dtype=x.dtype), torch.empty_like(w, dtype=x.dtype)
    fake_quantize_dual_out(*tangents, *call, x.dtype, q, v)
    q, v = (q, v) if transposed else (q.t(), v.t())
    torch.mm(x, q, out=out)
    torch.mm(x, v, out=tangent)
    if tangent_x is not None:
        tangent.addmm_(tangent_x, q)
