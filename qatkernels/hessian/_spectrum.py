"""The density of eigenvalues by stochastic Lanczos quadrature (Golub and Welsch; Ubaru, Chen and Saad, 2017).

For a random unit vector v the weights of v's components along the eigenvectors make a measure whose expectation is the
spectral density. Lanczos from v gives its Gauss quadrature: nodes are the Ritz values, weights the squared first
components of the tridiagonal matrix's eigenvectors; m steps integrate polynomials up to degree 2 m - 1 exactly. The
mean over probes estimates the density, their spread its error.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .lanczos import Basis, Tridiagonal, basis_bytes, lanczos
from .operator import SymmetricMap

logger = logging.getLogger(__package__)

#: Ritz values of less weight than this do not count as extreme: WinQ's choice.
LEAST_WEIGHT = 1e-8
#: Eigenvalues below this in magnitude are near zero: WinQ's choice.
NEAR_ZERO = 1.5e-3


@dataclass(frozen=True)
class Estimate:
    """A mean over probes.

    Attributes:
        value: the mean.
        error: its standard error; NaN for one probe.
    """

    value: float
    error: float

    @classmethod
    def of(cls, samples: Tensor, scale: float = 1.0) -> Estimate:
        """Return the estimate from one number for each probe."""
        error = samples.std().item() / math.sqrt(len(samples)) if len(samples) > 1 else math.nan
        return cls(scale * samples.mean().item(), abs(scale) * error)

    def to_dict(self) -> dict[str, float | None]:
        """Return it as JSON has it, which has no NaN."""
        return {"value": self.value, "error": None if math.isnan(self.error) else self.error}


@dataclass(frozen=True)
class Spectrum:
    """Ritz values and weights of every probe, and what follows from them.

    Attributes:
        n: size of the matrix.
        ritz: float64 Ritz values ``[steps]`` of each probe, ascending; fewer where a subspace was invariant.
        weights: their weights, which sum to 1 for each probe.
        residuals: float64 norm of ``A y - theta y`` of each Ritz pair: a true eigenvalue is no further away.
        near_zero: the threshold of the near-zero mass.
        settings: what it was computed with.
    """

    n: int
    ritz: list[Tensor]
    weights: list[Tensor]
    residuals: list[Tensor]
    near_zero: float = NEAR_ZERO
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def lambda_min(self) -> float:
        """Smallest Ritz value of weight above 1e-8; the smallest eigenvalue is not larger."""
        return min(float(t[w > LEAST_WEIGHT].min()) for t, w in zip(self.ritz, self.weights, strict=True))

    @property
    def lambda_max(self) -> float:
        """Largest Ritz value of weight above 1e-8; the largest eigenvalue is not smaller."""
        return max(float(t[w > LEAST_WEIGHT].max()) for t, w in zip(self.ritz, self.weights, strict=True))

    def mass(self, low: float, high: float) -> Estimate:
        """Return the fraction of eigenvalues in ``[low, high)``."""
        return Estimate.of(torch.stack([w[(t >= low) & (t < high)].sum() for t, w in self._probes()]))

    def bounds(self, low: float, high: float) -> tuple[float, float]:
        """Return the least and the most that the steps allow in ``[low, high]``, as fractions of all eigenvalues.

        The mean over the probes of Chebyshev's and Markov's bounds: no measure with the moments that the steps have
        seen has less or more there. A mass is resolved where the two are close; :meth:`mass` lies between.
        """
        pairs = [
            (_cumulative(*parts, low), _cumulative(*parts, high))
            for parts in zip(self.ritz, self.weights, self.residuals, strict=True)
        ]
        least = sum(max(above[0] - below[1], 0.0) for below, above in pairs) / len(pairs)
        most = sum(min(above[1] - below[0], 1.0) for below, above in pairs) / len(pairs)
        return least, most

    @property
    def near_zero_bounds(self) -> tuple[float, float]:
        """What the steps allow the near-zero mass to be (:meth:`bounds`)."""
        return self.bounds(-self.near_zero, self.near_zero)

    @property
    def negative_bounds(self) -> tuple[float, float]:
        """What the steps allow the negative mass to be (:meth:`bounds`)."""
        return self.bounds(-math.inf, -self.near_zero)

    @property
    def near_zero_mass(self) -> Estimate:
        """Fraction of eigenvalues closer to 0 than ``near_zero``."""
        return Estimate.of(torch.stack([w[t.abs() < self.near_zero].sum() for t, w in self._probes()]))

    @property
    def negative_mass(self) -> Estimate:
        """Fraction of eigenvalues at or below ``-near_zero``."""
        return Estimate.of(torch.stack([w[t <= -self.near_zero].sum() for t, w in self._probes()]))

    def moment(self, power: int) -> Estimate:
        """Return the mean of ``eigenvalue ** power``; 1 gives the trace over n."""
        return Estimate.of(torch.stack([(w * t**power).sum() for t, w in self._probes()]))

    @property
    def trace(self) -> Estimate:
        """Sum of the eigenvalues."""
        mean = self.moment(1)
        return Estimate(self.n * mean.value, self.n * mean.error)

    def _probes(self) -> Any:
        return zip(self.ritz, self.weights, strict=True)

    def density(self, grid: Tensor | None = None, sigma: float | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Return the density, each Ritz value smoothed to a Gaussian.

        Args:
            grid: where, float64 ``[points]``; 2000 points over the Ritz values and their surroundings if None.
            sigma: standard deviation of the Gaussian; a hundredth of the range of the Ritz values if None.

        Returns:
            Points, densities, and their standard errors over the probes, each ``[points]``.
        """
        low, high = min(float(t.min()) for t in self.ritz), max(float(t.max()) for t in self.ritz)
        if sigma is None:
            sigma = 0.01 * (high - low) or 1e-3 * max(abs(high), 1e-3)
        if not sigma > 0:
            raise ValueError(f"sigma is {sigma}, must be positive")
        if grid is None:
            grid = torch.linspace(low - 5 * sigma, high + 5 * sigma, 2000, dtype=torch.float64)
        scale = 1.0 / (sigma * math.sqrt(2 * math.pi))
        rows = [scale * (w * torch.exp(-0.5 * ((grid[:, None] - t) / sigma) ** 2)).sum(1) for t, w in self._probes()]
        stacked = torch.stack(rows)
        error = stacked.std(0) / math.sqrt(len(rows)) if len(rows) > 1 else torch.full_like(grid, math.nan)
        return grid, stacked.mean(0), error

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON has it."""
        return {
            "n": self.n,
            "lambda_min": self.lambda_min,
            "lambda_max": self.lambda_max,
            "near_zero": self.near_zero,
            "near_zero_mass": self.near_zero_mass.to_dict(),
            "near_zero_bounds": list(self.near_zero_bounds),
            "negative_mass": self.negative_mass.to_dict(),
            "negative_bounds": list(self.negative_bounds),
            "trace": self.trace.to_dict(),
            "settings": self.settings,
            "ritz": [t.tolist() for t in self.ritz],
            "weights": [w.tolist() for w in self.weights],
            "residuals": [r.tolist() for r in self.residuals],
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Spectrum:
        """Build a spectrum from :meth:`to_dict`'s result."""
        ritz, weights, residuals = (
            [torch.tensor(row, dtype=torch.float64) for row in values[name]]
            for name in ("ritz", "weights", "residuals")
        )
        return cls(values["n"], ritz, weights, residuals, values["near_zero"], values["settings"])


