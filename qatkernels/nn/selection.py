"""Which layers of a model `quantize_model` quantizes, which it skips, and why."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils import parametrize

from .bypassed import bypassed
from .config import QuantConfig
from .experts import Stack, stacks_of
from .packed_linear import Packed
from .quant_conv1d import is_conv1d
from .quant_embedding import check_config, for_embeddings, unlike_embedding
from .quant_linear import why_not
from .quantized import OFFLOADED, Quantized, is_offloaded

#: Patterns of layers that stay in full precision by default: output layers and task heads, as in the papers, adapters,
#: and the routers of experts. Output layers that :func:`heads` recognizes, and PEFT's adapters (:func:`adapters`), need
#: no pattern.
EXCLUDE = (
    "*embed*",
    "lm_head",
    "*_lm_head",
    "lm_head.*",
    "classifier",
    "*_classifier",
    "classifier.dense",
    "classifier.out_proj",
    "classification_head.*",
    "score",
    "qa_outputs",
    "seq_relationship",
    "logits_proj",
    "enc_score_head",
    "class_predictor",
    "itm_head",
    "pooler",
    "pooler.dense",
    "*lora_*",
    "router",
    "router.*",
    "shared_expert_gate",
)
ATTENTION = "belongs to nn.MultiheadAttention, which calls no layer (its in_proj_weight is not quantized either)"
#: Why an embedding is left where nothing asks for it.
NOT_ASKED = "embedding: in full precision unless asked for (embeddings=True)"
#: Parts of a name that wrappers add: those of PEFT and of torch.compile.
_WRAPPED = {"base_layer", "original_module", "_orig_mod"}
#: What could be quantized: a layer, or the stacked weights of experts.
Candidate = nn.Module | Stack


@dataclass(frozen=True)
class Left:
    """Why a layer or parameter stays in full precision.

    Attributes:
        reason: the rest of a sentence that begins with its name.
        asked: True if the caller left it out by a pattern, False if this library did.
        loud: whether it matched but cannot be quantized; a warning always says so.
        default: whether a pattern of `EXCLUDE` left it out.
    """

    reason: str
    asked: bool = False
    loud: bool = False
    default: bool = False


class Rules:
    """The patterns of one call, which map names to configurations.

    Raises:
        ValueError: if an argument is not what :func:`qatkernels.quantize_model` takes.
    """

    def __init__(
        self, config: object, include: str | Iterable[str] | None, exclude: str | Iterable[str],
        filter_fn: Callable[[nn.Module, str], bool] | None = None, embeddings: bool | QuantConfig = False,
    ) -> None:  # fmt: skip
        if filter_fn is not None and not callable(filter_fn):
            raise ValueError(f"filter_fn is {filter_fn!r}, must be a function of a module and its name, or None")
        if not isinstance(embeddings, bool | QuantConfig):
            raise ValueError(f"embeddings is {embeddings!r}, must be True, False or a QuantConfig")
        if isinstance(embeddings, QuantConfig):
            check_config(embeddings)
        self.filter_fn, self.embeddings = filter_fn, embeddings
        self.configs = _configs(config)
        self.include = None if include is None else _patterns("include", include)
        self.exclude, self.default = _patterns("exclude", exclude), exclude is EXCLUDE

    def wanted(self, names: list[str]) -> QuantConfig | Left:
        """Return the configuration for a layer of these names, or why there is none."""
        if self.include is not None and not matches(names, self.include):
            return Left("matches no pattern of include", asked=True)
        pattern = next((p for p in self.configs if matches(names, (p,))), None)
        if pattern is None:
            return Left("matches no pattern of config", asked=True)
        if (config := self.configs[pattern]) is None:
            return Left(f"has None as its configuration (of {pattern!r})", asked=True)
        for pattern in self.exclude:
            if matches(names, (pattern,)):
                what = "the default exclude" if self.default else "exclude"
                return Left(f"matches {pattern!r} of {what}", asked=not self.default, default=self.default)
        return config

    def wanted_embedding(self, names: list[str], of_tokens: bool) -> QuantConfig | Left:
        """Return the configuration for an embedding of these names, or why there is none.

        Args:
            names: its names.
            of_tokens: whether it is one that ``embeddings`` means.
        """
        exact = self._exact(names)
        if (exact is None or isinstance(exact, Left)) and self.embeddings is False:
            return Left(NOT_ASKED)
        if (left := self._own_exclude(names)) is not None:
            return left
        if exact is not None:
            return exact
        if not of_tokens:
            return Left("embedding, but not of tokens: name it in config to quantize it")
        if isinstance(self.embeddings, QuantConfig):
            return self.embeddings
        config = next((c for p, c in self.configs.items() if matches(names, (p,))), None)
        if config is None:
            return Left(
                "matches no configuration of config, from which embeddings=True would take its bits", asked=True
            )
        return for_embeddings(config)

    def wanted_twin(self, names: list[str], embedding: str, config: QuantConfig) -> QuantConfig | Left:
        """Return the configuration of a layer of these names that shares its weight with an embedding.

        Args:
            names: its names.
            embedding: the embedding's name.
            config: what the embedding is quantized to.

        Raises:
            ValueError: if the call names another configuration for the layer.
        """
        exact = self._exact(names)
        left = self._own_exclude(names) or (exact if isinstance(exact, Left) else None)
        if left is not None:
            return left
        if exact not in (None, config):
            raise ValueError(
                f"{names[0]} is to be quantized to {exact}, but shares its weight with {embedding}, which is to be "
                f"quantized to {config}: give both the same configuration, or exclude one of them"
            )
        return config

    def _exact(self, names: list[str]) -> QuantConfig | Left | None:
        """Return what the first pattern of config without a wildcard that matches says; None if there is none."""
        pattern = next((p for p in self.configs if not set(p) & set("*?[") and matches(names, (p,))), None)
        if pattern is None:
            return None
        return self.configs[pattern] or Left(f"has None as its configuration (of {pattern!r})", asked=True)

    def _own_exclude(self, names: list[str]) -> Left | None:
        """Return that the caller's own exclude matches; the default one does not concern what embeddings asks for."""
        pattern = None if self.default else next((p for p in self.exclude if matches(names, (p,))), None)
        return None if pattern is None else Left(f"matches {pattern!r} of exclude", asked=True)

    def insists(self, names: list[str]) -> bool:
        """Whether the call explicitly asks to quantize a layer of these names although it is an output layer."""
        given = (*(self.include or ()), *(p for p, c in self.configs.items() if c is not None))
        return not self.exclude or matches(names, (p for p in given if not set(p) & set("*?[")))

    def idle(self, names: Iterable[str]) -> list[str]:
        """Return the patterns of ``include`` and ``config`` that match none of these names."""
        names = list(names)
        given = (*(self.include or ()), *(p for p, c in self.configs.items() if c is not None))
        return [pattern for pattern in given if not matches(names, (pattern,))]


