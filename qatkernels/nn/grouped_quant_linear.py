"""The linear layers of a mixture's experts, fake-quantized and multiplied together."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..autocast import autocast_dtype, compute_dtype
from ..dtensor import is_dtensor, local_part, part_of_sum
from ..ops._grouped_linear import grouped_linear
from ..ops._sharded_product import sharded_product
from .config import QuantConfig
from .quant_linear import why_not
from .quantized import Quantized


class GroupedQuantLinear(Quantized):
    """``y[t] = Q_a(x[t]) @ Q(weight[e]; scale[e]).T + bias[e]`` for tokens sorted by expert e.

    Every expert gets the bits that a :class:`QuantLinear` of its own would give. The gradient scale is that of one
    expert (our reading: the papers have no experts). One launch quantizes all experts; one launch each computes the
    product of the forward and those of the backward.

    Args:
        num_experts: experts E.
        in_features: input features K.
        out_features: output features N.
        bias: whether there is a bias ``[E, N]``.
        config: what to quantize to; per tensor is per expert.
        device: device of the parameters.
        dtype: dtype of weight and bias.

    Attributes:
        weight: master weights ``[E, N, K]``.
        scale: float32 step sizes, ``[E, N]``, ``[E, N, K / group_size]``, or ``[E]`` per tensor.
        bias: ``[E, N]`` or None.

    The others are those of :class:`QuantLinear`.

    Raises:
        ValueError: if ``config.group_size`` does not divide ``in_features``.
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        num_experts: int,
        in_features: int,
        out_features: int,
        bias: bool = False,
        *,
        config: QuantConfig,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, out_features, in_features, device=device, dtype=dtype))
        self.register_parameter(
            "bias", nn.Parameter(torch.empty(num_experts, out_features, device=device, dtype=dtype)) if bias else None
        )
        self._draw()
        self._finish(config)

    @classmethod
    def from_stacked(
        cls, weight: Tensor, bias: Tensor | None = None, *, config: QuantConfig, transposed: bool | None = None
    ) -> GroupedQuantLinear:
        """Return a layer over stacked weights and, maybe, biases ``[E, N]``.

        Args:
            weight: ``[E, N, K]``, and then a Parameter is not copied, or ``[E, K, N]`` with ``transposed=True``.
            bias: ``[E, N]`` or None; a Parameter is not copied.
            config: what to quantize to.
            transposed: whether the model multiplies by the weights as they are, ``x @ weight[e]``, and not by their
                transposes, ``F.linear(x, weight[e])``. True makes a transposed copy, which is a new Parameter: give it
                to the optimizer. None means False, and is refused for a square weight: of other weights the first
                input shows a mistake by its shape.

        Raises:
            ValueError: if a shape does not fit, or the weight is square and ``transposed`` is None.
        """
        if weight.ndim != 3:
            raise ValueError(f"weight has shape {tuple(weight.shape)}, must have three dimensions")
        if transposed:
            turned = weight.detach().transpose(1, 2).contiguous()
            weight = nn.Parameter(turned, requires_grad=weight.requires_grad)
        if bias is not None and bias.shape != weight.shape[:2]:
            raise ValueError(f"bias has shape {tuple(bias.shape)}, must be {tuple(weight.shape[:2])}")
        if transposed is None and weight.shape[1] == weight.shape[2]:
            raise ValueError(
                f"transposed is None with a weight of shape {tuple(weight.shape)}, which fits both ways round: give "
                "False for [E, N, K] (the model computes F.linear(x, weight[e])), True for [E, K, N] (x @ weight[e])"
            )
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        for name, t in (("weight", weight), ("bias", bias)):
            parameter = (
                t if t is None or isinstance(t, nn.Parameter) else nn.Parameter(t, requires_grad=t.is_floating_point())
            )
            layer.register_parameter(name, parameter)
        layer._finish(config)
        return layer

    @classmethod
    def from_linears(cls, linears: Sequence[nn.Linear], *, config: QuantConfig) -> GroupedQuantLinear:
        """Return a layer with the stacked weights of linear layers of equal shapes.

        The stacks are new Parameters, frozen if the originals are; frozen weights get frozen scales. Give the new ones
        to the optimizer. Hooks of the linear layers are not taken along.

        Raises:
            ValueError: if there is none, one is more than a plain ``nn.Linear``, shapes, dtypes or devices differ, or
                some weights (or biases) are frozen and others are not: a stack is one Parameter.
        """
        for i, linear in enumerate(linears):
            if problem := why_not(linear):
                raise ValueError(f"linears[{i}] {problem}")
        shapes = {(tuple(linear.weight.shape), linear.bias is None) for linear in linears}
        if len(shapes) != 1:
            raise ValueError(f"linears have {len(shapes)} different shapes, must have one")
        weight = _stacked([linear.weight for linear in linears], "weight")
        bias = None if linears[0].bias is None else _stacked([linear.bias for linear in linears], "bias")
        return cls.from_stacked(weight, bias, config=config, transposed=False).train(linears[0].training)

    def _finish(self, config: QuantConfig) -> None:
        self.num_experts, self.out_features, self.in_features = self.weight.shape
        self._quantize(config)

    @torch.no_grad()
    def _draw(self) -> None:
        bound = 1 / math.sqrt(max(self.weight.shape[-1], 1))  # the range that nn.Linear draws from
        for parameter in (self.weight, self.bias):
            if parameter is not None:
                parameter.uniform_(-bound, bound)

    def reset_parameters(self) -> None:
        """Draw new weights and biases as nn.Linear does, and set the scales from them."""
        self._draw()
        self.reset_scale()

    def forward(self, x: Tensor, offsets: Tensor) -> Tensor:
        """Return the output ``[T, N]`` for tokens ``[T, K]``.

        Args:
            x: tokens, those of expert 0 first.
            offsets: int32 ``[E]``, where each expert's tokens end; tokens past the last one give 0.
        """
        if self.act is not None:
            x = self.act(x)
        weight = self._forward_weight(compute_dtype(self.weight))
        if (dtype := autocast_dtype(self.weight)) is not None:
            x, weight = x.to(dtype), weight.to(dtype)
        if is_dtensor(weight):
            # Where there is noise the weight was gathered: it has that of its elements.
            split: Any = weight.redistribute(placements=self.weight.placements)  # type: ignore[attr-defined]
            y = sharded_product(x, (split,), None, lambda x, weight, _: grouped_linear(x, weight, offsets))
        else:
            y = grouped_linear(x, weight, offsets)
        y = y if self.bias is None else add_bias(y, self.bias, offsets)
        return y if self.out_act is None else self.out_act(y)

    def extra_repr(self) -> str:
        """Describe the layer and its quantization."""
        sizes = f"num_experts={self.num_experts}, in_features={self.in_features}, out_features={self.out_features}"
        return f"{sizes}, bias={self.bias is not None}, {self.described}"


