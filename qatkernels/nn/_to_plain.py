"""Turn a quantized or packed model into a plain one of the same values, in place."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import nn

from .activation import quantized_ends
from .experts import placed_in, take_out
from .packed_linear import Packed, PackedEmbedding, PackedLinear
from .quant_embedding import QuantEmbedding
from .quant_linear import QuantLinear
from .quantized import OFFLOADED, Quantized, is_offloaded
from .replaced import forget
from .scaled_embedding import plain_embedding
from .ties import forget_ties


@torch.no_grad()
def to_plain(model: nn.Module) -> nn.Module:
    """Replace every quantized or packed layer of a model, in place, by a plain one of the values that it multiplies by.

    The result needs nothing of this library: ``nn.Linear``, ``nn.Embedding``, transformers' ``Conv1D``, and Parameters
    with the stacked experts of transformers' mixtures. A transformers model forgets that it was quantized, so
    ``save_pretrained`` writes what any other program reads. Values keep the dtype of the weights. A forward gives the
    logits of the quantized model in eval mode up to the order of sums (docs/packing.md).

    Layers that shared their weight and scales share the plain weight, and layers that were one object stay one. A layer
    that shared its weight with something in full precision, such as a quantized head tied to an embedding, gets a
    weight of its own; a transformers model then has ``tie_word_embeddings`` set to False. Hooks do not come along.

    Args:
        model: a model with quantized or packed layers, in full on its devices; changed in place.

    Returns:
        ``model``, or the new layer if the model itself is a quantized layer.

    Raises:
        ValueError: if no layer is quantized or packed; or if one quantizes its input or output, is offloaded, or is a
            stack of experts that the model's own code calls, for which there is no plain layer. The model is then
            unchanged.
    """
    stacks = placed_in(model)
    names: dict[nn.Module, str] = {}
    for name, module in model.named_modules():
        if isinstance(module, Quantized | Packed):
            names.setdefault(module, name)
    if not names:
        raise ValueError("the model has no quantized and no packed layer")
    for layer, name in names.items():
        if problem := _problem(layer, layer in stacks.values()):
            raise ValueError(f"{name or 'the model'} cannot be made plain: {problem}")
    values = _Values()
    untied = _shared_with_others(model, names)
    for name, layer in stacks.items():
        take_out(model, name, values.of(layer), layer.bias)
    new = {layer: _plain(layer, values) for layer in names if layer not in stacks.values()}
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child in new:
                parent._modules[name] = new[child]
    _forget_quantization(model, untied)
    return new.get(model, model)


class _Values:
    """The plain weight of each quantized one; layers that share their weight and scales get the same Parameter."""

    def __init__(self) -> None:
        self._made: dict[tuple[int, ...], tuple[nn.Parameter, object]] = {}

    def of(self, layer: Any) -> nn.Parameter:
        """Return the weight ``[..., N, K]`` that a layer multiplies by."""
        parts = (layer.weight,) if isinstance(layer, Packed) else (layer.weight, layer.scale, layer.zero_point)
        key = tuple(map(id, parts))
        if key not in self._made:
            packed = isinstance(layer, Packed)
            value = layer.weight.dequantize(layer.weight.dtype) if packed else layer.quantized_weight().detach()
            trains = not packed and layer.weight.requires_grad
            self._made[key] = nn.Parameter(value, requires_grad=trains), parts  # keeps the ids unique
        return self._made[key][0]

    def transposed(self, weight: nn.Parameter) -> nn.Parameter:
        """Return such a weight as ``[K, N]``."""
        key = (id(weight),)
        if key not in self._made:
            turned = weight.detach().t().contiguous()
            self._made[key] = nn.Parameter(turned, requires_grad=weight.requires_grad), weight
        return self._made[key][0]


def _problem(layer: Any, is_expert: bool) -> str | None:
    """Return why a layer cannot be made plain, or None."""
    if ends := quantized_ends(layer):
        return f"it quantizes its {' and its '.join(ends)}, which no plain layer does"
    if isinstance(layer, Quantized) and is_offloaded(layer):
        return OFFLOADED.format("make it plain")
    if not is_expert and not isinstance(layer, QuantLinear | PackedLinear | QuantEmbedding | PackedEmbedding):
        return f"it is a {type(layer).__name__} that the model's own code calls with offsets, as no plain layer is"
    return None


def _plain(layer: Any, values: _Values) -> nn.Module:
    """Return a plain layer with the values and the bias of a quantized or packed one."""
    weight = values.of(layer)
    if isinstance(layer, nn.Embedding):
        return plain_embedding(layer, weight)
    new = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
    if getattr(layer, "of_conv1d", False):
        conv1d = importlib.import_module("transformers.pytorch_utils").Conv1D
        with torch.device("meta"):
            new = conv1d(layer.out_features, layer.in_features)
        weight = values.transposed(weight)
    new.weight = weight
    new.bias = layer.bias
    return new.train(layer.training)


def _shared_with_others(model: nn.Module, layers: dict[nn.Module, str]) -> bool:
    """Whether a quantized layer shares its weight with a module that is not quantized."""
    quantized = {id(layer._parameters["weight"]) for layer in layers if "weight" in layer._parameters}
    others = (m for m in model.modules() if m not in layers)
    return any(id(p) in quantized for m in others for p in m._parameters.values() if p is not None)


def _forget_quantization(model: nn.Module, untied: bool) -> None:
    forget(model)
    for module in model.modules():
        config: Any = getattr(module, "config", None)
        if not (hasattr(config, "to_diff_dict") and hasattr(module, "save_pretrained")):
            continue
        for holder, name in (
            (config, "quantization_config"), (config, "_is_quantized"), (module, "hf_quantizer"),
            (module, "quantization_method"), (module, "is_quantized"), (module, "_weight_conversions"),
        ):  # fmt: skip
            vars(holder).pop(name, None)
        if untied:
            config.tie_word_embeddings = False
        forget_ties(module)