def _configs(config: object) -> dict[str, QuantConfig | None]:
    if isinstance(config, QuantConfig):
        return {"*": config}
    if not isinstance(config, Mapping) or not config:
        raise ValueError(f"config is {config!r}, must be a QuantConfig or a mapping of patterns to QuantConfig or None")
    for pattern, entry in config.items():
        if not isinstance(pattern, str) or not (entry is None or isinstance(entry, QuantConfig)):
            raise ValueError(f"config[{pattern!r}] is {entry!r}, must be a pattern's QuantConfig or None")
    return dict(config)


def _patterns(name: str, patterns: str | Iterable[str]) -> tuple[str, ...]:
    given = (patterns,) if isinstance(patterns, str) else tuple(patterns)
    if not all(isinstance(pattern, str) for pattern in given):
        raise ValueError(f"{name} is {patterns!r}, must be a pattern or several")
    return given


def matches(names: Iterable[str], patterns: Iterable[str]) -> bool:
    """Whether any pattern matches any name, or its end after a dot."""
    names = list(names)
    return any(fnmatchcase(n, p) or fnmatchcase(n, f"*.{p}") for p in patterns for n in names)


def names_of(model: nn.Module) -> dict[nn.Module, list[str]]:
    """Return every name of every module; modules inside wrappers and parametrizations also get the layer's name."""
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        layer = name.partition(".parametrizations.")[0]
        plain = ".".join(part for part in layer.split(".") if part not in _WRAPPED)
        names.setdefault(module, []).extend(dict.fromkeys((name, plain)))
    return names


def is_candidate(module: Candidate) -> bool:
    """Whether something is a layer, or a stack of experts, that could be quantized or is quantized already."""
    if isinstance(module, Stack):
        return True
    return (isinstance(module, nn.Linear | nn.Embedding | Quantized) and not isinstance(module, Packed)) or is_conv1d(
        module
    )


def candidates(model: nn.Module) -> dict[Candidate, list[str]]:
    """Return every name of each layer and each stack that could be quantized, or is quantized already."""
    found: dict[Candidate, list[str]] = {}
    for module, names in names_of(model).items():
        if is_candidate(module):
            found[module] = names
        for stack in stacks_of(module):
            found[stack] = [f"{name}.{stack.name}".lstrip(".") for name in names]
    return found


