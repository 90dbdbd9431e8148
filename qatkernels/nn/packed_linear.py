"""Linear layers that hold packed codes and multiply with them: what a quantized layer becomes when training is over."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..grids import Grid
from ..ops.lowbit_linear import product
from ..ops.packing import PackedWeight
from .activation import DynamicActivation, Float32Scales, autocast_dtype
from .grouped_quant_linear import bias_of_tokens

#: Where nn.Module keeps the hooks of a forward and of its backward.
_HOOKS = frozenset(n for n in vars(nn.Module()) if "hook" in n and "state_dict" not in n)


class PackedBuffers(Float32Scales):
    """A :class:`~qatkernels.PackedWeight` as buffers that no cast changes: a model moves, copies and saves it.

    Layers that share a weight share this module, which is how they go on sharing it when the model moves to another
    device: torch moves the buffers of two modules one by one, and would leave two of them.

    Bytes alone do not say what they stand for, so a state dict must have the layout of the codes, and a module loads
    nothing that has another one, or other dtypes.

    It is no tensor. A model that reads the weight of a layer itself, and does not call the layer, gets an error that
    says so.

    Args:
        weight: the packed weight.

    Attributes:
        dtype: that of the weight in full precision, which follows casts of the model as a weight's does.
        layer: name of the layer in its model, as far as it is known; for messages.
    """

    uncast: ClassVar[tuple[str, ...]] = ("packed", "scale", "zero_point")
    refusal: ClassVar[str] = "the codes of {}packed are {}, must be {}"
    layout_required: ClassVar[bool] = True

    packed: Tensor
    scale: Tensor
    zero_point: Tensor | None

    def __init__(self, weight: PackedWeight) -> None:
        super().__init__()
        self.grid, self.cols = weight.grid, weight.cols
        # Built once, not at every call.
        self.constants, self.codes = list(weight.grid.constants), (weight.grid.code_min, weight.grid.storage_bits)
        self.dtype, self.layer = torch.float32, ""
        for name in self.uncast:
            self.register_buffer(name, getattr(weight, name))

    @classmethod
    @torch.inference_mode(False)  # what is made in inference mode can never be loaded into, or have a gradient past it
    @torch.no_grad()
    def from_quantized(cls, layer: Any, scale_dtype: torch.dtype = torch.float32) -> PackedBuffers:
        """Pack the weight of a layer that has ``weight``, ``scale``, ``zero_point``, ``grid`` and ``group_size``.

        Raises:
            ValueError: if a scale is not finite, or ``scale_dtype`` cannot hold it.
        """
        packed = cls(
            PackedWeight.from_float(
                layer.weight, layer.scale, layer.grid, layer.group_size,
                zero_point=layer.zero_point, scale_dtype=scale_dtype,
            )
        )  # fmt: skip
        packed.dtype = layer.weight.dtype
        return packed

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.device)).dtype
        return super()._apply(fn, recurse)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Refuse to take part in torch's functions as if it were a tensor."""
        found = next(leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, cls))
        raise TypeError(found._refusal(f"torch's {getattr(func, '__name__', func)}"))

    def __matmul__(self, other: object) -> Any:
        """Refuse to be multiplied."""
        raise TypeError(self._refusal("the operator @"))

    __rmatmul__ = __matmul__

    def __getattr__(self, name: str) -> Any:
        """Say of what a tensor has and this has not why that is so."""
        if not name.startswith("_") and name not in self._buffers and hasattr(Tensor, name):
            raise AttributeError(self._refusal(f".{name}"))
        return super().__getattr__(name)

    def _refusal(self, what: str) -> str:
        layer = repr(self.layer) if self.layer else "this layer"
        return (
            f"the weight of {layer} is packed codes, which {what} cannot use: the model reads the weight of the layer "
            f"itself instead of calling the layer. Exclude {layer} in quantize_model, which leaves it in full "
            "precision, or give the model layer.weight.value.dequantize()"
        )

    @property
    def layout(self) -> str:
        """The layout of the codes."""
        return f"{self.grid.scheme}, {self.grid.bits} bits, {self.cols} columns"

    def _problems(self, state_dict: Any, prefix: str) -> list[str]:
        problems = super()._problems(state_dict, prefix)
        for name in self.uncast:
            mine, given = getattr(self, name), state_dict.get(prefix + name)
            if isinstance(mine, Tensor) and isinstance(given, Tensor) and given.dtype != mine.dtype:
                problems.append(f"{prefix}{name} is {given.dtype}, must be {mine.dtype}")
        return problems

    @property
    def value(self) -> PackedWeight:
        """The weight, for the ops and for exports; it shares the buffers."""
        return PackedWeight(self.packed, self.scale, self.zero_point, self.grid, self.cols)

    @property
    def shape(self) -> torch.Size:
        """Shape of the weight."""
        return torch.Size((*self.packed.shape[:-1], self.cols))

    @property
    def device(self) -> torch.device:
        """Where the codes are."""
        return self.packed.device

    def numel(self) -> int:
        """Return the number of weights."""
        return self.shape.numel()

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales and zero points."""
        return sum(t.nbytes for t in self._buffers.values() if t is not None)

    def forward(self, x: Tensor, bias: Tensor | None, offsets: Tensor | None, act_bits: int | None) -> Tensor:
        """Return ``lowbit_linear``, or ``grouped_lowbit_linear`` where there are offsets.

        A forward, so that hooks which bring the tensors of a module from elsewhere (offload) come before it.
        """
        held = self._buffers  # not as attributes: each would cost as much as the choice of a kernel
        weight = (held["packed"], held["scale"], held["zero_point"])
        return product(x, *weight, bias, offsets, self.constants, *self.codes, act_bits, self.cols)  # type: ignore[arg-type]

    def extra_repr(self) -> str:
        """Describe the weight."""
        per = "row" if self.scale.shape[-1] == 1 else f"{self.cols // self.scale.shape[-1]}"
        scales = f"{str(self.scale.dtype).removeprefix('torch.')} scale per {per}"
        grid = f"bits={self.grid.bits}, scheme={self.grid.scheme}"
        return f"{'x'.join(map(str, self.shape))}, {grid}, {scales}, {self.nbytes} bytes"


class Packed(nn.Module):
    """What layers over a packed weight share: the weight, a bias, and what happens to the input.

    Args:
        weight: packed weight, its last dimensions ``[N, K]``; a :class:`PackedBuffers` is shared, not copied.
        bias: ``[..., N]`` or None; a Parameter stays the same object.
        act: module that the input goes through first, such as a :class:`LearnedActivation`.
        act_bits: quantize the input to symmetric integers per token and sum integers, 2 to 8 bits; None does not.

    Attributes:
        weight: the packed weight as buffers.
    """

    #: Name of this kind of layer in a file.
    kind: ClassVar[str]
    #: Dimensions of the weight.
    dims: ClassVar[int]

    weight: PackedBuffers
    bias: Tensor | None

    def __init__(
        self,
        weight: PackedWeight | PackedBuffers,
        bias: Tensor | None = None,
        *,
        act: nn.Module | None = None,
        act_bits: int | None = None,
    ) -> None:
        super().__init__()
        self.weight = weight if isinstance(weight, PackedBuffers) else PackedBuffers(weight)
        shape = self.weight.shape
        if len(shape) != self.dims:
            raise ValueError(f"weight has shape {tuple(shape)}, must have {self.dims} dimensions")
        if bias is not None and bias.shape != shape[:-1]:
            raise ValueError(f"bias has shape {tuple(bias.shape)}, must be {tuple(shape[:-1])}")
        if act_bits is not None and not 2 <= act_bits <= 8:
            raise ValueError(f"act_bits is {act_bits}, must be None or 2 to 8")
        if isinstance(bias, nn.Parameter) or bias is None:
            self.register_parameter("bias", bias)
        else:
            self.register_buffer("bias", bias)
        self.act, self.act_bits = act, act_bits

    @classmethod
    def from_quantized(
        cls, layer: Any, *, scale_dtype: torch.dtype = torch.float32, weight: PackedBuffers | None = None
    ) -> Any:
        """Return the packed form of a trained layer.

        The bias is the same Parameter. Dynamic activations become ``act_bits``; a learned activation quantizer is the
        same module. Forward and backward hooks come along.

        Args:
            layer: a layer with the attributes of :class:`QuantLinear`.
            scale_dtype: dtype that scales are stored in.
            weight: the packed weight of ``layer`` if there is one already, from a layer that shares it.

        Raises:
            ValueError: if the layer cannot be packed.
        """
        act: nn.Module | None = layer.act
        act_bits = act.bits if isinstance(act, DynamicActivation) else None
        weight = weight or PackedBuffers.from_quantized(layer, scale_dtype)
        new = cls(weight, layer.bias, act=None if act_bits else act, act_bits=act_bits).train(layer.training)
        vars(new).update({name: value for name, value in vars(layer).items() if name in _HOOKS})
        return new

    @property
    def in_features(self) -> int:
        """K."""
        return self.weight.cols

    @property
    def out_features(self) -> int:
        """N."""
        return self.weight.packed.shape[-2]

    @property
    def grid(self) -> Grid:
        """Grid of the codes."""
        return self.weight.grid

    def _product(self, x: Tensor, bias: Tensor | None, offsets: Tensor | None = None) -> Tensor:
        if self.act is not None:
            x = self.act(x)
        dtype = autocast_dtype(x)
        if dtype is None:
            return self.weight(x, bias, offsets, self.act_bits)
        # Under autocast. Integers are taken from x before it is rounded, as in training.
        x = x if self.act_bits is not None else x.to(dtype)
        return self.weight(x, bias, offsets, self.act_bits).to(dtype)

    def extra_repr(self) -> str:
        """Describe the layer."""
        text = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        return text if self.act_bits is None else f"{text}, act_bits={self.act_bits}"


class PackedLinear(Packed):
    """``y = x @ weight.T + bias`` from packed codes; differentiable in x and bias, for adapters over a packed base.

    Args and attributes are those of :class:`Packed`, with a weight ``[N, K]``. Codes and scales are buffers: nothing
    here trains but the bias. Results differ from :class:`QuantLinear`'s in eval mode only as docs/packing.md says.
    """

    kind = "linear"
    dims = 2

    def forward(self, x: Tensor) -> Tensor:
        """Return the output ``[..., N]`` for an input ``[..., K]``, in its dtype, or autocast's."""
        return self._product(x, self.bias)


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
        y = self._product(x, None, offsets)
        if self.bias is None:
            return y
        return y + bias_of_tokens(self.bias, offsets, len(x)).to(y.dtype)


#: What a file may hold, by `Packed.kind`.
KINDS: dict[str, type[Packed]] = {cls.kind: cls for cls in (PackedLinear, GroupedPackedLinear)}
