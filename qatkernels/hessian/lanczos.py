"""The Lanczos process with full reorthogonalization: every new vector is made orthogonal to the whole basis.

In exact arithmetic orthogonality to the last two vectors suffices. With rounding, earlier directions return as soon as
an eigenvalue has converged, and bring copies of that eigenvalue ("ghosts"). So each new vector is multiplied with the
whole basis, and its components along the basis are subtracted, at most twice, until they are below rounding. Often they
are from the start, and one pass over the basis is enough (:func:`qatkernels.ops.gram_schmidt` subtracts and multiplies
in one pass).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .operator import SymmetricMap
from .vectors import Vectors, vectors_of

#: Dtypes that a basis may be kept in, None for the operator's own.
BASIS_DTYPES = (None, torch.float32, torch.bfloat16, torch.float64)

_gram_schmidt = torch.ops.qatkernels.gram_schmidt_out


class NotFiniteError(ArithmeticError):
    """A product with the matrix holds NaN or infinity."""


def orthogonalize(
    basis: Tensor, w: Tensor, sums: Tensor, vectors: Vectors, h: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Subtract ``h @ basis`` from ``w`` in place; return the new ``basis @ w``, and the squared norm of ``w``.

    Both are written into ``sums``, float64, which has one element more than the basis has rows.
    """
    sums = sums[: len(basis) + 1]  # one tensor, so that one collective sums both
    _gram_schmidt(basis, w, h, w, sums[1:], sums[0])
    vectors.total(sums)
    return sums[1:], sums[0]


