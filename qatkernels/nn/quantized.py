"""The base class of layers with a fake-quantized weight."""

from __future__ import annotations

import math
import re
import warnings
import weakref
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod

from .._torch_compat import is_fake
from ..dtensor import is_dtensor, local_part
from ..dtypes import dtype_name
from ..float32_scales import Float32Scales, layout_in
from ..grids import Grid
from .activation import ACTS, DynamicActivation, LearnedActivation, learned_acts
from .config import QuantConfig
from .floor import count_act_at_floor, count_at_floor, floor_message
from .quantizer import WeightQuantizer, initial_scale
from .wrapped import check_unwrapped

if TYPE_CHECKING:
    from typing_extensions import Self

_16_BIT = (torch.bfloat16, torch.float16)

#: Former attributes of layers, and what to call instead.
_ON_QUANTIZER = {
    "noise_std": "layer.quantizer.set_noise(noise_std, scale_noise_std)",
    "scale_noise_std": "layer.quantizer.set_noise(noise_std, scale_noise_std)",
    "perturbation": "layer.quantizer.modified(add=...)",
}
#: Whether this process has warned of scales at the floor.
_warned_of_floor = False
#: The function of the last cast that was warned of; one cast of a model passes the same function to every layer.
_warned_of: weakref.ref[Callable[[Tensor], Tensor]] | None = None


class _MissingScale(str):
    """The name of a missing scale. Where torch formats it into its error message, advice is added."""

    def __format__(self, spec: str) -> str:
        return f"{self!s} (load_weights(model, state_dict) sets scales from the weights)"


