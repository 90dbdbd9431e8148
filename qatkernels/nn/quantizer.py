"""How a layer quantizes its weight: the grid, and the noise and perturbations that WinQ, SQuAT and sharpness apply."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from ..arithmetic import quotient
from ..dtensor import gathered, is_dtensor, on_every_process, replicated, splits_groups, whole
from ..grids import MIN_SCALE, Grid
from ..ops import perturb_, quantize
from ..ops._fake_quantize import FORWARD, check_fit, check_noise
from ..ops.noise import make_seed
from ..ops.quant_linear import joins, quant_linear
from .config import SEARCHES, QuantConfig
from .scale_search import search_scale

if TYPE_CHECKING:
    from .quantized import Quantized

#: Whether scales are searched; see :func:`scales_come_later`.
_searching: ContextVar[bool] = ContextVar("searching", default=True)

#: Radius of a perturbation (Foret et al., 2021), and what ASAM adds to a weight's size (Kwon et al., 2021), by default.
RHO, ETA = 0.05, 0.01

#: What a forward adds to its quantized weight. Either a tensor like the weight, through which autograd differentiates;
#: or the last three arguments of :func:`qatkernels.ops.perturb_` (gradient, factor, eta), which is applied in place:
#: autograd does not see it, and it takes no memory. Under FSDP2 both may be sharded as the weight is: a forward gathers
#: them for one layer at a time, and gradients of the former are reduced to the mean over the processes.
Perturbation = Tensor | tuple[Tensor, Tensor, float | None]


class WeightQuantizer:
    """Quantizes the weight of one layer. The layer holds the tensors, this object the settings.

    Call :meth:`configure` before anything else.

    Attributes:
        config: what to quantize to.
        grid: its grid.
        constants: the constants of the grid, as a list for the ops.
        group_size: features that share a scale, or None.
        grad_scale: factor of the scales' gradients (LSQ; Esser et al., 2020).
        noise_std: standard deviation of the noise on the weight in training forwards (WinQ), negative for the mirrored
            noise of the same seed.
        scale_noise_std: the same for the scales.
        added: what every forward adds to the quantized weight; None for nothing.
        surrogate: the ``a`` of StableQAT's gradient in training forwards; 0 for straight-through.
        bypassed: whether forwards use the master weight as it is; :func:`qatkernels.nn.calibrate` sets it for its run.

    Noise and what is added are not saved. Change the noise by :meth:`set_noise`, and what is added by :meth:`modified`.
    """

    config: QuantConfig
    grid: Grid
    constants: list[float]
    group_size: int | None
    grad_scale: float
    bypassed: bool = False

    def __init__(self) -> None:
        self.noise_std = self.scale_noise_std = self.surrogate = 0.0
        self.added: Perturbation | None = None

    def configure(self, config: QuantConfig, numel: int) -> None:
        """Set what to quantize to; noise and what is added stay.

        Args:
            config: what to quantize to.
            numel: weights of the layer; of one expert, in a stack.
        """
        self.config, self.grid, self.group_size = config, config.grid, config.group_size
        self.constants, self.grad_scale = list(self.grid.constants), self.grid.grad_scale(numel)

    def set_noise(self, noise_std: float, scale_noise_std: float) -> None:
        """Set the noise of training forwards, until it is set again.

        WinQ sets it in its constructor and clears it when it is removed. This is no context manager like
        :meth:`modified`: one would bring back the noise of an earlier WinQ that a user has forgotten.
        """
        self.noise_std, self.scale_noise_std = noise_std, scale_noise_std

    @contextmanager
    def modified(self, add: Perturbation) -> Iterator[None]:
        """Add something to the quantized weight in every forward within the context.

        Args:
            add: what to add.
        """
        before, self.added = self.added, add
        try:
            yield
        finally:
            self.added = before

    @property
    def unmodified(self) -> bool:
        """Whether a forward adds nothing to the quantized weight, and its gradient is straight-through."""
        return self.added is None and not self.surrogate

    def noise(self, training: bool) -> tuple[float, float]:
        """Return the noise on weight and scales in a forward."""
        return (self.noise_std, self.scale_noise_std) if training else (0.0, 0.0)

    def stored(self, scale: Tensor, zero_point: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return scales and zero points as forwards use them: files can store these as the configuration says.

        The rounding is straight-through: derivatives are those of the parameters themselves.
        """
        if zero_point is not None and self.config.zero_point_domain == "int":
            zero_point = stored_zero_point(zero_point, self.grid)
        return stored_scale(scale, self.config.scale_dtype, self.grid), zero_point

    def plain(
        self, weight: Tensor, scale: Tensor, zero_point: Tensor | None, dtype: torch.dtype | None = None,
        noise: tuple[float, float] = (0.0, 0.0),
    ) -> Tensor:  # fmt: skip
        """Return the fake-quantized weight, without what is added to it.

        Args:
            weight: master weight ``[..., N, K]``.
            scale: its scales.
            zero_point: its zero points, for grids that have them.
            dtype: bfloat16 or float16 for a float32 weight; the weight's dtype if None.
            noise: on weight and scales.
        """
        # The op itself: of what the function fake_quantize checks, only assigned scales can be wrong here.
        seed = self._seed_for(weight, scale, zero_point, noise)
        if is_dtensor(weight):
            if seed is not None:
                seed = replicated(seed, weight)
            if seed is not None or splits_groups(scale, weight):  # noise is that of the elements of the whole weight
                weight, scale = on_every_process(weight), on_every_process(scale)
                zero_point = None if zero_point is None else on_every_process(zero_point)
        quantized: Tensor = FORWARD.call(
            weight, *self.stored(scale, zero_point), seed, self.constants, *noise, self.grad_scale, dtype
        )
        return quantized

    def _seed_for(
        self, weight: Tensor, scale: Tensor, zero_point: Tensor | None, noise: tuple[float, float]
    ) -> Tensor | None:
        """Return a new seed if there is noise, after a check of the scales and the noise."""
        check_fit(weight, scale, self.grid, self.group_size, zero_point)
        if not (noise[0] or noise[1]):
            return None
        check_noise(*noise)
        return make_seed(None, weight.device)

    def linear(
        self, x: Tensor, bias: Tensor | None, weight: Tensor, scale: Tensor, zero_point: Tensor | None,
        dtype: torch.dtype | None, training: bool,
    ) -> Tensor:  # fmt: skip
        """Return ``x @ Q(weight).T + bias``, as a forward computes it.

        Args:
            x: input ``[..., K]``.
            bias: ``[N]`` or None.
            weight: master weight ``[N, K]``.
            scale: its scales.
            zero_point: its zero points, for grids that have them.
            dtype: as for :meth:`plain`.
            training: whether there is noise.
        """
        if self.bypassed or not self.unmodified or not joins(x, bias, weight, dtype):
            return F.linear(x, self(weight, scale, zero_point, dtype, training), bias)
        noise = self.noise(training)
        seed = self._seed_for(weight, scale, zero_point, noise)
        return quant_linear(
            x, bias, dtype, weight, *self.stored(scale, zero_point), seed, self.constants, *noise, self.grad_scale
        )

    def __call__(
        self, weight: Tensor, scale: Tensor, zero_point: Tensor | None, dtype: torch.dtype | None, training: bool
    ) -> Tensor:
        """Return the weight that a forward multiplies with; arguments as for :meth:`plain`."""
        if self.bypassed:
            return weight if dtype is None else weight.to(dtype)
        if training and self.surrogate:
            weight = with_surrogate(self, weight, scale, zero_point)
        quantized = self.plain(weight, scale, zero_point, dtype, self.noise(training))
        if self.added is None:
            return quantized
        if is_dtensor(quantized):
            raise ValueError(
                f"weight is a DTensor of shape {tuple(weight.shape)}, must be a plain tensor where something is added "
                "to the quantized weight: take target='latent' with tensor parallel"
            )
        if isinstance(self.added, Tensor):
            added = gathered(self.added, self.added.device_mesh.ndim) if is_dtensor(self.added) else self.added
            return quantized + added.to(quantized.dtype)
        gradient, factor, eta = self.added
        perturb_(quantized.detach(), whole(gradient), factor, eta)
        return quantized

    @torch.no_grad()
    def codes(self, weight: Tensor, scale: Tensor, zero_point: Tensor | None) -> Tensor:
        """Return the integer codes of a weight."""
        scale, zero_point = self.stored(scale, zero_point)
        return quantize(weight, scale, self.grid, group_size=self.group_size, zero_point=zero_point)


