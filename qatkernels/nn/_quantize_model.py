"""Turn the linear layers of a model into quantized ones, in place."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterable, Mapping

from torch import Tensor, nn

from .config import QuantConfig
from .experts import Stack
from .quant_conv1d import QuantConv1D, is_conv1d, transpose_
from .quant_embedding import QuantEmbedding
from .quant_linear import QuantLinear
from .quantized import Quantized
from .recipe import describe
from .replaced import remember
from .report import Survey, listed, survey
from .selection import EXCLUDE, NOT_ASKED, Candidate, Left, Rules, candidates, check_uncompiled, choose, matches
from .wrapped import check_unwrapped

logger = logging.getLogger("qatkernels.nn.quantize_model")  # what docs/quantize-model.md names


def quantize_model(
    model: nn.Module,
    config: QuantConfig | Mapping[str, QuantConfig | None],
    *,
    include: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] = EXCLUDE,
    filter_fn: Callable[[nn.Module, str], bool] | None = None,
    embeddings: bool | QuantConfig = False,
    requantize: bool = False,
    warn_below: float = 0.5,
) -> nn.Module:
    """Replace the linear layers of a model, in place, by quantized ones with the same parameters.

    Quantized are ``nn.Linear``, classes that compute exactly the same (`LINEAR_CLASSES`), transformers' ``Conv1D``
    (:class:`QuantConv1D`), and the stacked experts of transformers' mixtures (:class:`GroupedQuantLinear`, which takes
    the place of the Parameter ``experts.gate_up_proj``, say, under the same name). Embeddings are quantized only where
    the call asks for it (``embeddings``). Everything else stays in full precision: convolutions, recurrent layers, the
    routers of mixtures, other subclasses of ``nn.Linear`` and ``nn.Embedding``,
    ``nn.MultiheadAttention`` (which never calls its projections), layers whose weight the model reads itself (Mamba's
    ``dt_proj``), and parameters that a module multiplies by itself, such as the experts of other models.

    The logger ``qatkernels.nn.quantize_model`` lists at level INFO each layer that is quantized, and then what is left
    in full precision, why, and the shares. :func:`quantization_report` gives the same table at any time. A warning
    appears if less than half of the parameters is quantized (``warn_below``), or if a layer or a stack of experts
    matched and could not be quantized. Layers that the caller left out (by ``include``, ``config``, or an ``exclude``
    of their own) do not count for the warning: to silence it, exclude what is left on purpose.

    Patterns are those of ``fnmatch``; one matches a layer if it matches its full name or the end of it after a dot, so
    ``"lm_head"`` matches ``"model.lm_head"`` and ``"mlp.*"`` matches ``"layers.3.mlp.up"``. A layer inside
    an adapter (``"q_proj.base_layer"``) is also matched by its former name (``"q_proj"``).

    Output layers stay in full precision whatever their name: those tied to an embedding, and those that the model
    names (transformers' ``get_output_embeddings``), except where the embedding is quantized that one is tied to. To
    quantize another one, match it by a pattern of ``include`` or ``config``
    without a wildcard, or give ``exclude=()``. Adapters of PEFT are never quantized; the layers under them are.

    Layers that are the same object stay one object, and are excluded if any of their names is. Layers that share a
    weight keep sharing it, and share scales if their configurations are equal. ``nn.TransformerEncoder`` loses its
    fused inference path, which would bypass quantization.

    Args:
        model: the model; changed in place. Quantize it before DDP, FSDP or a compiled layer wraps it.
        config: what to quantize to, or a mapping from patterns to it: the first pattern that matches decides, None and
            no match at all leave a layer in full precision.
        include: patterns of the layers to quantize, all if None.
        exclude: patterns of layers to leave in full precision; wins over ``include`` and ``config``.
        filter_fn: a function of a module and its full name, as torchao's ``quantize_`` takes it, which says whether to
            quantize the layer. It is asked about the layers that the patterns select. Of a stack of experts it gets the
            module that holds the stack, and the name of the stack. None for no such function.
        embeddings: True quantizes embeddings of tokens (:class:`QuantEmbedding`), to what ``config`` says of their
            names, but at least 4 bits, and without ``act_bits`` and ``out_bits``; a QuantConfig quantizes them to that.
            Either way an output layer that is tied to one is quantized with it, to the same configuration, and shares
            its scales. Meant are the embeddings that the model names (transformers' ``get_input_embeddings``), or all
            of a model that names none. A pattern of ``config`` without a wildcard that matches an embedding quantizes
            it too, at any bits. An ``exclude`` of your own and ``filter_fn`` apply to them; ``include`` and the default
            ``exclude`` do not.
        requantize: whether a layer that is quantized already, to another configuration, gets the new one
            (:meth:`Quantized.requantize`); an error if False. One that has the configuration already stays as it is.
        warn_below: share of the parameters below which a warning says what is left; 0 for no such warning.

    Returns:
        ``model``, or the new layer if the model itself is a linear layer. :func:`quantized_modules` lists what is
        quantized.

    Raises:
        ValueError: if nothing matches, a pattern of ``include`` or of ``config`` matches no layer, the model is wrapped
            in DDP or FSDP already, a layer is quantized to another configuration already, or a layer cannot be
            quantized (parametrized, weight-normalized, sharded, compiled, a group size that does not divide its
            features). The model is then unchanged.
    """
    if not isinstance(warn_below, int | float) or not 0 <= warn_below <= 1:
        raise ValueError(f"warn_below is {warn_below!r}, must be a share from 0 to 1")
    check_unwrapped(model)
    rules = Rules(config, include, exclude, filter_fn, embeddings)
    chosen = choose(model, rules, requantize)
    wanted = {layer: found for layer, found in chosen.items() if isinstance(found, QuantConfig)}
    _check_found(model, rules, chosen, bool(wanted))
    check_uncompiled(model, chosen)
    model = quantize_layers(model, wanted)
    if said := _said(survey(model, rules, chosen), warn_below):
        warnings.warn(said, stacklevel=2)
    return model


def quantize_layers(model: nn.Module, wanted: Mapping[Candidate, QuantConfig]) -> nn.Module:
    """Replace or requantize layers and stacks of a model, in place.

    Returns:
        The model, or the new layer if the model itself is a layer.

    Raises:
        ValueError: if one of them cannot be quantized. The model is then unchanged.
    """
    names = {layer: every[0] or "the model" for layer, every in candidates(model).items()}
    replacements = _replacements(names, {m: c for m, c in wanted.items() if not isinstance(m, Quantized)})
    changed = [m for m, c in wanted.items() if isinstance(m, Quantized) and (m.config != c or m.misfit())]
    for old in changed:
        old._requantize(wanted[old])
    _swap(model, replacements)
    model = replacements.get(model, model)
    _share_scales(model, {*replacements.values(), *changed})
    _leave_fast_path(model)
    remember(model)
    for layer, found in wanted.items():
        if layer in replacements or layer in changed:
            logger.info("quantized %s: %s", names[layer], found)
    describe(model)
    return model


def quantized_modules(model: nn.Module) -> dict[str, Quantized]:
    """Return the quantized layers of a model by name, those of experts too; one registered twice appears once."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Quantized)}


def quantized_weights(model: nn.Module) -> list[Tensor]:
    """Return the master weights of the quantized layers, each once even where layers share it."""
    return list(dict.fromkeys(module.weight for module in quantized_modules(model).values()))


def _check_found(
    model: nn.Module, rules: Rules, chosen: Mapping[Candidate, QuantConfig | Left], found: bool
) -> None:  # fmt: skip
    """Raise ValueError if nothing is to be quantized, or a pattern that asks for layers matches none."""
    names = candidates(model)
    unasked = [layer for layer, left in chosen.items() if isinstance(left, Left) and left.reason == NOT_ASKED]
    every = [name for layer in chosen if layer not in unasked for name in names[layer]]
    idle = rules.idle(every) if every else []
    if found and not idle:
        return
    described = survey(model, rules, chosen)
    stacks = [row for row in described.report.rows if row.name in described.loud and not _is_layer(row.name, every)]
    also = "".join(f"; {row.name} {row.reason}" for row in stacks)
    if not every:
        rows = described.report.lines((r for r in described.report.rows if r not in stacks), limit=4)
        raise ValueError("\n".join((f"the model has no nn.Linear or Conv1D that could be quantized{also}", *rows)))
    if idle:
        if tables := [names[layer][0] for layer in unasked if matches(names[layer], idle)]:
            also += f" ({listed(tables, 3)}: give embeddings=True to quantize embeddings)"
        raise ValueError(f"no nn.Linear matches {idle}; the model has {listed(list(dict.fromkeys(every)), 20)}{also}")
    reasons: dict[str, list[str]] = {}
    for layer, left in chosen.items():
        if isinstance(left, Left) and layer not in unasked:
            reasons.setdefault(left.reason, []).append(names[layer][0] or "the model")
    told = "; ".join(f"{listed(layers, 5)} {reason}" for reason, layers in reasons.items())
    if any(isinstance(left, Left) and left.default for left in chosen.values()):
        also += " (give an exclude of your own to change the default)"
    raise ValueError(f"nothing can be quantized: {told}{also}")


def _is_layer(parameter: str, layers: list[str]) -> bool:
    return parameter.rpartition(".")[0] in layers


def _replacements(
    names: Mapping[Candidate, str], wanted: Mapping[Candidate, QuantConfig]
) -> dict[Candidate, Quantized]:
    """Return the quantized form of each layer. On an error the layers are left unchanged."""
    replacements: dict[Candidate, Quantized] = {}
    transposed: dict[int, Tensor] = {}
    try:
        for layer, config in wanted.items():
            try:
                if isinstance(layer, Stack):
                    replacements[layer] = layer.quantized(config)
                elif isinstance(layer, nn.Embedding):
                    replacements[layer] = QuantEmbedding.from_embedding(layer, config)
                elif not is_conv1d(layer):
                    replacements[layer] = QuantLinear.from_linear(layer, config)  # type: ignore[arg-type]
                elif (weight := layer._parameters.get("weight")) is not None and id(weight) in transposed:
                    replacements[layer] = QuantConv1D._adopt(layer, config)  # its weight is another layer's, too
                else:
                    replacements[layer] = QuantConv1D.from_conv1d(layer, config)
                    transposed[id(weight)] = replacements[layer].weight
            except ValueError as error:
                raise ValueError(f"{names[layer]} cannot be quantized: {error}") from error
    except BaseException:
        for parameter in transposed.values():
            transpose_(parameter)
        for layer in replacements:
            if isinstance(layer, Stack):
                layer.restore()
        raise
    return replacements


def _share_scales(model: nn.Module, new: set[nn.Module]) -> None:
    """Give layers that share a weight and a configuration the same scales, as they have one quantized weight."""
    layers = [module for module in model.modules() if isinstance(module, QuantLinear | QuantEmbedding)]
    first: dict[tuple[int, QuantConfig], Quantized] = {}
    for module in sorted(layers, key=lambda module: module in new):
        twin = first.setdefault((id(module.weight), module.config), module)
        if module in new:
            module.scale, module.zero_point = twin.scale, twin.zero_point


def _swap(model: nn.Module, replacements: Mapping[Candidate, nn.Module]) -> None:
    for layer, new in replacements.items():
        if isinstance(layer, Stack):
            layer.put(new)
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child is None or child not in replacements:
                continue
            parent._modules[name] = new = replacements[child]
            # PEFT's flag for a base weight stored as [K, N]. Left True, merging would transpose the adapter's update.
            if isinstance(new, QuantConv1D) and parent.__dict__.get("fan_in_fan_out") is True:
                parent.__dict__["fan_in_fan_out"] = False


def _leave_fast_path(model: nn.Module) -> None:
    """Keep torch's encoder from its fused inference path, which reads the weights and would bypass quantization."""
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder) and quantized_modules(module):
            module.use_nested_tensor = False
        elif isinstance(module, nn.TransformerEncoderLayer) and quantized_modules(module):
            module.activation_relu_or_gelu = 0


def _said(described: Survey, warn_below: float) -> str | None:
    """Log what is quantized in a model, and return the text of the warning, or None."""
    report, rows = described.report, described.report.rows
    logger.info("%s", report)
    own = sum(row.numel for row in rows if row.name in described.asked)
    left = [row for row in rows if row.status == "full precision" and row.name not in described.asked]
    loud = [row for row in left if row.name in described.loud]
    low = report.quantized < warn_below * (report.total - own)
    if not low and not loud:
        return None
    lines = report.lines(left, limit=5) if low else []
    lines += [line for line in report.lines(loud) if line not in lines]
    if low and own:
        lines.append(f"{own / report.total:7.1%} {own:>14,}  left out by the patterns of this call")
    hint = "exclude what is left on purpose, or give warn_below=0" if low else "exclude what is left on purpose"
    return "\n".join(
        (f"{report.summary}; left in full precision:", *lines, f"(quantization_report(model) has it all; {hint})")
    )