def choose(model: nn.Module, rules: Rules, requantize: bool = False) -> dict[Candidate, QuantConfig | Left]:
    """Decide about every candidate of a model.

    Raises:
        ValueError: if a layer has another configuration already and ``requantize`` is False.
    """
    names, kept, read = candidates(model), heads(model), bypassed(model)
    never, tables = adapters(model), _tables(model, names, rules)
    chosen: dict[Candidate, QuantConfig | Left] = {}
    for layer in names:
        found = tables[layer] if layer in tables else rules.wanted(names[layer])
        if isinstance(found, QuantConfig):
            owner = layer.module if isinstance(layer, Stack) else layer
            if rules.filter_fn is not None and not rules.filter_fn(owner, names[layer][0]):
                found = Left("is left out by filter_fn", asked=True)
            elif isinstance(layer, Stack):
                found = found if (reason := layer.why_not()) is None else Left(reason, loud=True)
            elif layer in never:
                found = Left(never[layer])
            elif layer in kept and layer not in tables and not rules.insists(names[layer]):
                found = Left(f"{kept[layer]}: name it in include, or give exclude=(), to quantize it all the same")
            elif layer in read:
                found = Left(read[layer])
            elif isinstance(layer, Quantized):
                _check_again(names[layer][0], layer, found, requantize)
            elif reason := _unable(layer):
                found = Left(reason, loud=True)
        chosen[layer] = found
    _keep_shared(model, names_of(model), chosen)
    return chosen


def _tables(
    model: nn.Module, names: Mapping[Candidate, list[str]], rules: Rules
) -> dict[Candidate, QuantConfig | Left]:  # fmt: skip
    """Decide about every embedding, and about the layers that share the weight of one that is, or will be, quantized.

    Both quantize to the same configuration, so that they also share scales.
    """
    found: dict[Candidate, QuantConfig | Left] = {}
    of_tokens = token_embeddings(model)
    shared: dict[int, tuple[str, QuantConfig | None]] = {}
    for layer, every in names.items():
        if not isinstance(layer, nn.Embedding):
            continue
        found[layer] = config = rules.wanted_embedding(every, layer in of_tokens)
        if isinstance(config, QuantConfig) and rules.filter_fn is not None and not rules.filter_fn(layer, every[0]):
            found[layer] = config = Left("is left out by filter_fn", asked=True)
        if isinstance(config, QuantConfig) and (isinstance(layer, Quantized) or unlike_embedding(layer) is None):
            shared.setdefault(id(layer._parameters.get("weight")), (every[0], config))
        elif isinstance(layer, Quantized):
            shared.setdefault(id(layer._parameters.get("weight")), (every[0], None))
    shared.pop(id(None), None)
    for layer, every in names.items():
        twin = None if isinstance(layer, Stack) else shared.get(id(layer._parameters.get("weight")))
        if twin is not None and twin[0] not in every:
            embedding, asked = twin
            found[layer] = (
                Left(f"shares its weight with the quantized embedding {embedding}: give embeddings to change both")
                if asked is None
                else rules.wanted_twin(every, embedding, asked)
            )
    return found


def token_embeddings(model: nn.Module) -> set[nn.Module]:
    """Return the embeddings that ``embeddings=True`` means.

    They are those that a module of the model names as its input embeddings (transformers' ``get_input_embeddings``),
    and every ``nn.Embedding`` if no module of the model has that method. So tables of positions stay as they are in
    transformers' models.
    """
    naming = [m for m in model.modules() if callable(getattr(type(m), "get_input_embeddings", None))]
    held: list[nn.Module] = [] if naming else [model]
    for module in naming:
        try:
            held.append(module.get_input_embeddings())  # type: ignore[operator]
        except (AttributeError, NotImplementedError):
            continue
    return {m for owner in held if owner is not None for m in owner.modules() if isinstance(m, nn.Embedding)}


def _check_again(name: str, layer: Quantized, config: QuantConfig, requantize: bool) -> None:
    if layer.config == config:
        return
    name = name or "the model"
    if not requantize:
        raise ValueError(
            f"{name} is quantized already, to {layer.config}, and config asks for {config}: give requantize=True to "
            "change it (its scales are set anew), or exclude it to keep it"
        )
    if is_offloaded(layer):
        raise ValueError(f"{name} cannot be quantized: {OFFLOADED.format('quantize')}")
    if config.group_size is not None and layer.in_features % config.group_size:
        raise ValueError(
            f"{name} cannot be quantized: group_size is {config.group_size}, must be a positive divisor of the input "
            f"features ({layer.in_features})"
        )