def with_surrogate(quantizer: WeightQuantizer, weight: Tensor, scale: Tensor, zero_point: Tensor | None) -> Tensor:
    """Return a weight whose derivatives are multiplied by StableQAT's factor (Zhao et al., 2026).

    Raises:
        ValueError: if the weight is sharded.
    """
    if is_dtensor(weight):
        raise ValueError(
            f"weight is a DTensor of shape {tuple(weight.shape)}, must be a plain tensor for StableQAT: use DDP or "
            "FSDP2, or leave StableQAT out"
        )
    with torch.no_grad():
        scale, zero_point = quantizer.stored(scale, zero_point)
        wide, rows = weight.detach().float(), scale.clamp_min(MIN_SCALE).view(-1, 1)
        values = FORWARD.call(wide, scale, zero_point, None, quantizer.constants, 0.0, 0.0, quantizer.grad_scale, None)
        distance = (wide - values).view(rows.numel(), -1) / quotient(rows, quantizer.grid.steps)
        cosine = quantizer.surrogate * torch.cos(math.pi * distance).view_as(weight)
        factor = ((1 - cosine) / (1 + cosine)).to(weight.dtype)
    # The difference is zero, so that the sum is the weight exactly.
    return weight.detach() + (weight - weight.detach()) * factor


def stored_scale(scale: Tensor, dtype: torch.dtype, grid: Grid) -> Tensor:
    """Return scales such that ``dtype`` holds what files store; the rounding is straight-through.

    That is the distance between neighbouring values, ``scale / grid.steps``, and half of it where values are odd
    multiples of the half (binary, seq). Scales are at least ``MIN_SCALE``: kernels would raise a smaller one to it,
    which ``dtype`` does not hold.
    """
    if dtype == torch.float32:
        return scale
    with torch.no_grad():
        halves = 1 if float(grid.offset).is_integer() else 2
        unit, most = halves * grid.steps, torch.finfo(dtype).max / halves
        least = smallest_number(dtype, MIN_SCALE / unit)
        rounded = quotient(scale.detach(), unit).clamp(least, most).to(dtype).to(scale.dtype) * unit
    return _straight_through(scale, rounded)


