"""Builds the model and the optimizer of a phase, and the header of the files that a model is saved in."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import files
from ..methods.bfloat16_weights import Bfloat16Weights
from ..nn import param_groups_from_rates, quantize_model, quantized_modules
from ..nn.activation import scales_of
from . import models
from .config import TrainConfig
from .phases import Phase


def build_model(config: TrainConfig, phase: Phase, seed: int) -> nn.Module:
    """Return the model that a phase starts with.

    The first phase starts with the initial model. Every other phase starts with the weights of the phase that
    ``phase.start`` names, quantized if the phase is.

    Args:
        config: the resolved configuration.
        phase: the phase to train.
        seed: seed of new weights.

    Raises:
        CheckpointError: if the initial weights cannot be read, or belong to another model.
    """
    torch.manual_seed(seed)
    model = models.build(config.described)
    if phase.start is not None:
        start = Path(config.out) / phase.start / "model.safetensors"
        models.fill(model, files.load(start)[0], str(start))
    elif (weights := models.initial_weights(config.model)) is not None:
        models.fill(model, weights, config.model)
    if phase.quantization is not None:
        exclude = models.excluded(model, phase.embeddings is not None)
        model = quantize_model(model, phase.quantization, exclude=exclude, embeddings=phase.embeddings or False)
        if config.weights != "float32":
            to_bfloat16(model)
    return model.to(config.device)


def to_bfloat16(model: nn.Module) -> None:
    """Make the parameters of a quantized model bfloat16, but for the quantizers' scales. Buffers stay as they are."""
    kept = set(scales_of(model))
    for parameter in model.parameters():
        if parameter not in kept:
            parameter.data = parameter.data.bfloat16()


def build_teacher(config: TrainConfig, phase: Phase) -> nn.Module | None:
    """Return the model that a quantized phase learns from: its initial weights in full precision; None without one."""
    if phase.quantization is None or config.distillation.distill == 0:
        return None
    return build_model(config, replace(phase, quantization=None), seed=0).eval().requires_grad_(False)


def build_optimizer(model: nn.Module, config: TrainConfig, phase: Phase) -> torch.optim.Optimizer:
    """Return AdamW over the groups of :func:`qatkernels.param_groups`.

    Each group has its peak learning rate as ``"peak"``: the schedule multiplies it at every step.
    """
    groups = param_groups_from_rates(
        model, phase.lr, phase.weight_decay, [(config.training.scale_lr, scales_of(model))]
    )
    for group in groups:
        group["peak"] = group["lr"]
    optimizer = torch.optim.AdamW(groups, betas=(config.training.beta1, config.training.beta2), fused=True)
    if phase.quantization is not None and config.weights != "float32":
        rounding: Any = "nearest" if config.weights == "bfloat16" else "stochastic"
        Bfloat16Weights(optimizer, rounding=rounding, seed=config.seed)
    return optimizer


def model_header(config: TrainConfig, phase: Phase, model: nn.Module, result: dict[str, Any]) -> dict[str, Any]:
    """Return the header of a model's file: what it was built from, how it is quantized, and its result."""
    return {
        "phase": phase.name,
        "model": config.described,
        "quantization": phase.quantization and phase.quantization.to_dict(),
        "exclude": list(models.excluded(model, phase.embeddings is not None)),
        "embeddings": phase.embeddings and phase.embeddings.to_dict(),
        "result": result,
    }


def sizes(model: nn.Module) -> dict[str, int]:
    """Count the parameters of a model, and the bytes that it takes once packed.

    Codes count at the storage width of their grid, everything else as float32.
    """
    layers = {layer.weight: layer for layer in quantized_modules(model).values()}.values()  # each weight once
    weights = sum(layer.weight.numel() for layer in layers)
    scales = sum(layer.scale.numel() for layer in layers)
    packed = 4 * scales + sum(-(-layer.weight.numel() * layer.grid.storage_bits // 8) for layer in layers)
    total = sum(parameter.numel() for parameter in model.parameters())
    quantizer_scales = set(scales_of(model))
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters() if parameter not in quantizer_scales),
        "quantized_parameters": weights,
        "quantized_bytes": packed,
        "model_bytes": packed + 4 * (total - weights - scales),
    }
