"""The noise by itself, in Triton."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ._element import OPTIONS, normals_each
from ._launchers import launches


@triton.jit
def normal_kernel(seed_ptr, out_ptr, numel, STREAM: tl.constexpr, BLOCK: tl.constexpr):
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + index, normals_each(tl.load(seed_ptr), index, STREAM), index < numel)


@launches("normal")
def normal_out(seed: Tensor, numel: int, stream: int, out: Tensor) -> None:
    """Write the normals. Arguments as the op's."""
    if numel:
        normal_kernel[(triton.cdiv(numel, 1024),)](seed, out, numel, STREAM=stream, BLOCK=1024, **OPTIONS)
