"""Turn the linear layers of a model into quantized ones, in place."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatchcase

from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils import parametrize

from .config import QuantConfig
from .quant_linear import QuantLinear, why_not
from .quantized import Quantized

logger = logging.getLogger(__name__)

#: Left in full precision by default, as in the papers. Embeddings and norms are no nn.Linear to begin with.
EXCLUDE = ("lm_head", "*embed*")


def quantize_model(
    model: nn.Module,
    config: QuantConfig | Mapping[str, QuantConfig | None],
    *,
    include: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] = EXCLUDE,
) -> nn.Module:
    """Replace every ``nn.Linear`` of a model by a :class:`QuantLinear` with the same parameters.

    Patterns are those of ``fnmatch``; one matches a layer if it matches its full name or the end of it after a dot, so
    ``"lm_head"`` matches ``"model.lm_head"`` and ``"mlp.*"`` matches ``"layers.3.mlp.up"``.

    Layers that are the same object stay one object, and are excluded if any of their names is. Layers that share a
    weight go on sharing it, and with equal configurations share the scales; an embedding tied to a layer is not
    touched. Layers that are quantized already stay as they are. A warning names what matched but stays in full
    precision: subclasses of ``nn.Linear``, ``nn.MultiheadAttention`` (which never calls its projections), and stacked
    weights of experts ``[E, N, K]``, for which a pattern may match the parameter or its module
    (:class:`GroupedQuantLinear` takes them, where the module's forward can call it). ``nn.TransformerEncoder`` loses
    its fused inference path, which would bypass quantization.

    Args:
        model: the model; changed in place.
        config: what to quantize to, or a mapping from patterns to it: the first pattern that matches decides, None and
            no match at all leave a layer in full precision.
        include: patterns of the layers to quantize, all if None.
        exclude: patterns of layers to leave in full precision; wins over ``include`` and ``config``.

    Returns:
        ``model``, or the new layer if the model itself is an ``nn.Linear``. :func:`quantized_modules` lists what is
        quantized, and the logger ``qatkernels.nn.quantize_model`` tells each replacement at level INFO.

    Raises:
        ValueError: if nothing matches, a pattern of ``include`` or of ``config`` matches no layer, or a layer cannot be
            quantized (parametrized, weight-normalized, sharded, compiled, a group size that does not divide its
            features). The model is then unchanged.
    """
    rules = _rules(config)
    included, excluded = _patterns("include", include), _patterns("exclude", exclude)
    names = _linear_names(model)

    def wanted(aliases: list[str]) -> QuantConfig | None:
        if _matches(aliases, excluded) or not (include is None or _matches(aliases, included)):
            return None
        return next((c for pattern, c in rules.items() if _matches(aliases, (pattern,))), None)

    chosen = {linear: found for linear, aliases in names.items() if (found := wanted(aliases)) is not None}
    stacked = _stacked(model, wanted)
    patterns = (*included, *(p for p, c in rules.items() if c is not None))
    _check_patterns(names, patterns, excluded, bool(chosen), stacked)

    kept = {linear: _full_precision(linear) for linear in chosen}
    replacements = {
        linear: _replacement(names[linear][0], linear, wanted)
        for linear, wanted in chosen.items()
        if kept[linear] is None and not isinstance(linear, QuantLinear)
    }
    if not replacements and any(kept.values()):
        raise ValueError("nothing can be quantized: " + "; ".join(_reasons(names, kept)))
    _share_scales(replacements.values())
    _swap(model, replacements)
    _leave_fast_path(model)
    for linear, new in replacements.items():
        logger.info("quantized %s: %s", names[linear][0] or "the model", new.config)
    if notes := [*_reasons(names, kept), *stacked]:
        warnings.warn("left in full precision: " + "; ".join(notes), stacklevel=2)
    return replacements.get(model, model)  # type: ignore[call-overload]


def quantized_modules(model: nn.Module) -> dict[str, Quantized]:
    """Return the quantized layers of a model by name, those of experts too; one registered twice appears once."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Quantized)}


def quantized_weights(model: nn.Module) -> list[Tensor]:
    """Return the master weights of the quantized layers, each once even where layers share it."""
    return list(dict.fromkeys(module.weight for module in quantized_modules(model).values()))


def _rules(config: object) -> dict[str, QuantConfig | None]:
    if isinstance(config, QuantConfig):
        return {"*": config}
    if not isinstance(config, Mapping) or not config:
        raise ValueError(f"config is {config!r}, must be a QuantConfig or a mapping of patterns to QuantConfig or None")
    for pattern, entry in config.items():
        if not isinstance(pattern, str) or not (entry is None or isinstance(entry, QuantConfig)):
            raise ValueError(f"config[{pattern!r}] is {entry!r}, must be a pattern's QuantConfig or None")
    return dict(config)


def _patterns(name: str, patterns: str | Iterable[str] | None) -> tuple[str, ...]:
    given = (patterns,) if isinstance(patterns, str) else tuple(patterns or ())
    if not all(isinstance(pattern, str) for pattern in given):
        raise ValueError(f"{name} is {patterns!r}, must be a pattern or several")
    return given


def _matches(names: Iterable[str], patterns: Iterable[str]) -> bool:
    """Whether any pattern matches any name, or its end after a dot."""
    return any(fnmatchcase(n, p) or fnmatchcase(n, f"*.{p}") for n in names for p in patterns)


def _linear_names(model: nn.Module) -> dict[nn.Linear, list[str]]:
    """Return every name of every linear layer, subclasses included."""
    names: dict[nn.Linear, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, nn.Linear):
            names.setdefault(module, []).append(name)
    return names


def _check_patterns(
    names: dict[nn.Linear, list[str]], wanted: tuple[str, ...], excluded: tuple[str, ...], found: bool,
    stacked: list[str],
) -> None:  # fmt: skip
    """Raise ValueError if nothing is to be quantized, or a wanted pattern matches no layer."""
    every = [name for aliases in names.values() for name in aliases]
    also = "".join(f"; {note}" for note in stacked)
    if not every:
        raise ValueError(f"the model has no nn.Linear{also}")
    idle = [pattern for pattern in wanted if not _matches(every, (pattern,))]
    if found and not idle:
        return
    what = f"{idle}" if idle else f"{list(wanted)} and is not in {list(excluded)}"
    raise ValueError(f"no nn.Linear matches {what}; the model has {_listed(every, 20)}{also}")


def _listed(names: list[str], limit: int) -> str:
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def _replacement(name: str, linear: nn.Linear, config: QuantConfig) -> QuantLinear:
    try:
        return QuantLinear.from_linear(linear, config)
    except ValueError as error:
        raise ValueError(f"{name or 'the model'} cannot be quantized: {error}") from error


def _full_precision(linear: nn.Linear) -> str | None:
    """Return why a layer is left alone although it matched, or None if it is not."""
    if type(linear) is NonDynamicallyQuantizableLinear:
        return "belongs to nn.MultiheadAttention, which calls no layer (its in_proj_weight is not quantized either)"
    if type(linear) is nn.Linear or isinstance(linear, QuantLinear) or parametrize.is_parametrized(linear):
        return None
    return why_not(linear)


def _reasons(names: dict[nn.Linear, list[str]], kept: dict[nn.Linear, str | None]) -> list[str]:
    """Return each reason once, after the layers that it is for."""
    layers: dict[str, list[str]] = {}
    for linear, reason in kept.items():
        if reason is not None:
            layers.setdefault(reason, []).append(names[linear][0] or "the model")
    return [f"{_listed(every, 5)} {reason}" for reason, every in layers.items()]


def _stacked(model: nn.Module, wanted: Callable[[list[str]], QuantConfig | None]) -> list[str]:
    """Describe parameters outside torch.nn that look like the stacked weights of experts and should be quantized."""
    return [
        f"{name} has shape {tuple(parameter.shape)} and no nn.Linear (experts? see GroupedQuantLinear.from_stacked)"
        for prefix, module in model.named_modules()
        if not type(module).__module__.startswith("torch.nn.") and not isinstance(module, Quantized)
        for name, parameter in module.named_parameters(prefix, recurse=False)
        if parameter.ndim == 3 and parameter.shape[0] > 1 and wanted([prefix, name]) is not None
    ]


def _share_scales(modules: Iterable[QuantLinear]) -> None:
    """Give layers that share a weight and a configuration the same scales: it is one quantized weight."""
    first: dict[tuple[int, QuantConfig], QuantLinear] = {}
    for module in modules:
        twin = first.setdefault((id(module.weight), module.config), module)
        module.scale, module.zero_point = twin.scale, twin.zero_point


def _swap(model: nn.Module, replacements: dict[nn.Linear, QuantLinear]) -> None:
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if isinstance(child, nn.Linear) and child in replacements:
                parent._modules[name] = replacements[child]


def _leave_fast_path(model: nn.Module) -> None:
    """Keep torch's encoder from its fused inference path, which reads the weights and would bypass quantization."""
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder) and quantized_modules(module):
            module.use_nested_tensor = False
        elif isinstance(module, nn.TransformerEncoderLayer) and quantized_modules(module):
            module.activation_relu_or_gelu = 0
