"""Embeddings of transformers that multiply what they look up, such as Gemma's."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

_CLASS = re.compile(r"\w+ScaledWordEmbedding")
#: What their forward may name; one that names more computes something else.
_NAMES = {"super", "forward", "embed_scale", "to", "weight", "dtype"}


@dataclass(frozen=True)
class Multiplier:
    """What an embedding multiplies the rows by that it looks up.

    Attributes:
        factor: the number.
        rounded: the number in each dtype of a weight, where the embedding rounds it to that first (Gemma); None where
            it does not (BART).
        made_by: the class of the plain embedding.
    """

    factor: float
    rounded: Mapping[torch.dtype, float] | None
    made_by: type[nn.Embedding]

    @classmethod
    def of(cls, layer: Any) -> Multiplier | None:
        """Return that of an embedding, quantized, packed or plain; None if it multiplies by nothing or is unknown."""
        if isinstance(known := getattr(layer, "multiplier", None), Multiplier):
            return known
        kind = type(layer)
        ours = _CLASS.fullmatch(kind.__name__) and kind.__module__.startswith("transformers.models.")
        if not ours or not set(kind.forward.__code__.co_names) <= _NAMES:
            return None
        if not isinstance(layer.embed_scale, Tensor):
            return cls(float(layer.embed_scale), None, kind)
        # Not the buffer itself, which is on the meta device while a model is loaded.
        factor = float(layer.scalar_embed_scale)
        stored = torch.tensor(factor, dtype=torch.float32, device="cpu")
        dtypes = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
        return cls(factor, {dtype: float(stored.to(dtype)) for dtype in dtypes}, kind)

    def times(self, rows: Tensor) -> Tensor:
        """Return rows, in the weight's dtype, times the factor."""
        return rows * (self.factor if self.rounded is None else self.rounded[rows.dtype])


def plain_embedding(layer: Any, weight: nn.Parameter) -> nn.Embedding:
    """Return the plain embedding with the given weight that a quantized or packed one stands for."""
    multiplier = Multiplier.of(layer)
    made_by: Any = nn.Embedding if multiplier is None else multiplier.made_by
    with torch.device("meta"):
        table: nn.Embedding = made_by(
            *weight.shape, layer.padding_idx, *(() if multiplier is None else (multiplier.factor,))
        )
    if multiplier is not None and "embed_scale" in table._buffers:
        table._buffers["embed_scale"] = torch.tensor(multiplier.factor, device=weight.device)
    table.weight = weight
    return table.train(layer.training)
