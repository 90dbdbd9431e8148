"""Mixtures of experts of transformers: their stacked weights as layers, and the forward that calls these layers.

transformers keeps the linear layers of all experts as Parameters ``gate_up_proj`` (or ``up_proj``) and ``down_proj`` of
one module, and looks up the module's forward in a registry, by the name in the module's configuration. Quantizing puts
a :class:`GroupedQuantLinear` in the place of such a Parameter, under the same name, enters :func:`experts_forward` in
the registry, and names it in the configuration of this module alone. Nothing here imports transformers.
"""

from __future__ import annotations

import importlib
import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..autocast import autocast_dtype
from ..dtensor import local_part
from ..ops import PackedWeight
from ..ops._grouped_linear import grouped_linear
from ..ops.contract import FLOATS
from .config import QuantConfig
from .grouped_quant_linear import GroupedQuantLinear, add_bias
from .quant_conv1d import transpose_

#: The module of transformers with the registry, and what our entry is called there.
_REGISTRY, _NAME = "transformers.integrations.moe", "qatkernels"
_PROJECTIONS = ("gate_up_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Stack:
    """The stacked weights of experts, where they are a Parameter of a module and not a layer.

    It is equal to another one of the same module and name.

    Attributes:
        module: the module that has the Parameter.
        name: the Parameter's name in it.
    """

    module: nn.Module
    name: str

    @property
    def weight(self) -> Tensor:
        """The weights, ``[E, N, K]``, or ``[E, K, N]`` if :attr:`transposed`."""
        weight: Tensor = getattr(self.module, self.name)
        return weight

    @property
    def bias(self) -> Tensor | None:
        """The biases ``[E, N]``, or None."""
        return getattr(self.module, f"{self.name}_bias") if self.module.has_bias else None

    @property
    def transposed(self) -> bool:
        """Whether the module multiplies by the weights as they are, ``x @ w[e]``."""
        return bool(self.module.is_transposed)

    @property
    def shape(self) -> torch.Size:
        """``[E, N, K]``."""
        return self.weight.mT.shape if self.transposed else self.weight.shape

    def why_not(self) -> str | None:
        """Return why the stack cannot be quantized, as the rest of a sentence, or None if it can."""
        if type(self.weight) is not nn.Parameter:
            return f"is a {type(self.weight).__name__}, must be a plain nn.Parameter: quantize before sharding it"
        if self.weight.dtype not in FLOATS:
            return f"has dtype {self.weight.dtype}, must be one of {FLOATS}"
        if "forward" in vars(self.module):
            return "belongs to a module with a forward of its own on the instance, which would bypass quantization"
        return None

    def quantized(self, config: QuantConfig) -> GroupedQuantLinear:
        """Return the quantized layer of the stack, whose Parameters are now ``[E, N, K]``.

        The module cannot be used until :meth:`put` has placed the layer there.

        Raises:
            ValueError: if ``config.group_size`` does not fit. The Parameters are then as they were.
        """
        if self.transposed:
            transpose_(self.weight)
        try:
            layer = GroupedQuantLinear.from_stacked(self.weight, self.bias, config=config, transposed=False)
        except BaseException:
            self.restore()
            raise
        return layer.train(self.module.training)

    def restore(self) -> None:
        """Undo what :meth:`quantized` did to the Parameters."""
        if self.transposed:
            transpose_(self.weight)

    def put(self, layer: nn.Module) -> None:
        """Put a layer in the place of the Parameters, and let the module's forward call it."""
        for name in (self.name, f"{self.name}_bias"):
            self.module._parameters.pop(name, None)
        self.module.add_module(self.name, layer)
        # from_pretrained draws what no file has; its code for these modules would draw the Parameters.
        vars(self.module)["_is_hf_initialized"] = True
        if not calls_layers(self.module):
            self.module.config = _ConfigOfExperts(self.module.config)  # type: ignore[assignment]


def stacks_of(module: nn.Module) -> list[Stack]:
    """Return the stacks of a module, if it is one whose forward transformers looks up in its registry."""
    forward = getattr(type(module).forward, "__globals__", {})  # of the class: that of transformers' decorator
    if forward.get("__name__") != _REGISTRY:
        return []
    return [Stack(module, name) for name in _PROJECTIONS if module._parameters.get(name) is not None]


def calls_layers(module: nn.Module) -> bool:
    """Whether a module of experts calls layers in place of its stacks."""
    return isinstance(getattr(module, "config", None), _ConfigOfExperts)


def placed_in(model: nn.Module) -> dict[str, nn.Module]:
    """Return the layers, quantized or packed, that have taken the place of stacks of a model, by name."""
    return {
        f"{prefix}.{name}".lstrip("."): layer
        for prefix, module in model.named_modules()
        if calls_layers(module)
        for name, layer in module.named_children()
        if name in _PROJECTIONS
    }


def take_out(model: nn.Module, name: str, weight: nn.Parameter, bias: Any) -> None:
    """Put Parameters ``[E, N, K]`` and ``[E, N]`` back in the place of a layer that took the place of a stack."""
    prefix, _, name = name.rpartition(".")
    module: Any = model.get_submodule(prefix)
    del module._modules[name]
    module.register_parameter(name, weight)
    if module.is_transposed:
        transpose_(weight)
    if bias is not None:
        module.register_parameter(f"{name}_bias", bias)
    if not any(isinstance(getattr(module, n, None), nn.Module) for n in _PROJECTIONS):
        module.config = module.config.whole


def as_layers(model: nn.Module, state: dict[str, Any]) -> None:
    """Rename and transpose, in a state dict of the model in full precision, what layers have taken the place of."""
    for name in placed_in(model):
        owner = model.get_submodule(name.rpartition(".")[0])
        if isinstance(weight := state.pop(name, None), Tensor):
            state[f"{name}.weight"] = weight.mT.contiguous() if owner.is_transposed else weight
        if (bias := state.pop(f"{name}_bias", None)) is not None:
            state[f"{name}.bias"] = bias


def save_as_layers(model: Any) -> None:
    """Keep ``save_pretrained`` of a transformers model from taking quantized stacks apart.

    transformers stores most stacks as one weight for each expert. It recognizes the names of stacks as parts of longer
    ones, so it would take scales and packed codes apart too.
    """
    if not (names := placed_in(model)):
        return
    conversions = getattr(model, "_weight_conversions", None)
    if conversions is None:  # not loaded: what transformers would use
        found = importlib.import_module("transformers.conversion_mapping").get_model_conversion_mapping(
            model, add_legacy=False
        )
        conversions = [c for c in found if type(c).__name__ != "PrefixChange"]
    model._weight_conversions = [c for c in conversions if not any(makes(c, name) for name in names)]


def makes(conversion: Any, name: str) -> bool:
    """Whether a conversion of transformers makes a parameter of this name out of others, and does not only rename."""
    if not hasattr(conversion, "operations"):
        return False
    return conversion.reverse_transform().rename_source_key(name)[1] is not None


def find(model: nn.Module, name: str) -> nn.Module | Stack | None:
    """Return the module or the stack of this name, or None."""
    prefix, _, last = name.rpartition(".")
    try:
        owner = model.get_submodule(prefix)
    except AttributeError:
        return None
    stack = next((s for s in stacks_of(owner) if s.name == last), None)
    return stack or (owner._modules.get(last) if name else model)


class _ConfigOfExperts:
    """The configuration of a module of experts, except that it names our forward.

    A model's modules share one configuration, where another name would concern experts that are not quantized too, and
    ``generate`` may change the name for a while.

    Attributes:
        whole: that configuration.
    """

    _experts_implementation = _NAME

    def __init__(self, config: Any) -> None:
        self.whole = config
        sys.modules[_REGISTRY].ALL_EXPERTS_FUNCTIONS.register(_NAME, experts_forward)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.whole, name)

    def __reduce__(self) -> Any:  # so that a copy in another process enters the forward there
        return type(self), (self.whole,)


