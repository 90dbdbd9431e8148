"""The perturbation of sharpness-aware minimization in Triton."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._element import OPTIONS, from_element, to_element
from ._launchers import launches
from ._rows import compute_type

BLOCK = 4096
STEPS = 8  # blocks that a program of the norms processes


@triton.jit
def perturb_kernel(
    w_ptr, g_ptr, factor_ptr, numel,
    ETA: tl.constexpr, ADAPTIVE: tl.constexpr, SWAP: tl.constexpr, COMPUTE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = index < numel
    old = tl.load(w_ptr + index, mask, other=0.0)
    w = from_element(old, COMPUTE)
    step = from_element(tl.load(g_ptr + index, mask, other=0.0), COMPUTE) * tl.load(factor_ptr).to(COMPUTE)
    if ADAPTIVE:
        size = tl.abs(w) + tl.full((), ETA, COMPUTE)
        step = step * (size * size)
    if SWAP:
        tl.store(g_ptr + index, old, mask)
    tl.store(w_ptr + index, to_element(w + step, w_ptr.dtype.element_ty), mask)


@triton.jit
def perturbation_norms_kernel(
    g_ptr, w_ptr, out_ptr, numel,
    ETA: tl.constexpr, ADAPTIVE: tl.constexpr, COMPUTE: tl.constexpr, BLOCK: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    once_sum = tl.zeros((BLOCK,), COMPUTE)
    twice_sum = tl.zeros((BLOCK,), COMPUTE)
    for step in tl.static_range(STEPS):
        index = (tl.program_id(0).to(tl.int64) * STEPS + step) * BLOCK + tl.arange(0, BLOCK)
        mask = index < numel
        once = from_element(tl.load(g_ptr + index, mask, other=0.0), COMPUTE)
        if ADAPTIVE:
            size = tl.abs(from_element(tl.load(w_ptr + index, mask, other=0.0), COMPUTE)) + tl.full((), ETA, COMPUTE)
            once = once * size
            twice = once * size
            twice_sum += twice * twice
        once_sum += once * once
    total = tl.sum(once_sum, 0).to(tl.float64)
    tl.store(out_ptr + 2 * tl.program_id(0), total)
    tl.store(out_ptr + 2 * tl.program_id(0) + 1, tl.sum(twice_sum, 0).to(tl.float64) if ADAPTIVE else total)


def _perturb(w: Tensor, g: Tensor, factor: Tensor, eta: float | None, swap: bool) -> None:
    if w.numel():
        perturb_kernel[(triton.cdiv(w.numel(), BLOCK),)](
            w, g, factor, w.numel(), ETA=eta or 0.0, ADAPTIVE=eta is not None, SWAP=swap,
            COMPUTE=compute_type(g.dtype), BLOCK=BLOCK, **OPTIONS,
        )  # fmt: skip


@launches("perturb_")
def perturb_(w: Tensor, g: Tensor, factor: Tensor, eta: float | None) -> None:
    """Change w. Arguments as the op's."""
    _perturb(w, g, factor, eta, False)


@launches("perturb_swap_")
def perturb_swap_(w: Tensor, g: Tensor, factor: Tensor, eta: float | None) -> None:
    """Change w and g. Arguments as the op's."""
    _perturb(w, g, factor, eta, True)


@launches("perturbation_norms")
def perturbation_norms_out(g: Tensor, w: Tensor | None, eta: float, out: Tensor) -> None:
    """Write the sums. Arguments as the op's."""
    if g.numel() == 0:
        out.zero_()
        return
    programs = triton.cdiv(g.numel(), BLOCK * STEPS)
    partial = out.new_empty(programs, 2)
    perturbation_norms_kernel[(programs,)](
        g, g if w is None else w, partial, g.numel(), ETA=eta, ADAPTIVE=w is not None,
        COMPUTE=compute_type(g.dtype), BLOCK=BLOCK, STEPS=STEPS, **OPTIONS,
    )  # fmt: skip
    torch.sum(partial, 0, out=out)
