"""Find layers that were quantized and that something has replaced by a plain layer since.

``resize_token_embeddings`` of transformers does that to a quantized head. The new layer computes in full precision and
looks like any other, so :func:`quantize_model` records in the model which names it quantized.
"""

from __future__ import annotations

from torch import nn

from .quantized import Quantized
from .selection import is_candidate

#: The attribute of a model that holds the names, relative to it; a copy of the model has it too.
_NAMES = "_quantized_names"


def remember(model: nn.Module) -> None:
    """Record the names of the layers that are quantized now."""
    names = {name for name, module in model.named_modules() if isinstance(module, Quantized) and name}
    model.__dict__[_NAMES] = model.__dict__.get(_NAMES, frozenset()) | names


def forget(model: nn.Module) -> None:
    """Forget which layers were quantized, as those of a model that is made plain on purpose."""
    for module in model.modules():
        module.__dict__.pop(_NAMES, None)


def replaced_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return the layers that replaced a quantized one and are not quantized, by name.

    A layer that an adapter wraps, or that was packed, is still there and is not among them.
    """
    found: dict[str, nn.Module] = {}
    for prefix, owner in model.named_modules():
        for name in sorted(owner.__dict__.get(_NAMES, ())):
            try:
                module = owner.get_submodule(name)
            except AttributeError:
                continue
            if is_candidate(module) and not isinstance(module, Quantized):
                found[f"{prefix}.{name}" if prefix else name] = module
    return found


def message(name: str, layer: nn.Module) -> str:
    """Return a message that a layer was replaced, and what to do about it."""
    how = "embeddings=True" if isinstance(layer, nn.Embedding) else f"include={name!r}, exclude=()"
    return (
        f"{name} was quantized, and something replaced it by a {type(layer).__name__} in full precision "
        f"(resize_token_embeddings does). To quantize it again: "
        f"quantize_model(model, config, {how})"
    )
