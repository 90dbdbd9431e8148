"""What a phase trains: its model, its optimizer, and what is written about them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import files
from ..nn import quantize_model, quantized_modules
from ..nn._param_groups import grouped
from ..nn.activation import scales_of
from . import models
from .config import TrainConfig
from .phases import Phase


def build_model(config: TrainConfig, phase: Phase, seed: int) -> nn.Module:
    """Return the initial model for the first phase, and for the others that of the phase they start from, quantized.

    Raises:
        CheckpointError: if the weights that it starts from cannot be read, or are of another model.
    """
    torch.manual_seed(seed)
    model = models.build(config.described)
    if phase.start is not None:
        start = Path(config.out) / phase.start / "model.safetensors"
        models.fill(model, files.load(start)[0], str(start))
    elif (weights := models.initial_weights(config.model)) is not None:
        models.fill(model, weights, config.model)
    if phase.quantization is not None:
        model = quantize_model(model, phase.quantization, exclude=models.excluded(model))
    return model.to(config.device)


def build_optimizer(model: nn.Module, config: TrainConfig, phase: Phase) -> torch.optim.Optimizer:
    """Return AdamW over the groups of :func:`qatkernels.param_groups`; each keeps its peak learning rate as "peak"."""
    groups = grouped(model, phase.lr, phase.weight_decay, [(config.training.scale_lr, scales_of(model))])
    for group in groups:
        group["peak"] = group["lr"]
    return torch.optim.AdamW(groups, betas=(config.training.beta1, config.training.beta2), fused=True)


def described(config: TrainConfig, phase: Phase, model: nn.Module, result: dict[str, Any]) -> dict[str, Any]:
    """Return what is written beside a model."""
    return {
        "phase": phase.name,
        "model": config.described,
        "quantization": phase.quantization and phase.quantization.to_dict(),
        "exclude": list(models.excluded(model)),
        "result": result,
    }


def sizes(model: nn.Module) -> dict[str, int]:
    """Count parameters, and bytes once packed: codes at the grid's storage width, everything else in float32."""
    layers = quantized_modules(model).values()
    weights = sum(layer.weight.numel() for layer in layers)
    scales = sum(layer.scale.numel() for layer in layers)
    packed = 4 * scales + sum(-(-layer.weight.numel() * layer.grid.storage_bits // 8) for layer in layers)
    total = sum(parameter.numel() for parameter in model.parameters())
    ours = set(scales_of(model))
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters() if parameter not in ours),
        "quantized_parameters": weights,
        "quantized_bytes": packed,
        "model_bytes": packed + 4 * (total - weights - scales),
    }
