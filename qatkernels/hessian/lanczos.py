"""The Lanczos process with full reorthogonalization: every vector is held against the whole basis at every step.

In exact arithmetic three vectors suffice. In floating point the others come back as soon as an eigenvalue has
converged, and with them copies of it ("ghosts"). So each new vector is multiplied with the whole basis, and what is
there is subtracted, twice at most, until nothing above rounding is left. Often nothing is, and the pass that finds this
out is the only one (:func:`qatkernels.ops.gram_schmidt`: one read of the basis subtracts and multiplies).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .operator import SymmetricMap

#: Dtypes that a basis may be kept in, None for the operator's own.
BASIS_DTYPES = (None, torch.float32, torch.bfloat16, torch.float64)

_gram_schmidt = torch.ops.qatkernels.gram_schmidt_out


class NotFiniteError(ArithmeticError):
    """A product with the matrix holds NaN or infinity."""


def orthogonalize(basis: Tensor, w: Tensor, dots: Tensor, sq: Tensor, h: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Subtract ``h @ basis`` from ``w`` in place; return what is left of ``w`` along each row, and its squared norm."""
    _gram_schmidt(basis, w, h, w, dots[: len(basis)], sq)
    return dots[: len(basis)], sq


class Basis:
    """Room for the vectors of a Krylov basis, the only memory of size (parameters x steps) in this package.

    Args:
        rows: how many vectors.
        like: the operator.
        dtype: what to keep them in; the operator's dtype if None. In bfloat16 the vectors that the recurrence itself
            uses, the last two, stay in full precision apart.
        device: where to keep them; the operator's device if None.

    Raises:
        ValueError: if the dtype is none that the kernel takes.
    """

    def __init__(
        self, rows: int, like: SymmetricMap, dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> None:
        if dtype not in BASIS_DTYPES:
            raise ValueError(f"basis dtype is {dtype}, must be one of {BASIS_DTYPES}")
        self.device = like.device if device is None else torch.device(device)
        self.rows = torch.empty(rows, like.n, dtype=dtype or like.dtype, device=self.device)
        self._dots = torch.empty(rows, dtype=torch.float64, device=self.device)
        self._sq = torch.empty((), dtype=torch.float64, device=self.device)
        # Below this a product with a unit vector is rounding: of the vector, and of a row that is kept in fewer bits.
        self.tolerance = 10 * torch.finfo(like.dtype).eps
        if torch.finfo(self.rows.dtype).eps > torch.finfo(like.dtype).eps:
            self.tolerance += 4 * torch.finfo(self.rows.dtype).eps / max(like.n, 1) ** 0.5

    def keep(self, index: int, vector: Tensor) -> None:
        """Store a unit vector."""
        self.rows[index].copy_(vector)

    def clean(self, count: int, w: Tensor, passes: int = 2) -> tuple[Tensor, Tensor, float]:
        """Make ``w`` orthogonal to the first ``count`` vectors.

        Returns:
            ``w`` (the tensor given, where the basis lives on its device), the coefficients that were subtracted, and
            the norm of what is left.
        """
        here = w if w.device == self.device else w.to(self.device)
        rows = self.rows[:count]
        dots, sq = orthogonalize(rows, here, self._dots, self._sq)
        subtracted = torch.zeros_like(dots)
        for _ in range(passes):
            if not float(dots.abs().max()) > self.tolerance * float(sq) ** 0.5:
                break
            h = dots.clone()
            subtracted += h
            dots, sq = orthogonalize(rows, here, self._dots, self._sq, h)
        return here.to(w.device), subtracted, float(sq) ** 0.5


def basis_bytes(n: int, steps: int, dtype: torch.dtype, block: int = 1) -> int:
    """Return the bytes of a Krylov basis, and with it nearly all memory that Lanczos adds to the operator's own."""
    return n * steps * block * torch.empty((), dtype=dtype).element_size()


class Tridiagonal(NamedTuple):
    """What a Lanczos process leaves.

    Attributes:
        alpha: float64 diagonal ``[m]``.
        beta: float64 off-diagonal ``[m - 1]``.
        residual: norm of the vector that would have been next, 0 where the subspace is invariant.
    """

    alpha: Tensor
    beta: Tensor
    residual: float

    def eigh(self) -> tuple[Tensor, Tensor]:
        """Return its eigenvalues, ascending, and eigenvectors, in float64."""
        values, vectors = torch.linalg.eigh(
            torch.diag(self.alpha) + torch.diag(self.beta, 1) + torch.diag(self.beta, -1)
        )
        return values, vectors


class _Process:
    """One Lanczos process, a step at a time."""

    def __init__(self, start: Tensor, basis: Basis) -> None:
        self.basis = basis
        # The recurrence's own two vectors: rows 0 and 1 in turn.
        self.recent = torch.zeros(2, start.numel(), dtype=start.dtype, device=start.device)
        self._dots = torch.empty(2, dtype=torch.float64, device=start.device)
        self._sq = torch.empty((), dtype=torch.float64, device=start.device)
        self.alpha: list[float] = []
        self.beta: list[float] = []
        self.residual = float(torch.linalg.vector_norm(start, dtype=torch.float64))
        if not 0 < self.residual < math.inf:
            raise ValueError("the start vector is zero or not finite, must have a direction")
        self.done = False
        self._next(start)

    @property
    def vector(self) -> Tensor:
        """What to multiply next, a unit vector."""
        return self.recent[len(self.alpha) % 2]

    def _next(self, w: Tensor) -> None:
        torch.mul(w, 1.0 / self.residual, out=self.vector)
        self.basis.keep(len(self.alpha), self.vector)

    def step(self, w: Tensor, last: bool) -> None:
        """Take the product with :attr:`vector`; ``w`` is overwritten."""
        at = len(self.alpha)
        now = at % 2
        # Twice, because alpha may be much larger than what is left.
        dots, _ = orthogonalize(self.recent, w, self._dots, self._sq)
        h = dots.clone()
        dots, _ = orthogonalize(self.recent, w, self._dots, self._sq, h)
        alpha = float(h[now] + dots[now])
        if not math.isfinite(alpha):
            raise NotFiniteError(f"the product of step {at + 1} holds NaN or infinity")
        w, _, norm = self.basis.clean(at + 1, w)
        if not math.isfinite(norm):
            raise NotFiniteError(f"the product of step {at + 1} holds NaN or infinity")
        self.alpha.append(alpha)
        scale = max(*map(abs, self.alpha), *self.beta, 0.0)
        self.residual = norm
        # An invariant subspace: what is left is the rounding of what was subtracted.
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
    """Run one process from each start vector, in lockstep, so that a pass over the data serves all of them.

    Args:
        op: the matrix.
        starts: start vectors ``[n]``, which need not be normalized.
        steps: largest number of steps; a process ends earlier where its subspace turns out to be invariant.
        bases: room for ``steps`` vectors for each.
        advance: called after each step with the number of products that it took.

    Returns:
        A tridiagonal matrix for each start vector.

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
