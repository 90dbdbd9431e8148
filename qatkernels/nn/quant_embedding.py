"""An embedding whose rows are fake-quantized when they are looked up."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..dtensor import is_dtensor, on_every_process
from .config import QuantConfig, without_inputs
from .quant_linear import qualified_name, why_not
from .quantized import Quantized
from .scaled_embedding import Multiplier

#: Bits that embeddings get at least where nothing else is said. A row is looked up as it is: no sum averages its error.
LEAST_BITS = 4
_CLASS = "torch.nn.modules.sparse.Embedding"


class QuantEmbedding(Quantized, nn.Embedding):
    """``y[t] = Q(weight; scale)[input[t]]``, trained straight through.

    A forward looks up the rows of its tokens, and their scales, and quantizes these alone. Its output equals the same
    rows of the whole fake-quantized weight bit for bit. Where a forward adds something to the whole weight (WinQ's
    noise, SQuAT's perturbation), the whole weight is quantized, so that a token that occurs twice gets the same row
    twice. As with ``nn.Embedding``, the output has the weight's dtype under autocast too.

    An output layer that is tied to the embedding shares weight, scales and configuration with it
    (:func:`quantize_model` sees to that), and so multiplies by the rows that this layer returns.

    Args:
        num_embeddings: rows N.
        embedding_dim: length of a row, K.
        padding_idx: the row that gets no gradient, neither for its weights nor for its scales; None for none.
        config: what to quantize to. It must not quantize activations, since the input is row numbers.
        device: device of the parameters.
        dtype: dtype of the weight.

    Attributes:
        weight: master weight ``[N, K]``.
        scale: float32 step sizes, ``[N]``, ``[N, K / group_size]``, or ``[1]`` per tensor.
        zero_point: the same for affine grids, else None.
        quantizer: how the weight is quantized now, as in :class:`QuantLinear`.
        multiplier: what rows are multiplied by after they are quantized (Gemma); None for nothing. A head that is tied
            to the embedding does not multiply.

    Raises:
        ValueError: if ``config.group_size`` does not divide ``embedding_dim``, or ``config`` has ``act_bits``,
            ``out_bits`` or ``scale_init="activation"``.
    """

    multiplier: Multiplier | None = None
    embed_scale: float

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        *,
        config: QuantConfig,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        nn.Embedding.__init__(self, num_embeddings, embedding_dim, padding_idx, device=device, dtype=dtype)
        self.out_features, self.in_features = num_embeddings, embedding_dim
        self._quantize(config)

    @classmethod
    def from_embedding(cls, embedding: nn.Embedding, config: QuantConfig) -> QuantEmbedding:
        """Return the quantized form of an embedding.

        The weight is the same Parameter object, so ties, ``requires_grad``, device and dtype stay. Hooks and other
        attributes come along. A frozen weight gets frozen scales.

        Args:
            embedding: an ``nn.Embedding``, or one of transformers that multiplies the rows that it looks up
                (``Gemma3TextScaledWordEmbedding``); other subclasses may compute something else and are refused.
            config: what to quantize to.

        Raises:
            ValueError: if ``embedding`` is more than a plain ``nn.Embedding``, has ``max_norm``, ``sparse`` or
                ``scale_grad_by_freq``, or ``config`` does not fit.
        """
        multiplier = Multiplier.of(embedding)
        classes = {_CLASS} if multiplier is None else {qualified_name(type(embedding))}
        if problem := unlike_embedding(embedding) or why_not(embedding, classes) or _unusual(embedding):
            raise ValueError(f"embedding {problem}")
        new = cls._adopt(embedding, config)
        if multiplier is not None:
            new.multiplier = multiplier
            new._buffers.pop("embed_scale", None)  # loading leaves it undefined in a class that transformers lacks
            new.embed_scale = multiplier.factor
        return new

    def _configure(self, config: QuantConfig, trains: bool) -> None:
        if isinstance(config, QuantConfig):
            check_config(config)
        super()._configure(config, trains)

    def reset_parameters(self) -> None:
        """Draw a new weight as nn.Embedding does, and set the scales from it."""
        super().reset_parameters()
        if "scale" in self._parameters:  # nn.Embedding.__init__ calls this before there is a scale
            self.reset_scale()

    def forward(self, input: Tensor) -> Tensor:
        """Return rows ``[..., K]`` for row numbers ``[...]``, int32 or int64."""
        quantizer = self.quantizer
        if quantizer.bypassed or not quantizer.unmodified or any(quantizer.noise(self.training)):
            return self._multiplied(self._rows(input, self._forward_weight(None)))
        self.check_scale()
        if len(self.scale) not in (1, self.num_embeddings):
            raise RuntimeError(f"the embedding cannot look up rows: {self.misfit()}")
        scale, zero_point = (
            # One number for each row, also where the tensor has a single one: the row of padding_idx adds no gradient.
            None if t is None else self._rows(input, t.view(len(t), -1).expand(self.num_embeddings, -1))
            for t in self._scales_for(self.weight)
        )
        assert scale is not None
        return self._multiplied(quantizer.plain(self._rows(input, self.weight), scale, zero_point))

    def _multiplied(self, rows: Tensor) -> Tensor:
        return rows if self.multiplier is None else self.multiplier.times(rows)

    def _rows(self, input: Tensor, table: Tensor) -> Tensor:
        rows = F.embedding(input, table, self.padding_idx)
        return on_every_process(rows) if is_dtensor(rows) else rows

    def extra_repr(self) -> str:
        """Describe the layer and its quantization."""
        return f"{super().extra_repr()}, {self.described}"


def check_config(config: QuantConfig) -> None:
    """Raise ValueError if a configuration is not one for embeddings."""
    if config.act_bits is not None:
        raise ValueError(
            f"act_bits is {config.act_bits}, must be None for an embedding, whose input is row numbers (an output "
            "layer that is tied to it has the same configuration)"
        )
    if config.out_bits is not None:
        raise ValueError(
            f"out_bits is {config.out_bits}, must be None for an embedding, whose output is rows of quantized numbers "
            "already (an output layer that is tied to it has the same configuration)"
        )
    if config.scale_init == "activation":
        raise ValueError(
            "scale_init is 'activation', which an embedding does not have, as its input is row numbers: give 'mse'"
        )


def for_embeddings(config: QuantConfig) -> QuantConfig:
    """Return the configuration that embeddings get beside layers of this one: at least 4 bits, activations as they are.

    The scheme becomes ``"paretoq"`` where it has no such width (binary and ternary).
    """
    return replace(
        without_inputs(config),
        bits=max(LEAST_BITS, config.bits),
        scheme="paretoq" if config.scheme in ("binary", "ternary") else config.scheme,
        act_bits=None,
        act_scheme="dynamic",
        act_signed=True,
        out_bits=None,
    )


def unlike_embedding(layer: nn.Module) -> str | None:
    """Return that a layer is of another class, as the rest of a sentence, or None if it is not."""
    if nn.utils.parametrize.is_parametrized(layer) or (found := qualified_name(type(layer))) == _CLASS:
        return None
    if Multiplier.of(layer) is not None:
        return None
    return f"is a {found}, must be exactly torch.nn.Embedding, as a subclass may compute something else"


def _unusual(layer: nn.Embedding) -> str | None:
    """Return which setting of an embedding cannot be kept, and why, or None."""
    if layer.max_norm is not None:
        return f"has max_norm={layer.max_norm}, which changes rows in place in the forward and leaves scales behind"
    if layer.sparse:
        return "has sparse=True, but gradients pass through the quantizer as dense tensors: give sparse=False"
    if layer.scale_grad_by_freq:
        return (
            "has scale_grad_by_freq=True, which divides gradients by how often a row occurs, and is not defined for "
            "scales that several rows may share: give scale_grad_by_freq=False"
        )
    return None
