"""Softmax cross-entropy in Triton. A program processes a row; kernels without a sum use several programs for a row.

They use the hardware's exponential, so the last bits differ from the reference.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from ._element import OPTIONS, from_element, to_element
from ._launchers import launches
from ._rows import compute_type

BLOCK_COLUMNS = 4096


@triton.jit
def target_of(targets_ptr, row, cols, ignore_index):
    """The target of a row, and whether it is ignored or outside the vocabulary."""
    target = tl.load(targets_ptr + row)
    ignored = target == ignore_index
    return target, ignored, (ignored == 0) & ((target < 0) | (target >= cols))


@triton.jit
def marked(x, ignored, outside):
    """A result after what the target says of its row."""
    return tl.where(ignored, 0.0, tl.where(outside, float("nan"), x))


@triton.jit
def cross_entropy_fwd_kernel(
    logits_ptr, targets_ptr, loss_ptr, lse_ptr, cols, ignore_index, COMPUTE: tl.constexpr, C: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    target, ignored, outside = target_of(targets_ptr, row, cols, ignore_index)
    largest = tl.full((), float("-inf"), COMPUTE)
    total = tl.zeros((), COMPUTE)
    at_target = tl.zeros((), COMPUTE)
    for start in range(0, cols, C):
        columns = start + tl.arange(0, C)
        mask = columns < cols
        z = from_element(tl.load(logits_ptr + row * cols + columns, mask, other=0.0), COMPUTE)
        z = tl.where(mask, z, float("-inf"))
        most = tl.maximum(largest, tl.max(z, 0))
        # If all logits so far are -inf, do not shift by the maximum: -inf - -inf is NaN.
        shift = tl.where(most == float("-inf"), 0.0, most)
        total = total * tl.exp(largest - shift) + tl.sum(tl.exp(z - shift), 0)
        at_target += tl.sum(tl.where(columns == target, z, 0.0), 0)
        largest = most
    lse = largest + tl.log(total)
    tl.store(lse_ptr + row, tl.where(ignored, 0.0, lse))
    tl.store(loss_ptr + row, marked(lse - at_target, ignored, outside))


@triton.jit
def cross_entropy_bwd_kernel(
    g_ptr, logits_ptr, lse_ptr, targets_ptr, grad_ptr, cols, ignore_index, parts,
    COMPUTE: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    row = (program // parts).to(tl.int64)
    columns = (program % parts) * C + tl.arange(0, C)
    mask = columns < cols
    target, ignored, outside = target_of(targets_ptr, row, cols, ignore_index)
    z = from_element(tl.load(logits_ptr + row * cols + columns, mask, other=0.0), COMPUTE)
    p = tl.exp(z - tl.load(lse_ptr + row))
    off = tl.where(columns == target, p - 1.0, p)
    grad = marked(off * tl.load(g_ptr + row), ignored, outside)
    tl.store(grad_ptr + row * cols + columns, to_element(grad, grad_ptr.dtype.element_ty), mask)


@triton.jit
def cross_entropy_hvp_kernel(
    tangent_ptr, tangent_g_ptr, g_ptr, logits_ptr, lse_ptr, targets_ptr, grad_ptr, tangent_grad_ptr, tangent_loss_ptr,
    cols, ignore_index,
    COMPUTE: tl.constexpr, ALONG_G: tl.constexpr, GRAD: tl.constexpr, TANGENT_GRAD: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    target, ignored, outside = target_of(targets_ptr, row, cols, ignore_index)
    lse = tl.load(lse_ptr + row)
    sums = tl.zeros((C,), COMPUTE)
    at_target = tl.zeros((C,), COMPUTE)
    for start in range(0, cols, C):
        columns = start + tl.arange(0, C)
        mask = columns < cols
        z = from_element(tl.load(logits_ptr + row * cols + columns, mask, other=0.0), COMPUTE)
        v = from_element(tl.load(tangent_ptr + row * cols + columns, mask, other=0.0), COMPUTE)
        sums += tl.where(mask, tl.exp(z - lse) * v, 0.0)
        at_target += tl.where(columns == target, v, 0.0)
    mean = tl.sum(sums, 0)
    tl.store(tangent_loss_ptr + row, marked(mean - tl.sum(at_target, 0), ignored, outside))
    if TANGENT_GRAD:
        g = tl.load(g_ptr + row)
        for start in range(0, cols, C):
            columns = start + tl.arange(0, C)
            mask = columns < cols
            offset = row * cols + columns
            # Load before any store: outputs may have the memory of the inputs.
            z = from_element(tl.load(logits_ptr + offset, mask, other=0.0), COMPUTE)
            v = from_element(tl.load(tangent_ptr + offset, mask, other=0.0), COMPUTE)
            p = tl.exp(z - lse)
            off = tl.where(columns == target, p - 1.0, p)
            second = g * p * (v - mean)
            if ALONG_G:
                second += tl.load(tangent_g_ptr + row) * off
            second = marked(second, ignored, outside)
            tl.store(tangent_grad_ptr + offset, to_element(second, tangent_grad_ptr.dtype.element_ty), mask)
            if GRAD:
                grad = marked(g * off, ignored, outside)
                tl.store(grad_ptr + offset, to_element(grad, grad_ptr.dtype.element_ty), mask)


def _constants(logits: Tensor) -> dict[str, Any]:
    block = min(triton.next_power_of_2(max(logits.shape[1], 16)), BLOCK_COLUMNS)
    return {"COMPUTE": compute_type(logits.dtype), "C": block} | OPTIONS


@launches("cross_entropy")
def cross_entropy_out(logits: Tensor, targets: Tensor, ignore_index: int, loss: Tensor, lse: Tensor) -> None:
    """Write loss and lse. Arguments as the op's."""
    if logits.shape[0]:
        cross_entropy_fwd_kernel[(logits.shape[0],)](
            logits, targets, loss, lse, logits.shape[1], ignore_index, **_constants(logits)
        )


