"""Eigenpairs at the ends of the spectrum, by Lanczos with thick restarts (Wu and Simon, 2000)."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ._spectrum import probe
from .lanczos import Basis, NotFiniteError, basis_bytes
from .operator import SymmetricMap
from .vectors import Vectors, vectors_of

logger = logging.getLogger(__package__)

ENDS = ("both", "largest", "smallest")

#: Columns of the basis that are rotated at once; bounds the temporary memory.
_COLUMNS = 2**18


class Eigs(NamedTuple):
    """Eigenpairs.

    Attributes:
        values: float64 eigenvalues, ascending: the k smallest, then the k largest, according to ``which``.
        residuals: float64 norm of ``A y - theta y`` for each value ``theta``: the distance to the nearest true
            eigenvalue is at most that.
        vectors: unit eigenvectors, one row per value; of a sharded model this process's elements of them.
        products: number of products with the matrix.
        converged: whether every residual is below the tolerance.
    """

    values: Tensor
    residuals: Tensor
    vectors: Tensor
    products: int
    converged: bool


class _Projection:
    """An orthonormal basis, and the matrix projected onto it. Lanczos adds vectors, restarts remove them."""

    def __init__(self, op: SymmetricMap, rows: int, seed: int) -> None:
        self.op, self.basis, self.seed = op, Basis(rows, op), seed
        self.matrix = torch.zeros(rows, rows, dtype=torch.float64)
        self.size = self.products = self.draws = 0
        self.scale = self.residual = 0.0
        self.next = self.random()

    def random(self) -> Tensor:
        """Return a random unit vector orthogonal to the basis."""
        w = probe(self.op, self.seed, self.draws)
        self.draws += 1
        w, _, norm = self.basis.clean(self.size, w, passes=3) if self.size else (w, None, self.basis.vectors.norm(w))
        return w.div_(norm)

    def grow(self) -> None:
        """Add vectors until the basis is full, or spans the whole space."""
        while self.size < len(self.matrix):
            self.basis.keep(self.size, self.next)
            w = self.op.products([self.next])[0]
            self.products += 1
            w, h, norm = self.basis.clean(self.size + 1, w)
            if not (norm < float("inf") and bool(h.isfinite().all())):
                raise NotFiniteError(f"product {self.products} holds NaN or infinity")
            self.matrix[: self.size + 1, self.size] = self.matrix[self.size, : self.size + 1] = h.cpu()
            self.scale = max(self.scale, float(h.abs().max()), norm)
            self.size += 1
            invariant = norm <= 100 * torch.finfo(w.dtype).eps * self.scale
            self.residual = 0.0 if invariant else norm
            if self.size < self.op.n:
                self.next = self.random() if invariant else w.div_(norm)

    def solve(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return Ritz values, their residuals, and the coordinates of the Ritz vectors in the basis, as columns."""
        part = self.matrix[: self.size, : self.size]
        values, vectors = torch.linalg.eigh(0.5 * (part + part.T))
        return values, self.residual * vectors[-1].abs(), vectors

    def rotate(self, values: Tensor, vectors: Tensor) -> None:
        """Replace the basis by the Ritz vectors with these values and coordinates."""
        rows, count = self.basis.rows, len(values)
        rotation = vectors.T.to(rows.device, rows.dtype)
        for start in range(0, rows.shape[1], _COLUMNS):
            part = slice(start, start + _COLUMNS)
            rows[:count, part] = rotation @ rows[: self.size, part]
        self.size = count
        self.matrix.zero_()
        self.matrix[:count, :count] = torch.diag(values)


