"""A layer of GPT-2, which keeps its weight transposed, fake-quantized like any linear layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from .config import QuantConfig
from .quant_linear import QuantLinear, qualified_name, why_not

#: Classes that compute ``x @ weight + bias`` with a weight ``[K, N]`` and nothing else, by qualified name.
CONV1D_CLASSES: set[str] = {"transformers.pytorch_utils.Conv1D"}


class QuantConv1D(QuantLinear):
    """The quantized form of transformers' ``Conv1D``, the linear layer of GPT-2.

    A Conv1D is a linear layer whose weight is ``[K, N]``. This layer stores it in two ways:

    - In memory it is ``[N, K]``, as in every other quantized layer. Scales, groups, noise, resets, adapters, packing
      and Hessian products know one orientation only. Some of GPT-2's weights are square, so that a mistake about the
      orientation would give wrong numbers and no error.
    - In a state dict it is ``[K, N]``, as in GPT-2's own. Checkpoints load, and what is saved fits GPT-2 again.

    The Parameter stays the same object, so it keeps its place in an optimizer and its ties to other layers. Its data
    are transposed, and so is its gradient if it has one. Make the optimizer afterwards all the same: moments that it
    has already keep the old shape, and the scales are new.

    Attributes and arguments are those of :class:`QuantLinear`.
    """

    of_conv1d = True

    @classmethod
    def from_conv1d(cls, layer: nn.Module, config: QuantConfig) -> QuantConv1D:
        """Return the quantized form of a Conv1D, which cannot be used any more: its Parameter is now ``[N, K]``.

        Args:
            layer: an instance of exactly one of `CONV1D_CLASSES`.
            config: what to quantize to.

        Raises:
            ValueError: if ``layer`` is something else, or ``config.group_size`` does not fit. ``layer`` is then as it
                was.
        """
        if problem := why_not(layer, CONV1D_CLASSES):
            raise ValueError(f"layer {problem}")
        weight: Tensor = layer.weight  # type: ignore[assignment]
        transpose_(weight)
        try:
            return cls._adopt(layer, config)
        except BaseException:
            transpose_(weight)
            raise

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}weight"] = destination[f"{prefix}weight"].t()

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        key = f"{prefix}weight"
        given = state_dict.get(key)
        if isinstance(given, Tensor):
            stored = (self.in_features, self.out_features)
            if given.shape != stored:
                *_, error_msgs = args
                error_msgs.append(f"{key} has shape {tuple(given.shape)}, must be {stored}: [K, N], as Conv1D keeps it")
                return
            state_dict = {**state_dict, key: given.t().contiguous()}
        super()._load_from_state_dict(state_dict, prefix, *args)


def is_conv1d(module: nn.Module) -> bool:
    """Whether a module is a linear layer that keeps its weight as ``[K, N]``."""
    return qualified_name(type(module)) in CONV1D_CLASSES


def transpose_(weight: Tensor) -> None:
    """Transpose a matrix, or a stack of matrices, and its gradient; the Parameter stays the same object."""
    grad, weight.grad = weight.grad, None
    weight.data = weight.data.mT.contiguous()
    weight.grad = None if grad is None else grad.mT.contiguous()