def _cumulative(ritz: Tensor, weights: Tensor, residuals: Tensor, x: float) -> tuple[float, float]:
    """Return bounds of one probe's mass below x, and up to and with x.

    Of all measures with the same moments the one that has a node at x has the least below it and the most with it. Its
    matrix is the Lanczos process one step further, with the last entry such that x is an eigenvalue (Gauss-Radau).
    """
    if math.isinf(x):
        return (0.0, 0.0) if x < 0 else (1.0, 1.0)
    away = ritz - x
    live = residuals > 0
    node = away.abs().argmin()
    if not bool(live.any()) or bool(away[node] == 0):  # the process has ended, or x is a node already
        return float(weights[ritz < x].sum()), float(weights[ritz <= x].sum())
    m = len(ritz)
    # Last components of the tridiagonal matrix's eigenvectors alternate in sign where the first are positive.
    arrow = residuals * (1 - 2 * ((m - 1 - torch.arange(m, dtype=torch.float64)) % 2))
    matrix = torch.zeros(m + 1, m + 1, dtype=torch.float64)
    matrix.diagonal()[:m] = ritz
    matrix[:m, m] = matrix[m, :m] = arrow
    matrix[m, m] = x + float((residuals[live].square() / away[live]).sum())
    nodes, vectors = torch.linalg.eigh(matrix)
    masses = (weights.sqrt() @ vectors[:m]).square()
    at = int((nodes - x).abs().argmin())
    below = float(masses[:at].sum())
    return below, below + float(masses[at])