def eigs(
    op: SymmetricMap,
    k: int = 1,
    which: str = "both",
    *,
    tol: float | None = None,
    seed: int = 0,
    basis: int | None = None,
    max_products: int | None = None,
    advance: Callable[[int], None] | None = None,
) -> Eigs:
    """Find the eigenpairs at the ends of the spectrum. Repeated eigenvalues are returned with their multiplicity.

    A Krylov space holds only one eigenvector of a repeated eigenvalue. So when all pairs have converged, the search
    restarts from a random vector orthogonal to them, until the result no longer changes.

    Args:
        op: the matrix.
        k: number of eigenpairs at each end.
        which: ``"both"``, ``"largest"`` or ``"smallest"`` (the most negative, not the closest to 0).
        tol: largest residual, relative to an estimate of the norm of the matrix; if None, 1e-5, or 1e-6 in float64.
            Eigenvalues are more accurate than that: their error is proportional to the square of the residual.
        seed: seed of the start vector.
        basis: number of vectors to keep, at least two more than the eigenpairs. Their memory is logged at the start.
        max_products: number of products after which the search stops with a warning; 2000 if None.
        advance: called after each restart with the number of products since the last call.

    Raises:
        ValueError: if a count does not fit, or ``which`` is none of the three.
        NotFiniteError: if a product holds NaN or infinity.
    """
    if which not in ENDS:
        raise ValueError(f"which is {which!r}, must be one of {ENDS}")
    ends = 2 if which == "both" else 1
    if not 1 <= k * ends <= op.n:
        raise ValueError(f"k is {k}, must be at least 1 and at most {op.n // ends} for which={which!r}")
    low, high = (0 if which == "largest" else k), (0 if which == "smallest" else k)
    basis = min(op.n, max(2 * (low + high) + 20, 60) if basis is None else basis)
    if basis < min(op.n, low + high + 2):
        raise ValueError(f"basis is {basis}, must be at least {low + high + 2}: two more than the eigenpairs")
    tol = (1e-6 if op.dtype == torch.float64 else 1e-5) if tol is None else tol
    logger.info(
        "the Krylov basis takes %.4g MB: %d vectors of %d",
        basis_bytes(vectors_of(op).length, basis, op.dtype) * 1e-6, basis, vectors_of(op).length,
    )  # fmt: skip
    space, previous = _Projection(op, basis, seed), None
    while True:
        products_before = space.products
        space.grow()
        if advance:
            advance(space.products - products_before)
        values, residuals, vectors = space.solve()
        ends_of_spectrum = [*range(low), *range(len(values) - high, len(values))]
        result, bounds = values[ends_of_spectrum], residuals[ends_of_spectrum]
        norm = max(float(values.abs().max()), torch.finfo(torch.float64).tiny)
        # Half of tol, because a restart from a random vector adds an error of the same size.
        converged = bool((bounds <= 0.5 * tol * norm).all())
        confirmed = converged and previous is not None and bool(((result - previous).abs() <= 10 * tol * norm).all())
        exhausted = space.products >= (2000 if max_products is None else max_products)
        if confirmed or exhausted or space.size == op.n:
            break
        extra = (basis - low - high) // (2 * ends)
        keep = [*range(low + (extra if low else 0)), *range(len(values) - high - (extra if high else 0), len(values))]
        if converged:  # after a restart from a random vector, Ritz vectors that have not converged would not improve
            keep = [i for i in keep if residuals[i] <= 0.5 * tol * norm]
        keep = keep[: basis - 1]
        space.rotate(values[keep], vectors[:, keep])
        previous = result if converged else None
        if converged:
            space.next = space.random()
    space.rotate(result, vectors[:, ends_of_spectrum])
    rows = space.basis.rows[: len(result)].clone()
    bounds = torch.tensor(
        [_residual(op, float(value), row, space.basis.vectors) for value, row in zip(result, rows, strict=True)],
        dtype=torch.float64,
    )
    converged = bool((bounds <= tol * norm).all())
    if advance:
        advance(len(result))
    if not converged:
        warnings.warn(
            f"after {space.products} products the largest residual is {float(bounds.max()):.3g}, "
            f"above {tol * norm:.3g}: raise max_products or basis, or tol",
            stacklevel=2,
        )
    return Eigs(result, bounds, rows, space.products + len(result), converged)


def _residual(op: SymmetricMap, value: float, vector: Tensor, vectors: Vectors) -> float:
    """Return the norm of ``A y - theta y``."""
    return vectors.norm(op.products([vector])[0].sub_(vector, alpha=value))
