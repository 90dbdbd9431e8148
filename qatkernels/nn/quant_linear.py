"""A linear layer whose weight is fake-quantized in every forward."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .._torch_compat import in_forward_mode
from ..autocast import compute_dtype
from ..ops import quant_linear_dual
from ..ops.contract import FLOATS
from ..ops.quant_linear import forward_mode_alone
from .activation import quantized_ends
from .config import QuantConfig
from .quantized import Quantized, reparametrization

#: Subclasses of ``nn.Linear`` that compute what ``nn.Linear`` computes, by qualified name: :class:`QuantLinear` takes
#: their place. Add the name of your own class if its forward is ``x @ weight.T + bias`` and nothing else.
#: FalconLinear adds the bias after the product is rounded, where the quantized layer rounds once.
LINEAR_CLASSES: set[str] = {
    "torch.nn.modules.linear.Linear",
    "transformers.models.falcon.modeling_falcon.FalconLinear",
    "transformers.models.esm.modeling_esmfold.EsmFoldLinear",
}


class QuantLinear(Quantized, nn.Linear):
    """``y = Q_o(Q_a(x) @ Q(weight; scale).T + bias)``, trained straight through.

    The weight is the full-precision master copy. Under autocast a float32 weight is quantized straight into the 16-bit
    dtype, without a cast of its own and rounded once. FSDP2 goes with autocast too; its ``param_dtype`` would round the
    scales, which is an error unless :func:`shard_scales` has taken them out.

    Args:
        in_features: input features K.
        out_features: output features N.
        bias: whether there is a bias ``[N]``.
        config: what to quantize to.
        device: device of the parameters.
        dtype: dtype of weight and bias.

    Attributes:
        weight: master weight ``[N, K]``.
        scale: float32 step sizes, ``[N]``, ``[N, K / group_size]``, or ``[1]`` per tensor; stays float32, bit for bit,
            in ``model.bfloat16()`` and the like.
        zero_point: the same for affine grids, else None.
        act: quantizer of the input, or None.
        out_act: quantizer of the output, a :class:`LearnedActivation`, or None.
        quantizer: how the weight is quantized now (:class:`~qatkernels.nn.quantizer.WeightQuantizer`); WinQ, SQuAT and
            sharpness change that for a while.

    Raises:
        ValueError: if ``config.group_size`` does not divide ``in_features``.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        config: QuantConfig,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        nn.Linear.__init__(self, in_features, out_features, bias, device, dtype)
        self._quantize(config)

    @classmethod
    def from_linear(cls, linear: nn.Linear, config: QuantConfig) -> QuantLinear:
        """Return the quantized form of a linear layer.

        Weight and bias are the same Parameter objects, so ties, ``requires_grad``, device and dtype stay. Hooks and
        other attributes come along; the handles of hooks keep working. A frozen weight gets frozen scales.

        Args:
            linear: an ``nn.Linear``, or one of `LINEAR_CLASSES`; other subclasses may compute something else and are
                refused.
            config: what to quantize to.

        Raises:
            ValueError: if ``linear`` is more than a plain ``nn.Linear``, or ``config.group_size`` does not fit.
        """
        if problem := why_not(linear):
            raise ValueError(f"linear {problem}")
        return cls._adopt(linear, config)

    def reset_parameters(self) -> None:
        """Draw a new weight and bias as nn.Linear does, and set the scales from them."""
        super().reset_parameters()
        if "scale" in self._parameters:  # nn.Linear.__init__ calls this before there is a scale
            self.reset_scale()

    def forward(self, x: Tensor) -> Tensor:
        """Return the output ``[..., N]`` for an input ``[..., K]``."""
        if self.act is not None:
            x = self.act(x)
        gathered = self._levels is not None and self.holds_levels
        y = F.linear(x, self.weight, self.bias) if gathered else self._product(x)
        out_act = self.out_act
        return y if out_act is None else out_act(y)

    def _product(self, x: Tensor) -> Tensor:
        """Return the output before it is quantized."""
        dtype = compute_dtype(self.weight)
        pushing = not torch.compiler.is_compiling() and in_forward_mode()
        if pushing and self.quantizer.unmodified and forward_mode_alone(x, *self.parameters(recurse=False)):
            return self._pushed_forward(x, dtype or self.weight.dtype)
        self.check_scale()
        scales = self._scales_for(self.weight)
        return self.quantizer.linear(x, self.bias, self.weight, *scales, dtype, self.training)

    def _pushed_forward(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the output with its tangent (forward mode), reading the weight and its tangent once."""
        quantizer, noise = self.quantizer, self.quantizer.noise(self.training)
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(dtype)
        x2, along_x = forward_ad.unpack_dual(x.reshape(-1, self.in_features))
        tensors = (self.weight, *self._scales_for(self.weight))
        weight, tangents = zip(
            *((None, None) if t is None else forward_ad.unpack_dual(t) for t in tensors), strict=True
        )
        if all(t is None for t in (along_x, *tangents)):
            y = F.linear(x2, quantizer.plain(*tensors, dtype, noise))
        else:
            (w, *learned), (along_w, along_scale, along_zero_point) = weight, tangents
            scale, zero_point = quantizer.stored(*learned)
            dual = quant_linear_dual(
                x2, w, scale, quantizer.grid, group_size=quantizer.group_size, zero_point=zero_point,
                tangent_x=along_x, tangent_w=along_w, tangent_scale=along_scale, tangent_zero_point=along_zero_point,
                noise_std=noise[0], scale_noise_std=noise[1], grad_scale=quantizer.grad_scale,
            )  # fmt: skip
            y = forward_ad.make_dual(*dual)
        y = y.view(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias.to(dtype)

    def to_linear(self) -> nn.Linear:
        """Return a plain ``nn.Linear`` that holds the quantized weight, and the same bias Parameter, without hooks.

        Raises:
            ValueError: if the layer quantizes its input or its output, which an ``nn.Linear`` cannot.
        """
        for what, field in (("input", "act_bits"), ("output", "out_bits")):
            if what in quantized_ends(self):
                raise ValueError(
                    f"{field} is {getattr(self.config, field)}, must be None: an nn.Linear does not quantize its "
                    f"{what} (quantized_weight() gives the weight alone)"
                )
        linear = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        weight = self.quantized_weight().detach()
        linear.weight = nn.Parameter(weight, requires_grad=self.weight.requires_grad)
        linear.bias = self.bias
        return linear.train(self.training)

    def extra_repr(self) -> str:
        """Describe the layer and its quantization."""
        return f"{super().extra_repr()}, {self.described}"


def why_not(layer: nn.Module, classes: Collection[str] = LINEAR_CLASSES) -> str | None:
    """Return why a layer cannot be quantized in place, as the rest of a sentence, or None if it can.

    Quantizing would drop whatever computes the weight or replaces the forward, or would be bypassed by it.

    Args:
        layer: the layer.
        classes: qualified names of the classes whose forward is known; subclasses of them are not included.
    """
    if parametrize.is_parametrized(layer):
        return "is parametrized: remove the parametrization first (torch.nn.utils.parametrize.remove_parametrizations)"
    if qualified_name(type(layer)) not in classes:
        return f"is a {qualified_name(type(layer))}, must be exactly torch.nn.Linear (or a class of LINEAR_CLASSES)"
    weight = layer._parameters.get("weight")
    if weight is None:
        return f"has a weight that is computed (the layer is {reparametrization(layer)}): remove that first"
    if type(weight) is not nn.Parameter:
        return f"has a {type(weight).__name__} as weight, must be a plain nn.Parameter: quantize before sharding it"
    if weight.dtype not in FLOATS:
        return f"has a {weight.dtype} weight, must be one of {FLOATS}"
    if "forward" in layer.__dict__:
        return "has a forward of its own on the instance, which would bypass quantization: quantize before wrapping it"
    if layer._compiled_call_impl is not None:
        return "has been compiled, which would bypass quantization: quantize before compiling"
    return None


def qualified_name(cls: type) -> str:
    """Return the module and the name of a class, by which it is found without importing where it comes from."""
    return f"{cls.__module__}.{cls.__qualname__}"