class Basis:
    """Memory for the vectors of a Krylov basis: the only memory of size parameters times steps in this package.

    Args:
        rows: number of vectors.
        like: the operator.
        dtype: dtype to store vectors in; the operator's dtype if None. The last two vectors, which the recurrence
            itself uses, are also kept elsewhere in full precision.
        device: device to store vectors on; the operator's device if None.

    Raises:
        ValueError: if the kernel does not support the dtype.
    """

    def __init__(
        self, rows: int, like: SymmetricMap, dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> None:
        if dtype not in BASIS_DTYPES:
            raise ValueError(f"basis dtype is {dtype}, must be one of {BASIS_DTYPES}")
        self.device = like.device if device is None else torch.device(device)
        self.vectors = vectors_of(like)
        self.rows = torch.empty(rows, self.vectors.length, dtype=dtype or like.dtype, device=self.device)
        self._sums = torch.empty(rows + 1, dtype=torch.float64, device=self.device)
        # A product of a vector with a row is rounding error if it is below this times the vector's norm. Rows in a
        # narrower dtype add their own rounding.
        self.tolerance = 10 * torch.finfo(like.dtype).eps
        if torch.finfo(self.rows.dtype).eps > torch.finfo(like.dtype).eps:
            self.tolerance += 4 * torch.finfo(self.rows.dtype).eps / max(like.n, 1) ** 0.5

    def keep(self, index: int, vector: Tensor) -> None:
        """Store a unit vector."""
        self.rows[index].copy_(vector)

    def clean(self, count: int, w: Tensor, passes: int = 2) -> tuple[Tensor, Tensor, float]:
        """Make ``w`` orthogonal to the first ``count`` vectors.

        Returns:
            The new ``w``, the coefficients that were subtracted, and the norm of the new ``w``. The new ``w`` is the
            tensor ``w`` itself if the basis is on its device.
        """
        local = w if w.device == self.device else w.to(self.device)
        rows = self.rows[:count]
        dots, sq = orthogonalize(rows, local, self._sums, self.vectors)
        subtracted = torch.zeros_like(dots)
        for _ in range(passes):
            if not float(dots.abs().max()) > self.tolerance * float(sq) ** 0.5:
                break
            h = dots.clone()
            subtracted += h
            dots, sq = orthogonalize(rows, local, self._sums, self.vectors, h)
        return local.to(w.device), subtracted, float(sq) ** 0.5


def basis_bytes(n: int, steps: int, dtype: torch.dtype, block: int = 1) -> int:
    """Return the bytes of a Krylov basis. That is nearly all the memory that Lanczos needs beside the operator's.

    Args:
        n: elements of a vector in this process.
        steps: vectors of a basis.
        dtype: dtype of the basis.
        block: number of bases.
    """
    return n * steps * block * torch.empty((), dtype=dtype).element_size()


class Tridiagonal(NamedTuple):
    """The tridiagonal matrix of a Lanczos process.

    Attributes:
        alpha: float64 diagonal ``[m]``.
        beta: float64 off-diagonal ``[m - 1]``.
        residual: norm of the next vector, which would be the next off-diagonal entry; 0 in an invariant subspace.
    """

    alpha: Tensor
    beta: Tensor
    residual: float

    def eigh(self) -> tuple[Tensor, Tensor]:
        """Return the eigenvalues, ascending, and the eigenvectors, in float64."""
        values, vectors = torch.linalg.eigh(
            torch.diag(self.alpha) + torch.diag(self.beta, 1) + torch.diag(self.beta, -1)
        )
        return values, vectors


class _Process:
    """One Lanczos process, a step at a time."""

    def __init__(self, start: Tensor, basis: Basis) -> None:
        self.basis = basis
        # The last two vectors in full precision; step i uses row i % 2 for the newest one.
        self.recent = torch.zeros(2, start.numel(), dtype=start.dtype, device=start.device)
        self._sums = torch.empty(3, dtype=torch.float64, device=start.device)
        self.alpha: list[float] = []
        self.beta: list[float] = []
        self.residual = basis.vectors.norm(start)
        if not 0 < self.residual < math.inf:
            raise ValueError("the start vector is zero or not finite, must be finite and not zero")
        self.done = False
        self._next(start)

    @property
    def vector(self) -> Tensor:
        """The unit vector to multiply with the matrix next."""
        return self.recent[len(self.alpha) % 2]

    def _next(self, w: Tensor) -> None:
        torch.mul(w, 1.0 / self.residual, out=self.vector)
        self.basis.keep(len(self.alpha), self.vector)

    def step(self, w: Tensor, last: bool) -> None:
        """Process the product ``w`` of the matrix with :attr:`vector`; ``w`` is overwritten."""
        index = len(self.alpha)
        newest = index % 2
        # Subtract twice: alpha may be much larger than the remaining vector, and its rounding error then matters.
        dots, _ = orthogonalize(self.recent, w, self._sums, self.basis.vectors)
        h = dots.clone()
        dots, _ = orthogonalize(self.recent, w, self._sums, self.basis.vectors, h)
        alpha = float(h[newest] + dots[newest])
        if not math.isfinite(alpha):
            raise NotFiniteError(f"the product of step {index + 1} holds NaN or infinity")
        w, _, norm = self.basis.clean(index + 1, w)
        if not math.isfinite(norm):
            raise NotFiniteError(f"the product of step {index + 1} holds NaN or infinity")
        self.alpha.append(alpha)
        scale = max(*map(abs, self.alpha), *self.beta, 0.0)
        self.residual = norm
        # The subspace is invariant: the rest of w is the rounding error of the subtractions.
        if norm <= 100 * torch.finfo(w.dtype).eps * scale:
            self.residual, self.done = 0.0, True
        elif last:
            self.done = True
        else:
            self.beta.append(norm)
            self._next(w)

    def result(self) -> Tridiagonal:
        """Return the matrix so far."""
        alpha, beta = (torch.tensor(x, dtype=torch.float64) for x in (self.alpha, self.beta))
        return Tridiagonal(alpha, beta, self.residual)


def lanczos(
    op: SymmetricMap,
    starts: Sequence[Tensor],
    steps: int,
    bases: Sequence[Basis],
    advance: Callable[[int], None] | None = None,
) -> list[Tridiagonal]:
    """Run one process from each start vector in lockstep, so that a pass over the data serves all processes.

    Args:
        op: the matrix.
        starts: start vectors ``[n]``, which need not be normalized.
        steps: largest number of steps. A process ends earlier if its subspace is invariant.
        bases: one basis per start vector, for ``steps`` vectors each.
        advance: called after each step with the number of products in it.

    Returns:
        One tridiagonal matrix per start vector.

    Raises:
        NotFiniteError: if a product holds NaN or infinity.
    """
    processes = [_Process(start, basis) for start, basis in zip(starts, bases, strict=True)]
    steps = min(steps, op.n)
    for step in range(steps):
        running = [p for p in processes if not p.done]
        if not running:
            break
        for p, w in zip(running, op.products([p.vector for p in running]), strict=True):
            p.step(w, last=step + 1 == steps)
        if advance:
            advance(len(running))
    return [p.result() for p in processes]