def _unable(layer: nn.Module) -> str | None:
    """Return why a layer that matched is skipped, or None. Faults of a layer of the right class raise later."""
    if isinstance(layer, nn.Embedding):
        return unlike_embedding(layer)
    if type(layer) is NonDynamicallyQuantizableLinear:
        return ATTENTION
    if is_conv1d(layer) or parametrize.is_parametrized(layer):
        return None
    reason = why_not(layer)
    return reason if reason is not None and reason.startswith("is a ") else None


def _keep_shared(
    model: nn.Module, names: Mapping[nn.Module, list[str]], chosen: dict[Candidate, QuantConfig | Left]
) -> None:
    """Skip a Conv1D or a stack whose weight another module uses: transposing it would change the other's output."""
    holders: dict[int, list[nn.Module]] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            holders.setdefault(id(parameter), []).append(module)
    for layer in [layer for layer, found in chosen.items() if isinstance(found, QuantConfig)]:
        if isinstance(layer, Stack):
            others = [m for m in holders[id(layer.weight)] if m is not layer.module]
        elif is_conv1d(layer) and (weight := layer._parameters.get("weight")) is not None:
            others = holders[id(weight)]
        else:
            continue
        for other in others:
            if isinstance(layer, Stack) or not (is_conv1d(other) and isinstance(chosen[other], QuantConfig)):
                chosen[layer] = Left(f"shares its weight with {names[other][0]}, which stays as it is", loud=True)


def heads(model: nn.Module) -> dict[nn.Module, str]:
    """Return the output layers of a model, each with the reason why it is one.

    A layer is an output layer if it shares its weight with an embedding, or if the model names it as its output
    embeddings (transformers' ``get_output_embeddings``).
    """
    found: dict[nn.Module, str] = {}
    embeddings: dict[int, str] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding | nn.EmbeddingBag):
            embeddings[id(module._parameters.get("weight"))] = name
    embeddings.pop(id(None), None)
    for module in model.modules():
        tied = embeddings.get(id(module._parameters.get("weight")))
        if tied is not None and is_candidate(module) and not isinstance(module, nn.Embedding):
            found[module] = f"is tied to the embedding {tied}"
        if callable(getattr(type(module), "get_output_embeddings", None)):
            try:
                head = module.get_output_embeddings()  # type: ignore[operator]
            except (AttributeError, NotImplementedError):
                continue
            for part in head.modules() if isinstance(head, nn.Module) else ():
                found.setdefault(part, f"makes the logits ({type(module).__name__}.get_output_embeddings)")
    return found


def adapters(model: nn.Module) -> dict[nn.Module, str]:
    """Return the modules that PEFT added to a model, and why they are not quantized.

    A layer of PEFT holds the model's own layer (`base_layer`, or `original_module`) beside its adapters. Any other
    module of PEFT is an adapter as a whole, except the wrapper of the model.
    """
    found: dict[nn.Module, str] = {}
    for module in model.modules():
        of_peft = {c.__name__ for c in type(module).__mro__ if c.__module__.split(".")[0] == "peft"}
        if not of_peft or of_peft & {"BaseTuner", "PeftModel", "PeftMixedModel"}:
            continue
        own: Iterable[nn.Module] = [module]
        if of_peft & {"BaseTunerLayer", "AuxiliaryTrainingWrapper"}:
            own = [m for n, m in module.named_children() if n not in ("base_layer", "original_module")]
        for part in (p for m in own for p in m.modules()):
            found[part] = f"belongs to an adapter (PEFT's {type(module).__name__})"
    return found


def check_uncompiled(model: nn.Module, chosen: Mapping[Candidate, QuantConfig | Left]) -> None:
    """Refuse single layers wrapped by `torch.compile`, because the wrapper keeps calling the old layer.

    A compiled model looks up its layers at every call, and is recompiled.

    Raises:
        ValueError: naming a layer.
    """
    frame = sys.modules.get("torch._dynamo.eval_frame")
    if frame is None:
        return
    for name, module in model.named_modules():
        if isinstance(module, frame.OptimizedModule):
            inside: list[Candidate] = [module._orig_mod, *stacks_of(module._orig_mod)]
            wanted = any(isinstance(chosen.get(layer), QuantConfig) for layer in inside)
            if wanted and not isinstance(module._orig_mod, Quantized):
                raise ValueError(
                    f"{name or 'the model'} cannot be quantized: it has been compiled (torch.compile), which would "
                    "bypass quantization: quantize before compiling"
                )
