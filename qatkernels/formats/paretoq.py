"""Checkpoints of ParetoQ's released code (Liu et al., 2025), such as those of MobileLLM-ParetoQ.

Each of their quantized layers has ``weight`` ``[N, K]`` and ``weight_clip_val`` ``[N, 1]``, which is the scale of a row
in this library: the grids of the scheme ``"paretoq"`` are those of that code (docs/algorithms.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..grids import paretoq
from ..nn import quantized_modules

CLIP = "weight_clip_val"


@torch.no_grad()
def load_paretoq(model: nn.Module, state_dict: Mapping[str, Tensor], *, strict: bool = True) -> Any:
    """Load weights and scales of a ParetoQ checkpoint into a quantized model.

        model = quantize_model(LlamaForCausalLM(config), QuantConfig(bits=2))
        load_paretoq(model, safetensors.torch.load_file("model.safetensors"))

    The checkpoint does not say its bit width, so the model must be quantized to the one that it was trained at.

    Args:
        model: a model whose layers are quantized as ParetoQ does: scheme ``"paretoq"`` (or the one that it chooses for
            the bit width), one scale for each row, activations in full precision; changed in place.
        state_dict: tensors by name, with ``<layer>.weight_clip_val`` for each quantized layer.
        strict: as in ``load_state_dict``: whether missing and unexpected names are errors.

    Returns:
        What ``load_state_dict`` returns: the missing and the unexpected keys.

    Raises:
        ValueError: if no layer is quantized, a layer is quantized otherwise, or the layers with ``weight_clip_val`` are
            not those that are quantized.
        RuntimeError: from ``load_state_dict``, if names or shapes do not fit.
    """
    layers = quantized_modules(model)
    if not layers:
        raise ValueError("the model has no quantized layer, quantize_model makes them")
    found = {name.removesuffix(f".{CLIP}") for name in state_dict if name.endswith(f".{CLIP}")}
    if wrong := sorted(found ^ set(layers)):
        has, lacks = ("the checkpoint", "the model") if wrong[0] in found else ("the model", "the checkpoint")
        raise ValueError(
            f"{has} quantizes {wrong[0]}, and {lacks} does not ({len(wrong)} such layers): quantize the model with "
            "include= and exclude= as the checkpoint was"
        )
    state = dict(state_dict)
    for name, layer in layers.items():
        config = layer.config
        if layer.grid != paretoq(config.bits) or config.per_tensor or config.group_size is not None:
            raise ValueError(
                f"{name} is quantized to {config}, must be as ParetoQ does: scheme 'paretoq', one scale for each row"
            )
        clip = state.pop(f"{name}.{CLIP}")
        if tuple(clip.shape) != (layer.weight.shape[0], 1):
            raise ValueError(
                f"{name}.{CLIP} has shape {tuple(clip.shape)}, must be {(layer.weight.shape[0], 1)}: a number for each "
                "row of the weight"
            )
        state[f"{name}.scale"] = clip.float().reshape(layer.scale.shape)
    return model.load_state_dict(state, strict=strict)
