"""Linear layers that multiply with packed codes. `pack_model` makes them of quantized layers after training."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..arguments import wrong_type
from ..dtensor import whole
from ..grids import Grid
from ..ops import PackedWeight
from .activation import DynamicActivation
from .grouped_quant_linear import add_bias
from .scaled_embedding import Multiplier

#: Where nn.Module keeps the hooks of a forward and of its backward.
_HOOKS = frozenset(n for n in vars(nn.Module()) if "hook" in n and "state_dict" not in n)


def packed_weight(layer: Any, scale_dtype: torch.dtype = torch.float32) -> PackedWeight:
    """Pack the weight of a layer that has ``weight``, ``scale``, ``zero_point``, ``grid`` and ``group_size``.

    What is sharded is gathered, and all processes must call this then.

    A ``quantizer``, if the layer has one, says which scale and zero point its forward uses.

    Raises:
        ValueError: if a scale is not finite, or ``scale_dtype`` cannot hold it.
    """
    quantizer = getattr(layer, "quantizer", None)
    with torch.no_grad():
        weight, scale = whole(layer.weight), whole(layer.scale)
        zero_point = None if layer.zero_point is None else whole(layer.zero_point)
        if quantizer is not None:
            scale, zero_point = quantizer.stored(scale, zero_point)
    return PackedWeight.from_float(
        weight, scale, layer.grid, layer.group_size, zero_point=zero_point, scale_dtype=scale_dtype
    )


class Packed(nn.Module):
    """Base class of layers with a packed weight.

    Args:
        weight: packed weight, its last dimensions ``[N, K]``. Layers that are given the same one share it.
        bias: ``[..., N]`` or None; a Parameter stays the same object.
        act: module applied to the input first, such as a :class:`LearnedActivation`.
        act_bits: 2 to 8 quantizes the input to symmetric integers per token and sums integers; None does neither.
        out_act: module applied to the output, after the bias; None for none.

    Attributes:
        weight: the packed weight.
        in_features: K.
        out_features: N.
        act, out_act: as given.

    Raises:
        TypeError: if ``weight`` is not a packed weight.
        ValueError: if a shape does not fit, or ``act_bits`` is out of range.
    """

    #: Name of this kind of layer in a file.
    kind: ClassVar[str]
    #: Dimensions of the weight.
    dims: ClassVar[int]

    weight: PackedWeight
    bias: Tensor | None

    def __init__(
        self,
        weight: PackedWeight,
        bias: Tensor | None = None,
        *,
        act: nn.Module | None = None,
        act_bits: int | None = None,
        out_act: nn.Module | None = None,
    ) -> None:
        nn.Module.__init__(self)  # not nn.Linear's, which would allocate a weight
        if not isinstance(weight, PackedWeight):
            raise wrong_type("weight", weight, "a PackedWeight, which PackedWeight.from_float makes")
        shape = weight.shape
        if len(shape) != self.dims:
            raise ValueError(f"weight has shape {tuple(shape)}, must have {self.dims} dimensions")
        if bias is not None and bias.shape != shape[:-1]:
            raise ValueError(f"bias has shape {tuple(bias.shape)}, must be {tuple(shape[:-1])}")
        if act_bits is not None and not 2 <= act_bits <= 8:
            raise ValueError(f"act_bits is {act_bits}, must be None or 2 to 8")
        self.weight = weight
        self.out_features, self.in_features = shape[-2:]
        if isinstance(bias, nn.Parameter) or bias is None:
            self.register_parameter("bias", bias)
        else:
            self.register_buffer("bias", bias)
        self.act, self.act_bits, self.out_act = act, act_bits, out_act

    @classmethod
    def from_quantized(
        cls, layer: Any, *, scale_dtype: torch.dtype = torch.float32, weight: PackedWeight | None = None
    ) -> Any:
        """Return the packed form of a trained layer.

        The bias is the same Parameter. Dynamic activations become ``act_bits``; learned quantizers of activations are
        the same modules. Forward and backward hooks come along.

        Args:
            layer: a layer with the attributes of :class:`QuantLinear`.
            scale_dtype: dtype that scales are stored in.
            weight: the packed weight of ``layer`` if there is one already, from a layer that shares it.

        Raises:
            ValueError: if the layer cannot be packed.
        """
        act: nn.Module | None = layer.act
        ends: dict[str, Any] = {"act": act}
        if isinstance(act, DynamicActivation):
            ends = {"act_bits": act.bits}
        if (out_act := getattr(layer, "out_act", None)) is not None:  # a layer of one's own may not know of it
            ends["out_act"] = out_act
        if weight is None:
            weight = packed_weight(layer, scale_dtype)
        new = cls(weight, getattr(layer, "bias", None), **ends).train(layer.training)
        if getattr(layer, "of_conv1d", False):
            vars(new)["of_conv1d"] = True
        vars(new).update({name: value for name, value in vars(layer).items() if name in _HOOKS})
        return new

    @property
    def grid(self) -> Grid:
        """Grid of the codes."""
        return self.weight.grid

    def extra_repr(self) -> str:
        """Describe the layer."""
        text = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        return text if self.act_bits is None else f"{text}, act_bits={self.act_bits}"


class PackedLinear(Packed, nn.Linear):
    """``y = x @ weight.T + bias`` from packed codes; differentiable in x and bias, for adapters over a packed base.

    Args and attributes are those of :class:`Packed`, with a weight ``[N, K]``. Codes and scales are buffers: nothing
    here trains but the bias. Results differ from :class:`QuantLinear`'s in eval mode only as docs/packing.md says.

    It is an ``nn.Linear`` for libraries that look for those, such as PEFT. What they do with the layer works; what they
    do with its weight is an error that says why.
    """

    kind = "linear"
    dims = 2
    #: Whether the layer was a transformers ``Conv1D`` before it was quantized.
    of_conv1d: bool = False

    weight: PackedWeight  # type: ignore[assignment]
    bias: Tensor | None  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        """Return the output ``[..., N]`` for an input ``[..., K]``, in its dtype, or autocast's."""
        if self.act is not None:
            x = self.act(x)
        # The attributes self.weight and self.bias would take a tenth of the time of a small layer.
        weight, parameters = self._modules["weight"], self._parameters
        bias = parameters["bias"] if "bias" in parameters else self.bias  # noqa: SIM401 (get would read both)
        y: Tensor = weight(x, bias, None, self.act_bits)  # type: ignore[misc]
        out_act = self.out_act
        return y if out_act is None else out_act(y)


