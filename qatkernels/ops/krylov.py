"""The vector work of a Krylov method: one pass over the basis both updates a vector and multiplies it with the basis.

Orthogonalizing a vector twice is enough. It takes three such passes: one that computes the products, one that subtracts
the first products and computes the remaining ones, and one that subtracts those.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..arguments import check_optional_tensors, check_tensors
from ._op import define

#: Columns that the reference processes at once. It converts them to float64, so this bounds the temporary memory.
_COLUMNS = 2**20


def _gram_schmidt(basis: Tensor, w: Tensor, h: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    w_new = torch.empty_like(w, memory_format=torch.contiguous_format)
    dots = torch.zeros(basis.shape[0], dtype=torch.float64, device=w.device)
    sq = torch.zeros((), dtype=torch.float64, device=w.device)
    for start in range(0, w.numel(), _COLUMNS):
        part = slice(start, start + _COLUMNS)
        rows, x = basis[:, part].double(), w[part].double()
        w_new[part] = x if h is None else x - h.double() @ rows
        x = w_new[part].double()
        dots += rows @ x
        sq += x @ x
    return w_new, dots, sq


GRAM_SCHMIDT = define(
    "gram_schmidt", "Tensor basis, Tensor w, Tensor? h",
    """
    basis: float32|bfloat16|float64 [M, N]
    w: float32|float64 [N]
    h: float [M]
    -> w_new: like(w) [N]
    -> dots: float64 [M]
    -> sq: float64 []
    """,
    reference=_gram_schmidt,
)  # fmt: skip


def gram_schmidt(basis: Tensor, w: Tensor, h: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Subtract a combination of rows from a vector, and multiply the result with all rows, in one pass over memory.

    ``torch.ops.qatkernels.gram_schmidt_out`` writes into tensors of the caller; its output ``w_new`` may be ``w``
    itself. Not differentiable.

    Args:
        basis: ``[m, n]``, float32, bfloat16 or float64; the rows need not be orthonormal.
        w: ``[n]``, float32 or float64.
        h: coefficients of the rows to subtract, ``[m]``; nothing is subtracted if None.

    Returns:
        ``w_new = w - basis.T @ h`` in the dtype of ``w``; ``basis @ w_new``, ``[m]`` in float64; and ``w_new @ w_new``,
        a float64 scalar. Sums are in float64, in an order that depends on the shape only.

    Raises:
        TypeError: if an argument is not a tensor, naming it.
        RuntimeError: if a shape, dtype or device does not fit.
    """
    check_tensors(basis=basis, w=w)
    check_optional_tensors(h=h)
    return torch.ops.qatkernels.gram_schmidt(basis, w, h)
