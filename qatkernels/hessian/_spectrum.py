"""The density of eigenvalues by stochastic Lanczos quadrature (Golub and Welsch; Ubaru, Chen and Saad, 2017).

A random unit vector v (a probe) defines a measure on the eigenvalues: the squared components of v along the
eigenvectors. Its expectation is the spectral density. Lanczos from v gives the Gauss quadrature of this measure: nodes
are the Ritz values, weights are the squared first components of the eigenvectors of the tridiagonal matrix. m steps
integrate polynomials up to degree 2 m - 1 exactly. The mean over the probes estimates the density, and their spread its
error.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..dtypes import dtype_name
from .lanczos import Basis, Tridiagonal, basis_bytes, lanczos
from .operator import SymmetricMap
from .vectors import vectors_of

logger = logging.getLogger(__package__)

#: Ritz values with less weight than this are ignored for the extreme eigenvalues, as in WinQ's paper.
LEAST_WEIGHT = 1e-8
#: Eigenvalues below this in magnitude are near zero, as in WinQ's paper.
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
        """Return the estimate from one sample per probe."""
        error = samples.std().item() / math.sqrt(len(samples)) if len(samples) > 1 else math.nan
        return cls(scale * samples.mean().item(), abs(scale) * error)

    def to_dict(self) -> dict[str, float | None]:
        """Return the estimate as JSON-able values. JSON has no NaN: the error of one probe is None."""
        return {"value": self.value, "error": None if math.isnan(self.error) else self.error}


@dataclass(frozen=True)
class Spectrum:
    """Ritz values and weights of every probe, and the quantities computed from them.

    Attributes:
        n: size of the matrix.
        ritz: for each probe, float64 Ritz values ``[steps]``, ascending; fewer if a subspace was invariant.
        weights: their weights, which sum to 1 for each probe.
        residuals: float64 norm of ``A y - theta y`` of each Ritz pair: the distance to the nearest true eigenvalue is
            at most that.
        near_zero: the threshold of the near-zero mass.
        settings: the arguments of :func:`spectrum`.
    """

    n: int
    ritz: list[Tensor]
    weights: list[Tensor]
    residuals: list[Tensor]
    near_zero: float = NEAR_ZERO
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def lambda_min(self) -> float:
        """Smallest Ritz value with a weight above 1e-8: an upper bound of the smallest eigenvalue."""
        return min(float(t[w > LEAST_WEIGHT].min()) for t, w in zip(self.ritz, self.weights, strict=True))

    @property
    def lambda_max(self) -> float:
        """Largest Ritz value with a weight above 1e-8: a lower bound of the largest eigenvalue."""
        return max(float(t[w > LEAST_WEIGHT].max()) for t, w in zip(self.ritz, self.weights, strict=True))

    def mass(self, low: float, high: float) -> Estimate:
        """Return the fraction of eigenvalues in ``[low, high)``."""
        return Estimate.of(torch.stack([w[(t >= low) & (t < high)].sum() for t, w in self._probes()]))

    def bounds(self, low: float, high: float) -> tuple[float, float]:
        """Return the smallest and the largest possible fraction of eigenvalues in ``[low, high]``, given the steps.

        These are the bounds of Chebyshev and Markov: every measure with the moments that Lanczos computed lies between
        them. They are averaged over the probes. If the two are far apart, more steps are needed; :meth:`mass` lies
        between them.
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
        """Bounds of the near-zero mass (:meth:`bounds`)."""
        return self.bounds(-self.near_zero, self.near_zero)

    @property
    def negative_bounds(self) -> tuple[float, float]:
        """Bounds of the negative mass (:meth:`bounds`)."""
        return self.bounds(-math.inf, -self.near_zero)

    @property
    def near_zero_mass(self) -> Estimate:
        """Fraction of eigenvalues with a magnitude below ``near_zero``."""
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
        """Return the density of eigenvalues, where each Ritz value is a Gaussian.

        Args:
            grid: points to evaluate at, float64 ``[points]``. If None, 2000 points over the range of the Ritz values
                and five sigma on each side.
            sigma: standard deviation of the Gaussians; a hundredth of the range of the Ritz values if None.

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
        """Return the spectrum as JSON-able values."""
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
        """Return the spectrum that :meth:`to_dict` was called on."""
        ritz, weights, residuals = (
            [torch.tensor(row, dtype=torch.float64) for row in values[name]]
            for name in ("ritz", "weights", "residuals")
        )
        return cls(values["n"], ritz, weights, residuals, values["near_zero"], values["settings"])


def _cumulative(ritz: Tensor, weights: Tensor, residuals: Tensor, x: float) -> tuple[float, float]:
    """Return a lower bound of the mass of ``(-inf, x)`` and an upper bound of the mass of ``(-inf, x]``, for one probe.

    Of all measures with the computed moments, the one with a node at x has the smallest mass below x and the largest
    mass up to and including x. It is the Gauss-Radau quadrature: Lanczos is extended by one step, whose diagonal entry
    is chosen such that x is an eigenvalue. The extended matrix is written here in the basis of the Ritz vectors.
    """
    if math.isinf(x):
        return (0.0, 0.0) if x < 0 else (1.0, 1.0)
    distances = ritz - x
    open_pairs = residuals > 0
    nearest = distances.abs().argmin()
    if not bool(open_pairs.any()) or bool(distances[nearest] == 0):  # Lanczos ended early, or x is a node already
        return float(weights[ritz < x].sum()), float(weights[ritz <= x].sum())
    m = len(ritz)
    # In the eigenvectors of a tridiagonal matrix with positive first components, the signs of the last components
    # alternate.
    border = residuals * (1 - 2 * ((m - 1 - torch.arange(m, dtype=torch.float64)) % 2))
    matrix = torch.zeros(m + 1, m + 1, dtype=torch.float64)
    matrix.diagonal()[:m] = ritz
    matrix[:m, m] = matrix[m, :m] = border
    matrix[m, m] = x + float((residuals[open_pairs].square() / distances[open_pairs]).sum())
    nodes, vectors = torch.linalg.eigh(matrix)
    masses = (weights.sqrt() @ vectors[:m]).square()
    node_at_x = int((nodes - x).abs().argmin())
    below = float(masses[:node_at_x].sum())
    return below, below + float(masses[node_at_x])


def probe(op: SymmetricMap, seed: int, index: int) -> Tensor:
    """Return a standard normal vector ``[n]``. It is the same on every device, in every process and in every dtype.

    If vectors lie in shares (:class:`HessianOperator` of a sharded model), it is this process's share of that vector.
    """
    generator = torch.Generator().manual_seed((seed * 1_000_003 + index) % 2**64)
    numbers = vectors_of(op).drawn(lambda count: torch.randn(count, generator=generator))
    return numbers.to(op.device, op.dtype)


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

    The Krylov basis has ``n * steps * block`` elements. It is the only memory of that size. Its bytes are logged before
    the computation starts, and returned in ``settings["basis_bytes"]``. If the operator's model is sharded, each
    process holds its share of the basis, and all processes must call this. They get the same result.

    Args:
        op: the matrix, such as a :class:`HessianOperator`.
        probes: number of random start vectors (standard normal, normalized).
        steps: Lanczos steps from each start vector.
        seed: seed of the start vectors.
        near_zero: threshold of the near-zero mass.
        block: probes that run in lockstep. If graphs of batches are not kept, one pass over the data then serves
            ``block`` products. Each probe of a block needs its own basis.
        basis_dtype: dtype to store the basis in, such as bfloat16; the operator's dtype if None.
        basis_device: device to store the basis on, such as the CPU; the operator's device if None.
        advance: called after each step with the number of products, for progress bars.

    Raises:
        ValueError: if a count is not positive, or the basis dtype is unknown.
        NotFiniteError: if a product holds NaN or infinity.
    """
    for name, value in (("probes", probes), ("steps", steps), ("block", block)):
        if value < 1:
            raise ValueError(f"{name} is {value}, must be at least 1")
    rows, block = min(steps, op.n), min(block, probes)
    length = vectors_of(op).length
    size = basis_bytes(length, rows, basis_dtype or op.dtype, block)
    logger.info("the Krylov basis takes %.4g MB: %d x %d vectors of %d", size * 1e-6, block, rows, length)
    bases = [Basis(rows, op, basis_dtype, basis_device) for _ in range(block)]
    matrices: list[Tridiagonal] = []
    for first in range(0, probes, block):
        starts = [probe(op, seed, i) for i in range(first, min(first + block, probes))]
        matrices += lanczos(op, starts, rows, bases[: len(starts)], advance)
    ritz, weights, residuals = [], [], []
    for matrix in matrices:
        values, vectors = matrix.eigh()
        ritz.append(values)
        weights.append(vectors[0].square())
        residuals.append(matrix.residual * vectors[-1].abs())
    settings = {
        "probes": probes, "steps": steps, "seed": seed, "block": block, "dtype": dtype_name(op.dtype),
        "basis_dtype": dtype_name(basis_dtype or op.dtype), "basis_bytes": size,
    }  # fmt: skip
    return Spectrum(op.n, ritz, weights, residuals, near_zero, settings)
