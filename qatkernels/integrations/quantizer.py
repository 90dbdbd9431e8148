"""A quantizer of transformers: ``from_pretrained`` and ``save_pretrained`` of quantized and packed models.

    from qatkernels.integrations.transformers import QatConfig
    model = AutoModelForCausalLM.from_pretrained(path, quantization_config=QatConfig(bits=2))   # quantized, to train
    model.save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)                                        # the same logits

Importing this module registers it. A folder whose ``config.json`` says ``"quant_method": "qatkernels"`` needs that
import. Without it transformers only warns ("Unknown quantization type, got qatkernels"), builds the model in full
precision, and reports the layers that it could not fill.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..extras import missing

try:
    from transformers.core_model_loading import Transpose, WeightConverter, WeightRenaming
    from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
    from transformers.utils.quantization_config import QuantizationConfigMixin
except ImportError as error:
    raise missing("qatkernels.integrations.quantizer", "hf", error) from error

from ..nn import QuantConfig, QuantConv1D, quantize_model, quantized_modules
from ..nn._follow_recipe import follow
from ..nn.activation import learned_acts
from ..nn.experts import makes, placed_in
from ..nn.quantizer import scales_come_later
from ..nn.recipe import METHOD, Recipe, describe
from ..nn.selection import EXCLUDE
from ..nn.ties import groups_that_share, join, part, tie_parameters


@register_quantization_config(METHOD)
class QatConfig(QuantizationConfigMixin):
    """What ``from_pretrained`` quantizes a model to, and what ``config.json`` says of a quantized one.

    Args:
        config: what to quantize to: a :class:`qatkernels.QuantConfig`, or a mapping from patterns to them, as
            :func:`qatkernels.quantize_model` takes; None if ``settings`` say it.
        include: patterns of the layers to quantize; all if None.
        exclude: patterns of layers to leave in full precision.
        embeddings: whether, and to what, embeddings and the heads that are tied to them are quantized.
        recipe: which layers of a saved model are quantized, and how. Only saved configurations have one; it replaces
            everything above.
        **settings: the fields of a QuantConfig, in place of ``config``: ``QatConfig(bits=2, group_size=64)``.

    Raises:
        ValueError: if a setting is unknown or cannot be used, or both ``config`` and settings are given.
    """

    def __init__(
        self,
        config: QuantConfig | Mapping[str, QuantConfig | None] | None = None,
        *,
        include: str | list[str] | None = None,
        exclude: str | list[str] | tuple[str, ...] = EXCLUDE,
        embeddings: bool | QuantConfig = False,
        recipe: Recipe | None = None,
        quant_method: str = METHOD,
        **settings: Any,
    ) -> None:
        if config is not None and settings:
            raise ValueError(f"config and the settings {sorted(settings)} are given, give one of them")
        self.quant_method = quant_method  # type: ignore[assignment]  # transformers lists its own there
        self.config = QuantConfig.from_dict(settings) if config is None else config
        self.include, self.exclude, self.recipe = include, exclude, recipe
        self.embeddings = embeddings

    def to_dict(self) -> dict[str, Any]:
        """Return what ``config.json`` holds: the layers of a model that exists, otherwise the request."""
        if self.recipe is not None:
            return {"quant_method": self.quant_method, "recipe": self.recipe}
        config = self.config
        patterns = (
            config.to_dict()
            if isinstance(config, QuantConfig)
            else {pattern: found and found.to_dict() for pattern, found in config.items()}
        )
        tables = self.embeddings.to_dict() if isinstance(self.embeddings, QuantConfig) else self.embeddings
        return {
            "quant_method": self.quant_method, "config": patterns, "include": self.include, "exclude": self.exclude,
            "embeddings": tables,
        }  # fmt: skip

    def __repr__(self) -> str:
        """Return the class and what it holds."""
        return f"QatConfig({self.to_dict()})"


@register_quantizer(METHOD)
class QatQuantizer(HfQuantizer):
    """Quantizes a model while ``from_pretrained`` loads it; transformers makes it from a :class:`QatConfig`."""

    requires_calibration = False

    quantization_config: QatConfig
    _added: Sequence[Any] = ()
    _shared: Sequence[list[Any]] = ()

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> nn.Module:
        config = self.quantization_config
        tie_parameters(model)
        if config.recipe is not None:
            follow(model, config.recipe).eval()
            self._part(model)
            return model
        before = model.state_dict().keys()
        with scales_come_later():  # they are set when the weights are there
            quantize_model(
                model, config.config, include=config.include, exclude=config.exclude, embeddings=config.embeddings
            )
        # from_pretrained does this after loading, when scales that no file has are still undefined; a layer that leaves
        # training mode then would warn of scales that are too small.
        model.eval()
        # What quantization adds is set after loading; transformers need not report it as missing from the files.
        added = [f"^{re.escape(name)}$" for name in model.state_dict().keys() - before]
        model._keys_to_ignore_on_load_missing = {*(model._keys_to_ignore_on_load_missing or ()), *added}
        self._shared = groups_that_share(model)
        return model

    def _part(self, model: Any) -> None:
        """Part what layers share until their tensors are set: files have these once, and loading draws the others."""
        self._shared = groups_that_share(model)
        names = {module: name for name, module in model.named_modules()}
        ignored = set()
        for group in self._shared:
            part(group)
            for layer in group[1:]:
                vars(layer)["_is_hf_initialized"] = True  # so that nothing is drawn
                ignored.add(rf"^{re.escape(names[layer])}\.(?:weight|scale|zero_point)")
        model._keys_to_ignore_on_load_missing = {*(model._keys_to_ignore_on_load_missing or ()), *ignored}

    def update_weight_conversions(self, weight_conversions: list[Any], model: nn.Module) -> list[Any]:
        """Add what makes the weights of layers out of files in which they are stored in another way.

        Conv1Ds are stored as ``[K, N]``. Stacks of experts are stored in the order of their model, most of them expert
        by expert. Folders that a quantized model was saved to have stacks as they are in memory.
        """
        updated: list[Any] = super().update_weight_conversions(weight_conversions, model)
        names, base = placed_in(model), str(model.base_model_prefix)
        added: list[Any] = [
            WeightConverter([_anywhere(f"{name}.weight", base)], [_below(f"{name}.weight", base)], [Transpose()])
            for name, m in model.named_modules()
            if isinstance(m, QuantConv1D)
        ]
        if self.quantization_config.recipe is None:
            for name in names:
                transposed = bool(model.get_submodule(name.rpartition(".")[0]).is_transposed)
                added += _into_layer(name, transposed, updated, base)
        else:
            updated = [c for c in updated if not any(makes(c, name) for name in names)]
        self._added = added
        return added + updated

    @torch.no_grad()
    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> nn.Module:
        # Saving would apply the conversions in reverse, but a QuantConv1D's state dict has [K, N] already.
        loaded_by = getattr(model, "_weight_conversions", None) or []
        model._weight_conversions = [c for c in loaded_by if c not in self._added]
        for group in self._shared:
            join(group)
        if self.quantization_config.recipe is None:  # the weights are there, scales of theirs are not
            for layer in quantized_modules(model).values():
                layer.reset_scale()
                for act in learned_acts(layer).values():
                    act.reset_parameters()
        else:  # the scales are those of the files
            for layer in quantized_modules(model).values():
                layer.awaits_inputs = False
        describe(model)
        return model

    def is_serializable(self) -> bool:
        """Return True: saved models load again."""
        return True

    @property
    def is_trainable(self) -> bool:
        """True: quantized layers train, and adapters over packed ones."""
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """Whether the weights themselves train: those of quantized layers do, packed ones do not."""
        recipe = self.quantization_config.recipe
        return recipe is None or all(group["packed"] is None for group in recipe)

    @property
    def is_compileable(self) -> bool:
        """True: ``generate`` may compile the forward."""
        return True


def _into_layer(name: str, transposed: bool, conversions: list[Any], base: str) -> list[Any]:
    """Return conversions that make the weight and the bias of a layer out of what files have in place of a stack.

    Args:
        name: name of the layer, which is the stack's.
        transposed: whether the model keeps the stack as ``[E, K, N]``.
        conversions: those of the model, some of which may make the stack out of single experts.
        base: the prefix that names in a file may lack.
    """
    turn: list[Any] = [Transpose(1, 2)] if transposed else []
    weight = _below(f"{name}.weight", base)
    added: list[Any] = []
    for conversion in conversions:
        if not makes(conversion, name) or len(conversion.target_patterns) != 1:
            continue
        prefix = name.removesuffix(conversion.target_patterns[0])
        sources = [_anywhere(prefix, base) + source for source in conversion._original_source_patterns]
        added.append(conversion.copy(sources, [weight], operations=[*conversion.operations, *turn]))
    stored = f"{_anywhere(name, base)}$"
    added.append(WeightConverter([stored], [weight], turn) if turn else WeightRenaming([stored], [weight]))
    added.append(WeightRenaming([f"{_anywhere(f'{name}_bias', base)}$"], [_below(f"{name}.bias", base)]))
    return added


def _below(name: str, base: str) -> str:
    """Return a name without the prefix of the base model, which transformers adds where the model has it."""
    return name.removeprefix(f"{base}.")


def _anywhere(name: str, base: str) -> str:
    """Return a pattern of a name that begins with the prefix of the base model or lacks it."""
    return rf"^(?:{re.escape(base)}\.)?{re.escape(_below(name, base))}"
