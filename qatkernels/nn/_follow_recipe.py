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
    for group in _checked(recipe):
        for name in group["layers"]:
            if (layer := find(model, name)) is None:
                raise ValueError(f"the model has no layer {name!r}, which the recipe says is quantized")
            configs[layer] = QuantConfig.from_dict(group["config"])
        if group["packed"] is not None:
            packed.setdefault(group["packed"], []).extend(group["layers"])
    quantize_layers(model, configs)
    for scale_dtype, names in packed.items():
        pack_layers(model, [model.get_submodule(name) for name in names], getattr(torch, scale_dtype))
    return model


def _checked(recipe: Any) -> Iterable[Mapping[str, Any]]:
    dtypes = (None, "float32", "bfloat16", "float16")
    for group in recipe if isinstance(recipe, list) else [recipe]:
        whole = isinstance(group, Mapping) and group.keys() == {"config", "packed", "layers"}
        if not whole or not isinstance(group["layers"], list) or group["packed"] not in dtypes:
            raise ValueError(f"a group of the recipe is {group!r:.200}, must have a config, packed and layers")
        yield group
