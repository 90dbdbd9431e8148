"""What transformers has to know of layers that are tied: which tensors it must not store, or set, twice.

A model of transformers lists parameters that are tied, such as ``lm_head.weight``. Where both layers are quantized, the
scales are tied too, and once packed the codes are, in place of the weight.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from .packed_linear import Packed
from .quantized import Quantized

_LISTS = "_tied_weights_keys"


def declare_ties(model: Any) -> None:
    """List the tied tensors of a transformers model as they are now.

    Args:
        model: the model; it has a list of its own afterwards if that of its class does not fit.
    """
    named = getattr(type(model), _LISTS, None)
    if not isinstance(named, dict):
        return
    ties: dict[str, str] = {}
    for target, source in named.items():
        ties |= dict(_tied_now(model, target, source))
    if ties != named:
        vars(model)[_LISTS] = ties
    elif _LISTS not in vars(model):
        return
    else:
        del vars(model)[_LISTS]
    # Loading takes these for Parameters. What tied packed layers share is one module, so that there is nothing to tie.
    parameters = dict(model.named_parameters(remove_duplicate=False))
    expanded = model.get_expanded_tied_weights_keys(all_submodels=True)
    model.all_tied_weights_keys = {target: source for target, source in expanded.items() if target in parameters}


def forget_ties(model: Any) -> None:
    """Give a model whose layers are plain again the list of its class."""
    if vars(model).pop(_LISTS, None) is not None:
        model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)


def _tied_now(model: nn.Module, target: str, source: str) -> Iterator[tuple[str, str]]:
    """Yield the pairs of tensors that are tied where transformers ties a parameter to another one."""
    layers = [_layer_of(model, name) for name in (target, source)]
    if any(isinstance(layer, Packed) for layer in layers):
        if layers[0] is not None and layers[1] is not None and layers[0].weight is layers[1].weight:
            names = [name for name, buffer in layers[0].weight.named_buffers() if buffer is not None]
            yield from ((f"{target}.{name}", f"{source}.{name}") for name in names)
        return
    yield target, source
    if all(isinstance(layer, Quantized) for layer in layers):
        for name in ("scale", "zero_point"):
            value = getattr(layers[0], name)
            if value is not None and value is getattr(layers[1], name):
                ends = [key.removesuffix("weight") + name for key in (target, source)]
                yield ends[0], ends[1]


def _layer_of(model: nn.Module, weight: str) -> Any:
    """Return the layer that has a weight of this name, or None if the name is a pattern or that of something else."""
    if not weight.endswith(".weight"):
        return None
    try:
        return model.get_submodule(weight.removesuffix(".weight"))
    except AttributeError:
        return None


def tie_parameters(model: Any) -> None:
    """Tie the parameters of a transformers model that is about to be loaded, which transformers does after loading.

    Layers that are tied are quantized together, so ties have to be there first.
    """
    for target, source in model.all_tied_weights_keys.items():
        owner, _, name = target.rpartition(".")
        setattr(model.get_submodule(owner), name, model.get_parameter_or_buffer(source))


def groups_that_share(model: nn.Module) -> list[list[Any]]:
    """Return the quantized layers that share scales, and the packed ones that share a weight, in groups."""
    groups: dict[int, list[Any]] = {}
    for module in model.modules():
        if isinstance(module, Quantized | Packed):
            groups.setdefault(id(module.weight if isinstance(module, Packed) else module.scale), []).append(module)
    return [group for group in groups.values() if len(group) > 1]


def part(group: list[Any]) -> None:
    """Give each layer of a group a packed weight of its own, so that setting the tensors of one leaves the others."""
    for layer in group[1:]:
        if isinstance(layer, Packed):
            layer._modules["weight"] = layer.weight.to(layer.weight.device)


def join(group: list[Any]) -> None:
    """Let the layers of a group share what the first one has; one whose weight files have apart keeps its scales."""
    for layer in group[1:]:
        if isinstance(layer, Packed):
            layer._modules["weight"] = group[0].weight
        elif layer.weight is group[0].weight:
            layer.scale, layer.zero_point = group[0].scale, group[0].zero_point
