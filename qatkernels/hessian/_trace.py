"""The trace of a symmetric matrix from products with random vectors: Hutchinson's estimator, and Hutch++."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable

import torch
from torch import Tensor

from ._spectrum import Estimate
from .lanczos import Basis, NotFiniteError, basis_bytes
from .operator import SymmetricMap
from .vectors import Vectors, vectors_of

logger = logging.getLogger(__package__)

METHODS = ("hutchinson", "hutch++")


def signs(op: SymmetricMap, seed: int, index: int) -> Tensor:
    """Return a vector of random signs ``[n]`` (Rademacher). It is the same on every device and in every process."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + index)
    bits = vectors_of(op).drawn(lambda count: torch.randint(0, 2, (count,), generator=generator, dtype=torch.int8))
    return (2 * bits - 1).to(op.dtype).to(op.device)


def trace(
    op: SymmetricMap,
    products: int = 60,
    method: str = "hutchinson",
    *,
    seed: int = 0,
    advance: Callable[[int], None] | None = None,
) -> Estimate:
    """Estimate the trace.

    Hutchinson's estimator is the mean of ``z' A z`` over vectors z of random signs. Hutch++ (Meyer, Musco, Musco and
    Woodruff, 2021) spends a third of the products on a basis Q of the range of A, and another third on the exact trace
    in the span of Q. It estimates only the trace of the part orthogonal to Q. If the eigenvalues decay, its error falls
    with 1 / products. It needs memory for Q.

    Args:
        op: the matrix.
        products: number of products with the matrix, at least 2, for Hutch++ at least 6.
        method: ``"hutchinson"`` or ``"hutch++"``.
        seed: seed of the random vectors.
        advance: called after each product with 1.

    Returns:
        The trace and its standard error. For Hutch++ the error is that of the estimated part.

    Raises:
        ValueError: if ``method`` is unknown, or there are too few products.
        NotFiniteError: if a product holds NaN or infinity.
    """
    if method not in METHODS:
        raise ValueError(f"method is {method!r}, must be one of {METHODS}")
    fewest = 2 if method == "hutchinson" else 6
    if products < fewest:
        raise ValueError(f"products is {products}, must be at least {fewest} for {method}")

    vectors = vectors_of(op)

    def times(v: Tensor) -> Tensor:
        result = op.products([v])[0]
        if advance:
            advance(1)
        return result

    if method == "hutchinson":
        return Estimate.of(
            torch.tensor([_form(times, signs(op, seed, i), vectors) for i in range(products)], dtype=torch.float64)
        )
    sketch = min(products // 3, op.n)
    logger.info("the basis of Hutch++ takes %.4g MB", basis_bytes(vectors.length, sketch, op.dtype) * 1e-6)
    basis, size = Basis(sketch, op), 0
    for i in range(sketch):
        w = times(signs(op, seed, i))
        norm_before = vectors.norm(w)
        if not norm_before < math.inf:
            raise NotFiniteError(f"product {i + 1} holds NaN or infinity")
        w, _, norm = basis.clean(size, w) if size else (w, None, norm_before)
        if norm > 100 * torch.finfo(op.dtype).eps * norm_before:  # otherwise w lies in the span of the basis already
            basis.keep(size, w / norm)
            size += 1
    trace_in_basis = math.fsum(_form(times, basis.rows[i].to(op.device, op.dtype), vectors) for i in range(size))
    products_left = products - sketch - size
    if size == op.n or products_left < 2:
        return Estimate(trace_in_basis, 0.0 if size == op.n else math.nan)
    samples = []
    for i in range(sketch, sketch + products_left):
        z = signs(op, seed, i)
        samples.append(_form(times, basis.clean(size, z)[0] if size else z, vectors))
    orthogonal_part = Estimate.of(torch.tensor(samples, dtype=torch.float64))
    return Estimate(trace_in_basis + orthogonal_part.value, orthogonal_part.error)


def _form(times: Callable[[Tensor], Tensor], z: Tensor, vectors: Vectors) -> float:
    """Return ``z' A z``, summed in float64."""
    dots = torch.ops.qatkernels.gram_schmidt(z.unsqueeze(0), times(z), None)[1]
    value = float(vectors.total(dots)[0])
    if not math.isfinite(value):
        raise NotFiniteError("a product holds NaN or infinity")
    return value
