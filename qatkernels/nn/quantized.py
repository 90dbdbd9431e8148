"""What every layer with a fake-quantized weight is made of, whatever it multiplies with."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..grid import Grid
from ..ops import fake_quantize, quantize
from .activation import DynamicActivation, Float32Scales, LearnedActivation
from .config import QuantConfig
from .perturbation import Perturbation


class Quantized(Float32Scales):
    """A module with a weight ``[..., N, K]``, its scales, and a quantizer of the input.

    Attributes are those that :class:`QuantLinear` describes.
    """

    weight: Tensor
    scale: nn.Parameter
    zero_point: nn.Parameter | None
    act: DynamicActivation | LearnedActivation | None
    config: QuantConfig
    grid: Grid
    group_size: int | None
    in_features: int
    out_features: int

    def _quantize(self, config: QuantConfig) -> None:
        if not isinstance(config, QuantConfig):
            raise ValueError(f"config is {config!r}, must be a QuantConfig")
        self.config, self.grid, self.group_size = config, config.grid, config.group_size
        self.noise_std = self.scale_noise_std = 0.0
        self.perturbation: Perturbation | None = None
        self._grad_scale = self.grid.grad_scale(self.weight.shape[-2:].numel())  # of one expert, in a stack
        for name, initial in zip(("scale", "zero_point"), self._initial_scale(), strict=True):
            trains = self.weight.requires_grad
            self.register_parameter(name, None if initial is None else nn.Parameter(initial, requires_grad=trains))
        self.act = None
        if (act_grid := config.act_grid) is not None:
            offset, device = config.act_scheme == "lsq+", self.weight.device
            self.act = LearnedActivation(self.in_features, act_grid, offset=offset, device=device).train(self.training)
        elif config.act_bits is not None:
            self.act = DynamicActivation(config.act_bits).train(self.training)

    def _initial_scale(self) -> tuple[Tensor, Tensor | None]:
        """Return scales, and zero points if the grid has them, from the weight."""
        config, grid = self.config, self.grid
        w: Tensor = self.weight
        if config.per_tensor and w.ndim > 2:  # each expert is a tensor of its own
            w = w.flatten(1)
        per_tensor = config.per_tensor and w is self.weight
        scale = grid.init_scale(w, config.group_size, per_tensor=per_tensor, method=config.scale_init)
        zero_point = grid.init_zero_point(w, scale, config.group_size) if grid.has_zero_point else None
        # One element, not a scalar: FSDP shards along the first dimension.
        shape = scale.shape or (1,)
        return scale.float().view(shape), None if zero_point is None else zero_point.float().view(shape)

    @torch.no_grad()
    def reset_scale(self) -> None:
        """Set scales and zero points to what they would be for a layer just made from the present weight."""
        scale, zero_point = self._initial_scale()
        self.scale.copy_(scale)
        if self.zero_point is not None and zero_point is not None:
            self.zero_point.copy_(zero_point)

    def _fake_quantized(self, dtype: torch.dtype | None, noise_std: float = 0, scale_noise_std: float = 0) -> Tensor:
        return fake_quantize(
            self.weight,
            self.scale,
            self.grid,
            group_size=self.group_size,
            zero_point=self.zero_point,
            noise_std=noise_std,
            scale_noise_std=scale_noise_std,
            grad_scale=self._grad_scale,
            dtype=dtype,
        )

    def quantized_weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return the weight ``[..., N, K]`` that an eval forward uses: no noise, differentiable.

        Args:
            dtype: bfloat16 or float16 for a float32 weight; the weight's dtype if None.
        """
        return self._fake_quantized(dtype)

    @torch.no_grad()
    def codes(self) -> Tensor:
        """Return the integer codes of the weight, ``[..., N, K]``, int8 (uint8 for 8-bit affine)."""
        return quantize(self.weight, self.scale, self.grid, group_size=self.group_size, zero_point=self.zero_point)

    @property
    def described(self) -> str:
        """The quantization of the weight in words."""
        text = f"bits={self.grid.bits}, scheme={self.grid.scheme}"
        if self.config.per_tensor:
            return f"{text}, per_tensor=True"
        return text if self.group_size is None else f"{text}, group_size={self.group_size}"
