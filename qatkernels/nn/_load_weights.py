"""Loading full-precision weights, or weights trained at other bits, into a quantized model."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..dtensor import is_dtensor
from ..float32_scales import layout_in
from .activation import ACTS, LearnedActivation, learned_acts
from .experts import as_layers
from .quantized import OFFLOADED, Quantized, is_offloaded


@torch.no_grad()
def load_weights(model: nn.Module, state_dict: dict[str, Any], *, strict: bool = True) -> Any:
    """Load the weights of a state dict into a quantized model, and set the scales from the weights.

    Use it to start from full-precision weights, or from weights that were trained at other bits. Scales and zero points
    of weights in the state dict are ignored. Scales are set in place, so an optimizer keeps its parameters, but its
    moments of the scales are stale.

    A learned activation quantizer is loaded if the state dict has one of the same bits and scheme. Otherwise the next
    training batch, or :func:`calibrate`, initializes it.

    ``model.load_state_dict`` is for weights *and* scales of the same configuration, such as a checkpoint of this model.

    Args:
        model: a model from :func:`quantize_model`; changed in place.
        state_dict: of a model of the same architecture, quantized or not.
        strict: as in ``load_state_dict``: whether missing and unexpected names are errors.

    Returns:
        What ``load_state_dict`` returns: the missing and the unexpected keys.

    Raises:
        ValueError: if no layer is quantized, or the model is sharded or offloaded.
        RuntimeError: from ``load_state_dict``, if names or shapes do not fit.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    quantized = [module for module in modules.values() if isinstance(module, Quantized)]
    if not quantized:
        raise ValueError("the model has no quantized layer, quantize_model makes them")
    if any(is_dtensor(layer.weight) for layer in quantized):
        raise ValueError("the model is sharded, so scales cannot be set anew: load the weights before fully_shard")
    if offloaded := [name for name, m in modules.items() if isinstance(m, Quantized) and is_offloaded(m)]:
        raise ValueError(f"weights of {offloaded[0] or 'the model'} cannot be loaded: {OFFLOADED.format('load')}")
    own, state = model.state_dict(), copy.copy(state_dict)  # with the metadata of torch, if it has some
    as_layers(model, state)
    forgotten: list[LearnedActivation] = []
    for name, module in modules.items():
        prefix = f"{name}.".lstrip(".")
        if isinstance(module, LearnedActivation):
            if layout_in(state, prefix) == module.layout:
                continue
            forgotten.append(module)
            _keep_own(state, own, prefix)
        elif isinstance(module, Quantized):
            _keep_own(state, own, prefix)
            absent = tuple(f"{prefix}{act}." for act in ACTS.keys() - learned_acts(module).keys())
            _drop(state, [key for key in state if key.startswith(absent)])
    found = model.load_state_dict(state, strict=strict)
    for layer in quantized:
        layer.reset_scale()
    for act in forgotten:
        act.reset_parameters()
    return found


def _keep_own(state: dict[str, Any], own: Mapping[str, Tensor], prefix: str) -> None:
    """Replace the scales of a state dict by those of the module, if it has any."""
    names = [prefix + name for name in ("scale", "zero_point", "initialized", "_extra_state")]
    _drop(state, names)
    state.update({name: own[name] for name in names if name in own})


def _drop(state: dict[str, Any], names: list[str]) -> None:
    for name in names:
        state.pop(name, None)