class GroupedPackedLinear(Packed):
    """``y[t] = x[t] @ weight[e].T + bias[e]`` for tokens sorted by expert e, from packed codes ``[E, N, K]``.

    Args and attributes are those of :class:`Packed`, with a weight ``[E, N, K]`` and a bias ``[E, N]``.
    """

    kind = "grouped_linear"
    dims = 3

    def forward(self, x: Tensor, offsets: Tensor) -> Tensor:
        """Return the output ``[T, N]`` for tokens ``[T, K]``.

        Args:
            x: tokens, those of expert 0 first.
            offsets: int32 ``[E]``, where each expert's tokens end; tokens past the last one give 0.
        """
        if self.act is not None:
            x = self.act(x)
        y = self.weight(x, None, offsets, self.act_bits)
        if self.bias is not None:
            y = add_bias(y, self.bias, offsets)
        return y if self.out_act is None else self.out_act(y)


class PackedEmbedding(Packed, nn.Embedding):
    """``y[t] = weight[input[t]]`` from packed codes: a forward unpacks the rows of its tokens, and no others.

    Its output equals that of the :class:`QuantEmbedding` it was made of, bit for bit if scales are stored as float32.
    An output layer that was tied to the embedding shares the packed weight. Nothing here trains.

    Args:
        weight: packed weight ``[N, K]``.
        bias: None; here as the other packed layers have it.
        act: None, likewise.
        act_bits: None, likewise.
        out_act: None, likewise.

    Attributes:
        weight: the packed weight.
        num_embeddings: N.
        embedding_dim: K.
        padding_idx: that of the embedding, for libraries that look it up.
        multiplier: what rows are multiplied by, as in :class:`QuantEmbedding`.

    Raises:
        TypeError: if ``weight`` is not a packed weight.
        ValueError: if its shape does not fit, or one of the other arguments is not None.
    """

    kind = "embedding"
    dims = 2
    padding_idx: int | None = None
    multiplier: Multiplier | None = None
    max_norm, norm_type, scale_grad_by_freq, sparse = None, 2.0, False, False

    weight: PackedWeight  # type: ignore[assignment]

    def __init__(
        self,
        weight: PackedWeight,
        bias: Tensor | None = None,
        *,
        act: nn.Module | None = None,
        act_bits: int | None = None,
        out_act: nn.Module | None = None,
    ) -> None:
        for name, given in (("bias", bias), ("act", act), ("act_bits", act_bits), ("out_act", out_act)):
            if given is not None:
                raise ValueError(f"{name} is given, must be None for an embedding")
        super().__init__(weight)
        self.num_embeddings, self.embedding_dim = self.out_features, self.in_features

    @classmethod
    def from_quantized(
        cls, layer: Any, *, scale_dtype: torch.dtype = torch.float32, weight: PackedWeight | None = None
    ) -> Any:
        """Return the packed form of a :class:`QuantEmbedding`; see :meth:`Packed.from_quantized`."""
        new = super().from_quantized(layer, scale_dtype=scale_dtype, weight=weight)
        new.be_like(layer)
        return new

    def be_like(self, embedding: nn.Embedding) -> None:
        """Take over what an embedding has beside its weight."""
        self.padding_idx, self.multiplier = embedding.padding_idx, Multiplier.of(embedding)

    def forward(self, input: Tensor) -> Tensor:
        """Return rows ``[..., K]`` for row numbers ``[...]``, int32 or int64, in the weight's dtype."""
        rows: Tensor = self.weight(input, lookup=True)
        return rows if self.multiplier is None else self.multiplier.times(rows)

    def extra_repr(self) -> str:
        """Describe the layer."""
        return nn.Embedding.extra_repr(self)


#: What a file may hold, by `Packed.kind`.
KINDS: dict[str, type[Packed]] = {cls.kind: cls for cls in (PackedLinear, GroupedPackedLinear, PackedEmbedding)}