def stored_zero_point(zero_point: Tensor, grid: Grid) -> Tensor:
    """Return zero points that are codes of the grid, as those of files are; the rounding is straight-through.

    One that training drove beyond the codes becomes the nearest code. Its gradient passes, so that it can come back.
    """
    return _straight_through(zero_point, zero_point.detach().round().clamp(grid.code_min, grid.code_max))


def _straight_through(learned: Tensor, used: Tensor) -> Tensor:
    """Return ``used`` with the derivatives of ``learned``. The difference is zero, so that the sum is exact."""
    return (learned - learned.detach()) + used


def smallest_number(dtype: torch.dtype, bound: float) -> float:
    """Return the smallest number of a floating-point dtype that is at least a positive bound."""
    info = torch.finfo(dtype)
    # Below the smallest normal number, numbers are as far apart as just above it.
    apart = info.eps * 2.0 ** math.floor(math.log2(max(bound, info.smallest_normal)))
    return math.ceil(bound / apart) * apart


@contextmanager
def scales_come_later() -> Iterator[None]:
    """Do not search scales within the context: those of new layers are loaded or set next, and a search takes long.

    Layers whose configuration asks for a search begin with what :meth:`Grid.init_scale` proposes.
    """
    token = _searching.set(False)
    try:
        yield
    finally:
        _searching.reset(token)


def initial_scale(
    weight: Tensor, config: QuantConfig, moments: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Return scales that fit a weight, and zero points if the grid has them.

    Args:
        weight: ``[N, K]``, or ``[E, N, K]``.
        config: what to quantize to.
        moments: sums or means of the squares of the layer's inputs, ``[K]`` or ``[E, K]``, for ``"activation"``.
            Without them its scales are what :meth:`Grid.init_scale` proposes, and :func:`calibrate` searches.

    Raises:
        ValueError: if scales would be searched for a weight that is sharded.
    """
    grid, w = config.grid, weight
    searched = config.scale_init in SEARCHES
    if searched and _searching.get() and (config.scale_init == "mse" or moments is not None):
        if is_dtensor(weight):
            raise ValueError(
                f"the weight is sharded, so scale_init {config.scale_init!r} cannot search its scales: set them before "
                "fully_shard"
            )
        return search_scale(
            weight, grid, config.group_size, per_tensor=config.per_tensor, moments=moments,
            stored=lambda scale: stored_scale(scale, config.scale_dtype, grid),
        )  # fmt: skip
    if config.per_tensor and w.ndim > 2:  # per tensor means per expert
        w = w.flatten(1)
    per_tensor = config.per_tensor and w is weight
    method = None if searched else config.scale_init
    scale = grid.init_scale(w, config.group_size, per_tensor=per_tensor, method=method)
    zero_point = grid.init_zero_point(w, scale, config.group_size) if grid.has_zero_point else None
    # One element, not a scalar: FSDP shards along the first dimension.
    shape = scale.shape or (1,)
    return scale.float().view(shape), None if zero_point is None else zero_point.float().view(shape)


@contextmanager
def modified(layers: Iterable[tuple[Quantized, Perturbation]]) -> Iterator[None]:
    """Add something to the quantized weight of each layer in every forward within the context."""
    with ExitStack() as stack:
        for layer, perturbation in layers:
            stack.enter_context(layer.quantizer.modified(add=perturbation))
        yield


def ascent(sums: Tensor, rho: float) -> tuple[Tensor, Tensor]:
    """Return SAM's factor and the norm of its perturbation ``e = factor * T**2 * g``, ``factor = rho / norm(T * g)``.

    Args:
        sums: :func:`qatkernels.ops.perturbation_norms`, summed over all weights that are perturbed together.
        rho: radius.
    """
    once, twice = sums.sqrt().unbind()
    # A zero gradient must give no perturbation. The limit is far below the norm of any scaled loss, and its reciprocal
    # is finite in float32.
    factor = rho / once.clamp_min(1e-30)
    return factor, factor * twice
