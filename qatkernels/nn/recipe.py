"""Which layers of a model are quantized, and how, as plain data from which an equal model is made again."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..dtypes import dtype_name
from .activation import learned_acts
from .config import QuantConfig
from .experts import placed_in, save_as_layers
from .packed_linear import Packed, PackedEmbedding, PackedLinear
from .quant_embedding import QuantEmbedding
from .quant_linear import QuantLinear
from .quantized import Quantized
from .ties import declare_ties

#: Groups of layers: ``{"config": QuantConfig.to_dict(), "packed": dtype of scales or None, "layers": names}``.
Recipe = list[dict[str, Any]]
#: What transformers calls the quantization of this library, in ``config.json``.
METHOD = "qatkernels"


class SavedQuantization(dict[str, Any]):
    """What ``config.json`` says of a model's quantization: a dict that answers like a configuration of transformers."""

    def to_dict(self) -> dict[str, Any]:
        """Return a plain dict."""
        return dict(self)

    @property
    def quant_method(self) -> str:
        """The name of this library's quantization."""
        return METHOD


def recipe_of(model: nn.Module) -> Recipe:
    """Return how the layers of a model are quantized or packed; layers of one kind are one group.

    Stacks of experts that the model's own code makes are not in it.
    """
    groups: dict[tuple[QuantConfig, str | None], list[str]] = {}
    experts = set(placed_in(model).values())
    for name, module in model.named_modules():
        if isinstance(module, QuantLinear | QuantEmbedding) or (isinstance(module, Quantized) and module in experts):
            groups.setdefault((module.config, None), []).append(name)
        elif isinstance(module, PackedLinear | PackedEmbedding) or (isinstance(module, Packed) and module in experts):
            scale_dtype = dtype_name(module.weight.scale.dtype)
            groups.setdefault((_config_of(module), scale_dtype), []).append(name)
    return [
        {"config": config.to_dict(), "packed": packed, "layers": names} for (config, packed), names in groups.items()
    ]


def describe(model: nn.Module) -> None:
    """Write into a transformers model's configuration how the model is quantized now; do nothing to any other model.

    ``save_pretrained`` then writes it beside the weights. Without it ``from_pretrained`` would build a model in full
    precision, and draw anew what it does not find there.
    """
    config: Any = getattr(model, "config", None)
    if hasattr(config, "to_diff_dict") and hasattr(model, "save_pretrained"):
        save_as_layers(model)
        declare_ties(model)
        config.quantization_config = SavedQuantization(quant_method=METHOD, recipe=recipe_of(model))


def _config_of(layer: Packed) -> QuantConfig:
    """Return a configuration of which a packed layer can be made."""
    weight, learned = layer.weight, learned_acts(layer)
    group_size = None if weight.scale.shape[-1] == 1 else weight.group_size
    settings: dict[str, Any] = {"act_bits": layer.act_bits}
    for name, act in (("act", layer.act), ("out_act", layer.out_act)):
        if act is not None and name not in learned:
            raise ValueError(f"a packed layer has {type(act).__name__} as {name}, which no configuration describes")
    if (act := learned.get("act")) is not None:
        signed = act.grid.scheme == "lsq"
        scheme = "lsq" if act.zero_point is None else "lsq+"
        settings = {"act_bits": int(act.grid.bits), "act_scheme": scheme, "act_signed": signed or scheme == "lsq+"}
    if (out_act := learned.get("out_act")) is not None:
        settings["out_bits"] = int(out_act.grid.bits)
    return QuantConfig(weight.grid.bits, weight.grid.scheme, group_size, **settings)