class Quantized(Float32Scales):
    """A module with a weight ``[..., N, K]``, its scales, and quantizers of the input and the output.

    Attributes are those that :class:`QuantLinear` describes.
    """

    weight: Tensor
    scale: nn.Parameter
    zero_point: nn.Parameter | None
    act: DynamicActivation | LearnedActivation | None
    out_act: LearnedActivation | None
    quantizer: WeightQuantizer
    in_features: int
    out_features: int
    #: Whether :func:`calibrate` sets the scales: ``scale_init`` is ``"activation"``, and nothing has set them since.
    awaits_inputs: bool = False
    _sum_awaiting: float | None = None
    #: Where FSDP2 gathers the codes of this layer (:func:`gather_codes`): the levels that they became.
    _levels: weakref.ref[Tensor] | None = None

    @property
    def grid(self) -> Grid:
        """Grid of the weight."""
        return self.quantizer.grid

    @property
    def group_size(self) -> int | None:
        """Features that share a scale; None where a row does, or the tensor."""
        return self.quantizer.group_size

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _ON_QUANTIZER:  # otherwise an old script would silently train without noise
            raise AttributeError(f"{name} cannot be assigned to a layer: use {_ON_QUANTIZER[name]}")
        super().__setattr__(name, value)

    @property
    def config(self) -> QuantConfig:
        """What the layer is quantized to. Read-only: :meth:`requantize` sets another one."""
        return self.quantizer.config

    @config.setter
    def config(self, config: QuantConfig) -> None:
        raise AttributeError(
            "config cannot be assigned, its scales would be those of the old one: call layer.requantize(config), or "
            "quantize_model(model, config, requantize=True) for a whole model"
        )

    @classmethod
    def _adopt(cls, layer: nn.Module, config: QuantConfig) -> Self:
        """Return a quantized layer with parameters (``weight`` is ``[N, K]``), hooks and attributes of ``layer``."""
        module = cls.__new__(cls)
        module.__dict__.update(layer.__dict__)
        for registry in ("_parameters", "_buffers", "_modules"):
            module.__dict__[registry] = dict(layer.__dict__[registry])
        module.out_features, module.in_features = module.weight.shape
        module._quantize(config)
        return module

    def _quantize(self, config: QuantConfig) -> None:
        self.act = None
        self.out_act = None
        self.quantizer = WeightQuantizer()
        self._configure(config, trains=self.weight.requires_grad)

    def requantize(self, config: QuantConfig) -> None:
        """Quantize to another configuration, with scales set anew from the present weight.

        Weight and bias stay the same Parameters. Scales and zero points are new Parameters, even where the old ones
        have the same shape: a layer that shares the old ones keeps them unchanged. So give the new ones to the
        optimizer, and where layers share a weight, requantize each of them and let them share scales again (assign
        ``scale`` and ``zero_point``), as ``quantize_model(requantize=True)`` does. A quantizer of the input or the
        output whose configuration stays the same is kept with what it has learned.

        Args:
            config: what to quantize to.

        Raises:
            ValueError: if ``config`` is no QuantConfig, its group size does not divide the input features, or the
                weight is sharded or offloaded, or DDP or FSDP wraps the layer. The layer is then unchanged.
        """
        if not is_dtensor(self.weight):  # which has a message of its own
            check_unwrapped(self)
        self._requantize(config)

    def _requantize(self, config: QuantConfig) -> None:
        """Requantize a layer that is known not to be wrapped: to find that out takes a look at every live object."""
        if is_dtensor(self.weight):
            raise ValueError("the weight is sharded, so scales cannot be set anew: requantize before fully_shard")
        self._refuse_sharded_scales("requantize")
        if is_offloaded(self):
            raise ValueError(f"scales cannot be set anew: {OFFLOADED.format('requantize')}")
        self._configure(config, trains=self.scale.requires_grad)

    @torch.inference_mode(False)  # a Parameter made in inference mode can never train
    def _configure(self, config: QuantConfig, trains: bool) -> None:
        """Set configuration, scales and quantizers of activations; change nothing if the configuration is refused."""
        if not isinstance(config, QuantConfig):
            raise ValueError(f"config is {config!r}, must be a QuantConfig")
        initial = initial_scale(self.weight, config)
        for name, value in zip(("scale", "zero_point"), initial, strict=True):
            self.register_parameter(name, None if value is None else nn.Parameter(value, requires_grad=trains))
        self.out_features, self.in_features = self.weight.shape[-2:]
        if self.act is None or _activation(config) != _activation(self.config):
            self.act = self._activation_quantizer(config)
        if self.out_act is None or config.out_bits != self.config.out_bits:
            self.out_act = self._output_quantizer(config)
        self.quantizer.configure(config, self.weight.shape[-2:].numel())
        self.await_inputs()

    def _activation_quantizer(self, config: QuantConfig) -> DynamicActivation | LearnedActivation | None:
        if (act_grid := config.act_grid) is not None:
            offset, device = config.act_scheme == "lsq+", self.weight.device
            return LearnedActivation(self.in_features, act_grid, offset=offset, device=device).train(self.training)
        return None if config.act_bits is None else DynamicActivation(config.act_bits).train(self.training)

    def _output_quantizer(self, config: QuantConfig) -> LearnedActivation | None:
        if (out_grid := config.out_grid) is None:
            return None
        return LearnedActivation(self.out_features, out_grid, device=self.weight.device).train(self.training)

    @torch.no_grad()
    def reset_scale(self) -> None:
        """Set scales and zero points to those of a new layer with the present weight.

        Raises:
            ValueError: if the weight is offloaded, or sharded where scales are searched.
        """
        if is_offloaded(self):
            raise ValueError(f"scales cannot be set anew: {OFFLOADED.format('reset scales')}")
        self.set_scale(*initial_scale(self.weight, self.config))
        self.await_inputs()

    def await_inputs(self) -> None:
        """Note whether calibration is to set the scales, and their sum, by which it sees whether they were trained."""
        self.awaits_inputs = self.config.scale_init == "activation"
        self._sum_awaiting = self._sum_of_scales() if self.awaits_inputs else None

    def _sum_of_scales(self) -> float | None:
        return None if self.scale.is_meta or is_dtensor(self.scale) else float(self.scale.detach().double().sum())

    @property
    def was_trained_awaiting(self) -> bool:
        """Whether the scales have changed since they began to await their inputs."""
        if not self.awaits_inputs or self._sum_awaiting is None or (now := self._sum_of_scales()) is None:
            return False
        return not math.isclose(now, self._sum_awaiting, rel_tol=1e-9)  # another device adds in another order

    @torch.no_grad()
    def set_scale(self, scale: Tensor, zero_point: Tensor | None = None) -> None:
        """Write scales, and zero points if the layer has them, into its parameters.

        Raises:
            ValueError: if scales are sharded and the weight is not (:func:`shard_scales`).
        """
        self._refuse_sharded_scales("set scales")
        self.scale.copy_(scale)
        if self.zero_point is not None and zero_point is not None:
            self.zero_point.copy_(zero_point)

    def _refuse_sharded_scales(self, what: str) -> None:
        if is_dtensor(self.scale) and not is_dtensor(self.weight):
            raise ValueError(f"the scales are sharded and the weight is not: {what} before shard_scales")

    def misfit(self) -> str | None:
        """Return that there are scales for another number of rows than the weight has, or None.

        transformers' ``resize_token_embeddings`` puts more rows into the same Parameter.
        """
        if self.config.per_tensor or self.scale.numel() * (self.group_size or self.in_features) == self.weight.numel():
            return None
        return (
            f"its weight has {len(self.weight)} rows and its scales are for {len(self.scale)} (something resized the "
            "weight): quantize_model(model, config, embeddings=True) sets scales anew, and so does layer.requantize"
        )

    @property
    def holds_levels(self) -> bool:
        """Whether the weight is quantized already, because FSDP2 has gathered its codes (:func:`gather_codes`)."""
        levels = None if self._levels is None else self._levels()
        return levels is not None and not is_dtensor(self.weight) and self.weight.is_set_to(levels)

    def _forward_weight(self, dtype: torch.dtype | None) -> Tensor:
        """Return the weight that this forward multiplies with."""
        self.check_scale()
        return self.quantizer(self.weight, *self._scales_for(self.weight), dtype, self.training)

    def quantized_weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return the weight ``[..., N, K]`` that an eval forward uses: no noise, differentiable.

        Args:
            dtype: bfloat16 or float16 for a float32 weight; the weight's dtype if None.
        """
        if self.holds_levels:
            return self.weight if dtype is None else self.weight.to(dtype)
        return self.quantizer.plain(self.weight, *self._scales_for(self.weight), dtype)

    def codes(self) -> Tensor:
        """Return the integer codes of the weight, ``[..., N, K]``, int8 (uint8 for 8-bit affine)."""
        return self.quantizer.codes(self.weight, *self._scales_for(self.weight))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        parts = (self._parameters.get("weight"), self.scale, self.zero_point)
        before, *scales = [None if t is None else t.detach() for t in parts]  # a cast replaces the data in place
        super()._apply(fn, recurse)
        now = self._parameters.get("weight")
        if before is not None and now is not None and now.dtype != before.dtype and now.dtype in _16_BIT:
            simple = not (before.is_meta or now.is_meta or is_dtensor(before) or is_fake(before))
            if simple and (_warned_of is None or _warned_of() is not fn):
                self._warn_of_cast(fn, now.dtype, before, *scales)
        return self

    @torch.no_grad()
    def _warn_of_cast(
        self, fn: Callable[[Tensor], Tensor], dtype: torch.dtype, weight: Tensor, scale: Any, zero_point: Any
    ) -> None:
        """Warn of codes that change because the weight is rounded to 16 bits."""
        before, after = (self.quantizer.codes(w, scale, zero_point) for w in (weight, weight.to(dtype)))
        if changed := int((before != after).sum()):
            # One cast of a model calls every layer with the same function, so this warns once and then stops counting.
            global _warned_of
            _warned_of = weakref.ref(fn)
            warnings.warn(
                f"the cast to {dtype} changed {changed} of the {before.numel()} codes of a quantized layer (layers "
                "after it are not counted), since it rounds the weights that codes are taken from. A cast after QAT "
                "changes the model that was trained: use torch.autocast, or pack_model first, whose codes no cast "
                "changes. Before QAT, cast before quantize_model",
                stacklevel=2,
            )

    def train(self, mode: bool = True) -> Any:
        """Set the mode as any module does; switching to eval mode warns once of scales at the floor."""
        if self.training and not mode:
            self._warn_of_floor()
        return super().train(mode)

    @torch.no_grad()
    def _warn_of_floor(self) -> None:
        """Warn once per process. One device sync per layer is cheap, as loops evaluate rarely."""
        global _warned_of_floor
        weight, scale = self._parameters.get("weight"), self._parameters.get("scale")
        if _warned_of_floor or weight is None or scale is None or weight.is_meta or scale.is_meta or is_fake(scale):
            return
        count, total = count_at_floor(local_part(weight), local_part(scale)), scale.numel()
        for act in learned_acts(self).values():
            count = count + count_act_at_floor(local_part(act.scale), act.initialized)
            total += act.scale.numel()
        if found := int(count):
            _warned_of_floor = True
            warnings.warn(
                f"{floor_message(found, total, ' in one layer')}; scales_at_floor(model) has every layer",
                stacklevel=2,
            )

    @property
    def layout(self) -> str:
        """The quantization in words; a learned quantizer of the input or the output has a layout of its own."""
        dynamic = isinstance(self.act, DynamicActivation)
        return f"{self.described}, act_bits={self.config.act_bits}" if dynamic else self.described

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        _, _, missing_keys, *_ = args
        scale = f"{prefix}scale"
        if scale in state_dict:
            self.awaits_inputs = False
        if scale in missing_keys and f"{prefix}weight" in state_dict:
            warnings.warn(
                "the state dict has weights of quantized layers without their scales, so the scales are not those of "
                "the weights: call load_weights(model, state_dict), which sets scales from the weights",
                stacklevel=2,
            )
            if not any(isinstance(name, _MissingScale) for name in missing_keys):
                missing_keys[missing_keys.index(scale)] = _MissingScale(scale)

    def _problems(self, state_dict: Any, prefix: str) -> list[str]:
        """Return why nothing can be loaded: scales of something else, or a learned quantizer too many or too few."""
        problems = super()._problems(state_dict, prefix)
        if layout_in(state_dict, prefix) is None:  # it is partial, or of an earlier version
            return problems
        learned = learned_acts(self)
        for name, what in ACTS.items():
            here = learned[name].layout if name in learned else None
            there = layout_in(state_dict, f"{prefix}{name}.")
            if (here is None) != (there is None):
                none = f"no learned quantizer of the {what}"
                problems.append(self.refusal.format(f"{prefix}{name}.", there or none, here or none))
        return problems

    @property
    def described(self) -> str:
        """The quantization of the weight in words."""
        text = f"bits={self.grid.bits}, scheme={self.grid.scheme}"
        if self.config.per_tensor:
            text = f"{text}, per_tensor=True"
        elif self.group_size is not None:
            text = f"{text}, group_size={self.group_size}"
        if self.config.scale_dtype != torch.float32:
            text = f"{text}, scale_dtype={dtype_name(self.config.scale_dtype)}"
        if self.config.zero_point_domain != "float":
            text = f"{text}, zero_point_domain={self.config.zero_point_domain}"
        return text


def _activation(config: QuantConfig) -> tuple[object, ...]:
    """Return the fields of a configuration that say how inputs are quantized."""
    return config.act_bits, config.act_scheme, config.act_signed


def reparametrization(layer: nn.Module) -> str | None:
    """Return what computes a layer's weight from other parameters, or None if the weight is a parameter of its own.

    Ask this before writing to a weight: the next forward overwrites a computed weight.

    Returns:
        The rest of the sentence "The layer is ...": ``"pruned by torch.nn.utils.prune"``, say, or ``"parametrized by
        weight_norm"``.
    """
    if parametrize.is_parametrized(layer, "weight"):
        how = layer.parametrizations["weight"]  # type: ignore[index]
        return f"parametrized by {', '.join(_name(part) for part in how)}"
    if layer._parameters.get("weight") is not None:
        return None
    hooks = [hook for hook in layer._forward_pre_hooks.values() if hasattr(hook, "apply")]
    if any(isinstance(hook, BasePruningMethod) for hook in hooks):
        return "pruned by torch.nn.utils.prune"
    if hooks:
        return f"reparametrized by {', '.join(_name(hook) for hook in hooks)}"
    return "without a weight Parameter of its own (it is computed, or a wrapper holds it)"


#: Why something cannot be done with an offloaded weight; filled in with what it is.
OFFLOADED = (
    "its weight is offloaded by accelerate, and on the meta device: {} before offloading, or call "
    "accelerate.hooks.remove_hook_from_submodules(model) first"
)


def is_offloaded(layer: nn.Module) -> bool:
    """Whether accelerate keeps a layer's weight elsewhere: what is written to it between two forwards is lost."""
    weight = layer._parameters.get("weight")
    return weight is not None and weight.is_meta and getattr(layer, "_hf_hook", None) is not None


def check_weights(layers: Mapping[str, Quantized], what: str) -> None:
    """Raise ValueError if the weight of a layer is computed from other parameters, or offloaded.

    Args:
        layers: layers by name.
        what: the consequence, as a clause: ``"resets would be lost"``.
    """
    for name, layer in layers.items():
        if is_offloaded(layer):
            raise ValueError(f"{name or 'the model'} cannot be trained: {OFFLOADED.format('train')}")
        if (how := reparametrization(layer)) is not None:
            raise ValueError(
                f"{name or 'the model'} is {how}, so every forward computes its weight anew: {what}. Make the weight "
                "permanent first (torch.nn.utils.prune.remove, torch.nn.utils.parametrize.remove_parametrizations), "
                "and give the new parameter to the optimizer"
            )


def _name(how: object) -> str:
    """Return the name of torch's function, such as ``weight_norm``, for the class that reparametrizes a weight."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", type(how).__name__).lower().lstrip("_")