def experts_forward(
    experts: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:  # fmt: skip
    """Return what a module of experts makes of its tokens; an entry of transformers' registry.

    Args:
        experts: the module. Its projections are layers, or Parameters where a pattern left them out.
        hidden_states: tokens ``[T, H]``.
        top_k_index: each token's experts, ``[T, k]``. Under expert parallelism experts are numbered in each process,
            and indices of at least as many as are here are experts elsewhere, and give 0.
        top_k_weights: their weights ``[T, k]``.

    Returns:
        ``[T, H]``. Sums over a token's experts have a fixed order.
    """
    expert, order = top_k_index.reshape(-1).sort(stable=True)
    each = torch.arange(experts_here(experts), device=expert.device, dtype=expert.dtype)
    offsets = torch.searchsorted(expert, each, right=True).int()
    x = hidden_states[order // top_k_index.shape[-1]]
    x = _project(experts, "gate_up_proj" if experts.has_gate else "up_proj", x, offsets)
    x = experts._apply_gate(x) if experts.has_gate else experts.act_fn(x)
    x = _project(experts, "down_proj", x, offsets)
    if experts.has_post_expert_norm:
        x = experts.post_expert_norm(x)
    x = x * top_k_weights.reshape(-1)[order, None]
    by_token = torch.empty_like(x).index_copy(0, order, x).view(*top_k_index.shape, -1)
    return by_token.sum(dim=1).to(hidden_states.dtype)


def experts_here(experts: nn.Module) -> int:
    """Return how many of the experts of a module this process has: all, without expert parallelism."""
    held: Any = next(found for name in _PROJECTIONS if (found := getattr(experts, name, None)) is not None)
    if isinstance(held, nn.Module):
        weight: Any = held.weight
        held = weight.packed if isinstance(weight, PackedWeight) else weight
    return len(local_part(held))


def _project(experts: Any, name: str, x: Tensor, offsets: Tensor) -> Tensor:
    """Return the product of tokens, sorted by expert, and a projection, which is a layer or a stack of weights."""
    held = getattr(experts, name)
    if isinstance(held, nn.Module):
        y: Tensor = held(x, offsets)
        return y
    held = local_part(held)
    weight = held.mT if experts.is_transposed else held
    if (dtype := autocast_dtype(weight)) is not None:
        x, weight = x.to(dtype), weight.to(dtype)
    y = grouped_linear(x, weight, offsets)
    bias = getattr(experts, f"{name}_bias") if experts.has_bias else None
    return y if bias is None else add_bias(y, bias, offsets)