def probe(op: SymmetricMap, seed: int, index: int) -> Tensor:
    """Return a standard normal vector ``[n]``, the same on every device, in every process and dtype."""
    generator = torch.Generator().manual_seed((seed * 1_000_003 + index) % 2**64)
    return torch.randn(op.n, generator=generator).to(op.device, op.dtype)


def spectrum(
    op: SymmetricMap,
    probes: int = 20,
    steps: int = 60,
    *,
    seed: int = 0,
    near_zero: float = NEAR_ZERO,
    block: int = 1,
    basis_dtype: torch.dtype | None = None,
    basis_device: torch.device | str | None = None,
    advance: Callable[[int], None] | None = None,
) -> Spectrum:
    """Estimate the spectrum of a symmetric matrix from ``probes * steps`` products.

    The basis takes ``n * steps * block`` numbers, logged before anything is computed and noted in
    ``settings["basis_bytes"]``; nothing else of that size is kept.

    Args:
        op: the matrix, a :class:`HessianOperator` say.
        probes: random start vectors (standard normal, normalized).
        steps: Lanczos steps from each.
        seed: of the start vectors.
        near_zero: threshold of the near-zero mass.
        block: probes that advance together; with batches whose graphs are not kept, each pass over the data then serves
            as many products, for as many bases.
        basis_dtype: keep the basis in bfloat16, say; the operator's dtype if None.
        basis_device: keep it on the CPU, say; the operator's device if None.
        advance: called with the number of products after each step, for progress bars.

    Raises:
        ValueError: if a count is not positive, or the basis dtype is unknown.
        NotFiniteError: if a product holds NaN or infinity.
    """
    for name, value in (("probes", probes), ("steps", steps), ("block", block)):
        if value < 1:
            raise ValueError(f"{name} is {value}, must be at least 1")
    rows, block = min(steps, op.n), min(block, probes)
    size = basis_bytes(op.n, rows, basis_dtype or op.dtype, block)
    logger.info("the Krylov basis takes %.4g MB: %d x %d vectors of %d", size * 1e-6, block, rows, op.n)
    bases = [Basis(rows, op, basis_dtype, basis_device) for _ in range(block)]
    found: list[Tridiagonal] = []
    for first in range(0, probes, block):
        starts = [probe(op, seed, i) for i in range(first, min(first + block, probes))]
        found += lanczos(op, starts, rows, bases[: len(starts)], advance)
    ritz, weights, residuals = [], [], []
    for matrix in found:
        values, vectors = matrix.eigh()
        ritz.append(values)
        weights.append(vectors[0].square())
        residuals.append(matrix.residual * vectors[-1].abs())
    settings = {
        "probes": probes, "steps": steps, "seed": seed, "block": block, "dtype": str(op.dtype)[6:],
        "basis_dtype": str(basis_dtype or op.dtype)[6:], "basis_bytes": size,
    }  # fmt: skip
    return Spectrum(op.n, ritz, weights, residuals, near_zero, settings)
