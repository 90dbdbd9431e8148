"""Distillation: the quantized model also learns the outputs of a teacher, such as the same model in full precision."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..options import POSITIVE, SHARE, check, option


@dataclass(frozen=True)
class DistillationConfig:
    """Settings of distillation from the model in full precision.

    Raises:
        ConfigError: if a value is out of range.
    """

    distill: float = option(
        0.0, "weight, in [0, 1], of learning the outputs of the model in full precision; the text has the rest", SHARE
    )
    temperature: float = option(1.0, "divides the outputs that --distill compares, before the softmax", POSITIVE)

    def __post_init__(self) -> None:
        check(self)


def distillation_loss(logits: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """Return the mean KL divergence of a model's predictions from a teacher's (Hinton et al., 2015), in nats.

    ``T**2 * KL(softmax(teacher / T) || softmax(logits / T))``; the factor ``T**2`` keeps the size of the gradient.

        with torch.no_grad():
            target = teacher(tokens).logits
        loss = distillation_loss(model(tokens).logits, target)

    Args:
        logits: of the model, ``[..., classes]``; computed in float32.
        teacher: logits of the same shape; no gradient flows to them.
        temperature: T.

    Returns:
        A float32 scalar, differentiable in ``logits``; 0 if there are no predictions.

    Raises:
        ValueError: if the shapes differ, or the temperature is not positive.
    """
    if logits.shape != teacher.shape:
        raise ValueError(f"teacher has shape {tuple(teacher.shape)}, must be {tuple(logits.shape)} like logits")
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}, must be positive")
    classes = logits.shape[-1]
    ours = F.log_softmax(logits.float().reshape(-1, classes) / temperature, -1)
    with torch.no_grad():
        theirs = F.log_softmax(teacher.float().reshape(-1, classes) / temperature, -1)
    return F.kl_div(ours, theirs, reduction="sum", log_target=True) / max(len(ours), 1) * temperature**2
