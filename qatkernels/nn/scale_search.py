"""Initial scales by search: for each scale the one with the smallest error, of the weights or of the layer's output.

    error(s, z) = sum of m * (w - Q(w; s, z))**2  over the weights that share the scale s and the zero point z

``m`` is 1 (``"mse"``), or the mean of each input feature's square (``"activation"``). With these moments the error is
the expected squared error of the layer's output, ``E |(W - Q) x|**2``, if products of different inputs average to zero.
llama.cpp's importance matrix weights errors in the same way.

All scales are searched at once, a call of :func:`qatkernels.ops.quantization_error` for each candidate. The error has
many local minima, so candidates first cover the whole range in which the best scale can be, evenly in the logarithm;
then they close in on the best one. What `Grid.init_scale` proposes is among the candidates: no result is worse.

The range follows from what holds at a minimum. With codes held, the best scale is a weighted mean of ``|w| / |v|``,
with ``v`` the level of a weight over the scale, and weights ``m * v**2``. Larger weights have larger levels. So this
mean is at least the mean of ``|w|``, with weights ``m``, over the largest level. And a scale so large that all weights
use levels below half of the outermost one is no better than its half, which has these levels too. (Of grids without
zero, a third has them.) So twice the largest weight over the outermost level is enough, or three times that weight.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from .._torch_compat import is_fake
from ..grids import MIN_SCALE, Grid, check_group_size
from ..ops import quantization_error

#: Candidates that cover the range of scales.
COVERING = 32
#: Rounds that close in on the best scale, and candidates of a round on either side of it.
ROUNDS, SIDE = 3, 4


def search_scale(
    w: Tensor,
    grid: Grid,
    group_size: int | None = None,
    *,
    per_tensor: bool = False,
    moments: Tensor | None = None,
    stored: Callable[[Tensor], Tensor] = lambda scale: scale,
) -> tuple[Tensor, Tensor | None]:
    """Return the scales, and zero points if the grid has them, with the smallest error of a weight.

    Args:
        w: weight ``[N, K]``, or a stack ``[E, N, K]``.
        grid: the quantization grid.
        group_size: features that share a scale; must divide ``K``. None for one scale per row.
        per_tensor: whether the whole weight has one scale; of a stack, each expert.
        moments: ``[K]``, or ``[E, K]`` for a stack: the weight of each input feature's errors, not negative. Where all
            that belong to a scale are zero, they count as 1.
        stored: what a forward makes of a scale, such as rounding it to float16; errors are those of the result.

    Returns:
        float32 scales ``[..., N]``, ``[..., N, K / group_size]``, or ``[1]`` (``[E]``) per tensor, at least
        ``MIN_SCALE``; and integral zero points like them, or None. On a device without data (meta), tensors like these.

    Raises:
        TypeError: if an argument has another type, naming it.
        ValueError: if ``group_size`` does not divide ``K``, or ``moments`` does not fit ``w``.
    """
    if group_size is not None:
        check_group_size(group_size, w.shape[-1])
    if moments is not None and moments.shape != (*w.shape[:-2], w.shape[-1]):
        expected = (*w.shape[:-2], w.shape[-1])
        raise ValueError(f"moments has shape {tuple(moments.shape)}, must be {expected}: a number for each feature")
    search = _Search(w.detach(), grid, group_size, per_tensor, moments, stored)
    if not (w.is_meta or is_fake(w)):
        search.run()
    return search.scale, search.zero_point


class _Search:
    """The best scales so far, and their errors."""

    def __init__(
        self, w: Tensor, grid: Grid, group_size: int | None, per_tensor: bool, moments: Tensor | None,
        stored: Callable[[Tensor], Tensor],
    ) -> None:  # fmt: skip
        self.w, self.grid, self.group_size, self.stored = w, grid, group_size, stored
        self.moments = None if moments is None else _without_idle(moments.double(), group_size)
        # A stack has one scale per tensor for each expert. One element, not a scalar: FSDP shards along a dimension.
        shape = (*w.shape[:-2], *(() if w.ndim > 2 else (1,))) if per_tensor else w.shape[:-1]
        if group_size is not None:
            shape = (*shape, w.shape[-1] // group_size)
        self.rows = w.reshape(*shape, -1)  # those of a row share a scale
        self.scale, self.zero_point = self._proposed(grid.scale_init)

    def run(self) -> None:
        """Try every candidate."""
        self.error = self._error(self.scale, self.zero_point)
        for method in ("max", "mean", "lsq", *(("range",) if self.grid.has_zero_point else ())):
            self._try(*self._proposed(method))
        low, high = self._range()
        ratio = (high / low) ** (1 / (COVERING - 1))  # of neighbouring candidates
        for zero_point_of in self._placements():
            for step in range(COVERING):
                scale = (low * ratio**step).float()
                self._try(scale, zero_point_of(scale))
        for _ in range(ROUNDS):
            self._shift()
            ratio, center = ratio ** (1 / (SIDE + 1)), self.scale.double()
            for step in (*range(-SIDE, 0), *range(1, SIDE + 1)):
                self._try((center * ratio**step).float(), self.zero_point)
        self._shift()

    def _try(self, scale: Tensor, zero_point: Tensor | None) -> None:
        """Keep candidates where they are better; of equal ones the first stays."""
        scale = scale.clamp_min(MIN_SCALE)
        error = self._error(scale, zero_point)
        better = error < self.error
        self.error = torch.where(better, error, self.error)
        self.scale = torch.where(better, scale, self.scale)
        if zero_point is not None and self.zero_point is not None:
            self.zero_point = torch.where(better, zero_point, self.zero_point)

    def _error(self, scale: Tensor, zero_point: Tensor | None) -> Tensor:
        return quantization_error(
            self.w, self.stored(scale), self.grid, group_size=self.group_size, zero_point=zero_point,
            moments=self.moments,
        )  # fmt: skip

    def _proposed(self, method: str) -> tuple[Tensor, Tensor | None]:
        """Return scales of a method of the grid, and the zero points that go with them."""
        scale = self.grid.init_scale(self.rows, method=method).float()
        if not self.grid.has_zero_point:
            return scale, None
        return scale, self.grid.init_zero_point(self.rows, scale).float()

    def _range(self) -> tuple[Tensor, Tensor]:
        """Return between which scales the best one is, in float64 (see the docstring of this module)."""
        values = self.grid.values
        longest, outermost = max(abs(values[0]), abs(values[-1])), values[-1]
        if self.grid.has_zero_point:
            smallest, largest = self._ends()
            largest = largest - smallest
        else:
            largest = self.rows.abs().amax(-1)
            outermost = min(-values[0], values[-1]) if values[0] < 0 < values[-1] else longest
        low = (self._mean() / longest).clamp_min(MIN_SCALE)
        factor = 2 if 0 in values else 3
        return low, torch.maximum(factor * largest.double() / outermost, low)

    def _mean(self) -> Tensor:
        """Return the mean magnitude of the weights that share a scale, weighted by the moments, in float64."""
        if self.moments is None:
            return self.rows.abs().mean(-1, dtype=torch.float64)
        of_weights = self.moments.unsqueeze(-2).expand(self.w.shape).reshape(self.rows.shape)
        return (of_weights * self.rows.abs()).sum(-1) / of_weights.sum(-1)

    def _ends(self) -> tuple[Tensor, Tensor]:
        """Return the smallest and the largest weight that share a scale, zero included."""
        return self.rows.amin(-1).clamp_max(0).float(), self.rows.amax(-1).clamp_min(0).float()

    def _placements(self) -> Iterator[Callable[[Tensor], Tensor | None]]:
        """Yield functions from scales to zero points, where the grid has them.

        The range of the grid lies about zero as that of the weights does, begins at the smallest weight, or ends at the
        largest.
        """
        if not self.grid.has_zero_point:
            yield lambda scale: None
            return
        low, high, (smallest, largest) = self.grid.code_min, self.grid.code_max, self._ends()
        proportional = self._proposed("range")[1]
        yield lambda scale: proportional
        yield lambda scale: (low - smallest / scale.clamp_min(MIN_SCALE)).round().clamp(low, high)
        yield lambda scale: (high - largest / scale.clamp_min(MIN_SCALE)).round().clamp(low, high)

    def _shift(self) -> None:
        """Try the neighbouring zero points."""
        if (center := self.zero_point) is not None:
            for step in (-2, -1, 1, 2):
                self._try(self.scale, (center + step).clamp(self.grid.code_min, self.grid.code_max))


def _without_idle(moments: Tensor, group_size: int | None) -> Tensor:
    """Return moments with 1 in place of those that are zero for a whole row, or group of it."""
    blocks = moments if group_size is None else moments.unflatten(-1, (-1, group_size))
    return torch.where((blocks == 0).all(-1, keepdim=True), 1.0, blocks).view(moments.shape)
