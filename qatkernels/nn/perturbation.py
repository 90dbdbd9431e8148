"""Perturbations of quantized weights after rounding, and the size that sharpness-aware minimization gives them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from torch import Tensor

from ..ops import perturb_

if TYPE_CHECKING:
    from .quantized import Quantized

#: Radius of a perturbation (Foret et al., 2021), and what ASAM adds to a weight's size (Kwon et al., 2021), by default.
RHO, ETA = 0.05, 0.01

#: What a forward adds to its quantized weight: a tensor like the weight, which autograd sees; or the last three
#: arguments of :func:`qatkernels.ops.perturb_` (gradient, factor, eta), which autograd does not see and which takes no
#: memory.
Perturbation = Tensor | tuple[Tensor, Tensor, float | None]


def perturb(weight: Tensor, perturbation: Perturbation | None) -> Tensor:
    """Return a quantized weight, just made, with its perturbation."""
    if perturbation is None:
        return weight
    if isinstance(perturbation, Tensor):
        return weight + perturbation.to(weight.dtype)
    perturb_(weight.detach(), *perturbation)
    return weight


@contextmanager
def perturbed(layers: Iterable[tuple[Quantized, Perturbation]]) -> Iterator[None]:
    """Perturb the quantized weight of layers in every forward within the context."""
    layers = list(layers)
    before = [layer.perturbation for layer, _ in layers]
    try:
        for layer, perturbation in layers:
            layer.perturbation = perturbation
        yield
    finally:
        for (layer, _), old in zip(layers, before, strict=True):
            layer.perturbation = old


def ascent(sums: Tensor, rho: float) -> tuple[Tensor, Tensor]:
    """Return SAM's factor and the norm of its perturbation ``e = factor * T**2 * g``, ``factor = rho / norm(T * g)``.

    Args:
        sums: :func:`qatkernels.ops.perturbation_norms`, summed over all that is perturbed together.
        rho: radius.
    """
    once, twice = sums.sqrt().unbind()
    # Without a gradient there is no perturbation. The limit is far below any norm that a loss scale leads to, and its
    # reciprocal is a float32 number.
    factor = rho / once.clamp_min(1e-30)
    return factor, factor * twice