@torch.inference_mode(False)  # a Parameter made in inference mode can never train
def _stacked(parameters: Sequence[Tensor], name: str) -> nn.Parameter:
    for what in ("dtype", "device", "requires_grad"):
        first, *others = (getattr(p, what) for p in parameters)
        for i, other in enumerate(others, 1):
            if other != first:
                raise ValueError(f"linears[{i}].{name} has {what} {other}, must be {first} like linears[0].{name}")
    return nn.Parameter(torch.stack([p.detach() for p in parameters]), requires_grad=parameters[0].requires_grad)


def add_bias(y: Tensor, bias: Tensor, offsets: Tensor) -> Tensor:
    """Return outputs ``[T, N]`` plus the bias ``[E, N]`` of each token's expert.

    Where the bias is sharded, ``y`` is what :func:`~qatkernels.ops._sharded_product.sharded_product` returned.
    """
    if is_dtensor(bias) and is_dtensor(y):
        from torch.distributed.tensor import DTensor

        here = part_of_sum(bias) if y.placements[0].is_partial() else bias.to_local()
        added = bias_of_tokens(here, offsets, len(y)).to(y.dtype)
        return y + DTensor.from_local(added, y.device_mesh, y.placements, run_check=False)
    return y + bias_of_tokens(local_part(bias), offsets, len(y)).to(y.dtype)


def bias_of_tokens(bias: Tensor, offsets: Tensor, tokens: int) -> Tensor:
    """Return the bias ``[tokens, N]`` of each token's expert, without a device sync; 0 past the last offset."""
    return F.pad(bias, (0, 0, 0, 1))[expert_of_tokens(offsets, tokens)]  # the row of zeros is for unassigned tokens


def expert_of_tokens(offsets: Tensor, tokens: int) -> Tensor:
    """Return each token's expert ``[tokens]`` without a device sync; the number of experts past the last offset."""
    return torch.searchsorted(offsets, torch.arange(tokens, device=offsets.device, dtype=offsets.dtype), right=True)