@launches("cross_entropy_backward")
def cross_entropy_backward_out(
    g: Tensor, logits: Tensor, lse: Tensor, targets: Tensor, ignore_index: int, grad: Tensor
) -> None:
    """Write the gradient, possibly over the logits. Arguments as the op's."""
    rows, cols = logits.shape
    constants = _constants(logits)
    parts = triton.cdiv(cols, constants["C"])
    if rows:
        cross_entropy_bwd_kernel[(rows * parts,)](g, logits, lse, targets, grad, cols, ignore_index, parts, **constants)


def _second_order(
    tangent: Tensor, tangent_g: Tensor | None, g: Tensor | None, logits: Tensor, lse: Tensor, targets: Tensor,
    ignore_index: int, grad: Tensor | None, tangent_grad: Tensor | None, tangent_loss: Tensor,
) -> None:  # fmt: skip
    rows, cols = logits.shape
    if rows == 0:
        return
    # An absent tensor is replaced by lse; the flags prevent that it is accessed.
    numbers = [lse if t is None else t for t in (tangent_g, g)]
    outputs = [lse if t is None else t for t in (grad, tangent_grad)]
    cross_entropy_hvp_kernel[(rows,)](
        tangent, *numbers, logits, lse, targets, *outputs, tangent_loss,
        cols, ignore_index, ALONG_G=tangent_g is not None, GRAD=grad is not None,
        TANGENT_GRAD=tangent_grad is not None, **_constants(logits),
    )  # fmt: skip


@launches("cross_entropy_jvp")
def cross_entropy_jvp_out(
    tangent: Tensor, logits: Tensor, lse: Tensor, targets: Tensor, ignore_index: int, tangent_loss: Tensor
) -> None:
    """Write the tangent of the loss. Arguments as the op's."""
    _second_order(tangent, None, None, logits, lse, targets, ignore_index, None, None, tangent_loss)


@launches("cross_entropy_hvp")
def cross_entropy_hvp_out(
    tangent: Tensor, tangent_g: Tensor | None, g: Tensor, logits: Tensor, lse: Tensor, targets: Tensor,
    ignore_index: int, tangent_grad: Tensor, tangent_loss: Tensor,
) -> None:  # fmt: skip
    """Write the tangents of the gradient and of the loss. Arguments as the op's."""
    _second_order(tangent, tangent_g, g, logits, lse, targets, ignore_index, None, tangent_grad, tangent_loss)


@launches("cross_entropy_dual")
def cross_entropy_dual_out(
    tangent: Tensor, tangent_g: Tensor | None, g: Tensor, logits: Tensor, lse: Tensor, targets: Tensor,
    ignore_index: int, grad: Tensor, tangent_grad: Tensor, tangent_loss: Tensor,
) -> None:  # fmt: skip
    """Write the gradient, its tangent and the loss's, possibly over logits and tangent. Arguments as the op's."""
    _second_order(tangent, tangent_g, g, logits, lse, targets, ignore_index, grad, tangent_grad, tangent_loss)
