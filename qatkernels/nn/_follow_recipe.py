"""Make a model with the layers that a recipe describes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from ._pack_model import pack_layers
from ._quantize_model import quantize_layers
from .config import QuantConfig
from .experts import find
from .quantizer import scales_come_later
from .recipe import Recipe
from .selection import Candidate


def follow(model: nn.Module, recipe: Recipe) -> nn.Module:
    """Quantize and pack the layers of a model as another one's were, in place.

    Tensors get their shapes; their values are for a state dict to fill.

    Args:
        model: a model like the one that the recipe is of, not quantized; on any device, meta included.
        recipe: what :func:`recipe_of` returned.

    Returns:
        ``model``.

    Raises:
        ValueError: if the recipe names a layer that the model does not have, or is no recipe.
    """
    configs: dict[Candidate, QuantConfig] = {}
    packed: dict[str, list[str]] = {}
    groups = list(_checked(recipe))
    here = _names_here(model, [name for group in groups for name in group["layers"]])
    for group in groups:
        layers = [here[name] for name in group["layers"] if name in here]
        for name in layers:
            if (layer := find(model, name)) is None:
                raise ValueError(f"the model has no layer {name!r}, which the recipe says is quantized")
            configs[layer] = QuantConfig.from_dict(group["config"])
        if group["packed"] is not None:
            packed.setdefault(group["packed"], []).extend(layers)
    with scales_come_later():
        quantize_layers(model, configs)
    for scale_dtype, names in packed.items():
        pack_layers(model, [model.get_submodule(name) for name in names], getattr(torch, scale_dtype))
    return model


def _names_here(model: nn.Module, names: list[str]) -> dict[str, str]:
    """Return the names of a recipe's layers in a model, by their names in the recipe.

    In transformers ``model.layers.0`` of a LlamaForCausalLM is ``layers.0`` of its LlamaModel, and either class loads
    what the other one saved. A recipe is of either one, too: of what ``quantize_model`` was given.
    """
    prefix = f"{getattr(model, 'base_model_prefix', '')}."

    def has(wanted: Iterable[str]) -> bool:
        return all(find(model, name) is not None for name in wanted)

    if len(prefix) == 1 or has(names):
        return {name: name for name in names}
    if has(prefix + name for name in names):
        return {name: prefix + name for name in names}
    inner = {name: name.removeprefix(prefix) for name in names if name.startswith(prefix)}
    if inner and has(inner.values()):  # a head, which this model does not have, is left out
        return inner
    return {name: name for name in names}


def _checked(recipe: Any) -> Iterable[Mapping[str, Any]]:
    dtypes = (None, "float32", "bfloat16", "float16")
    for group in recipe if isinstance(recipe, list) else [recipe]:
        whole = isinstance(group, Mapping) and group.keys() == {"config", "packed", "layers"}
        if not whole or not isinstance(group["layers"], list) or group["packed"] not in dtypes:
            raise ValueError(f"a group of the recipe is {group!r:.200}, must have a config, packed and layers")
        yield group
