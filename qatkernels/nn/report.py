"""A table of what is quantized in a model, what is not, and why."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import ParametrizationList

from ..float32_scales import Float32Scales
from .config import QuantConfig
from .experts import stacks_of
from .packed_linear import Packed
from .quant_linear import qualified_name
from .quantized import Quantized
from .replaced import replaced_layers
from .selection import ATTENTION, EXCLUDE, Candidate, Left, Rules, adapters, choose, is_candidate, names_of

#: How stacked experts are kept that `quantize_model` does not take, by qualified name of their class: True for
#: ``[E, K, N]``, False for ``[E, N, K]``. Those that it takes are in experts.py.
STACKS: dict[str, bool] = {
    "transformers.models.llama4.modeling_llama4.Llama4TextExperts": True,
    "transformers.models.jetmoe.modeling_jetmoe.JetMoeParallelExperts": False,
    "transformers.models.step3p7.modeling_step3p7.Step3p7Experts": False,
    "transformers.models.longcat_flash.modeling_longcat_flash.LongcatFlashExperts": False,
    "transformers.models.inkling.modeling_inkling.InklingSharedExperts": False,
}
_UNSUPPORTED: tuple[tuple[tuple[type[nn.Module], ...], str], ...] = (
    ((nn.EmbeddingBag,), "embedding bag: not supported"),
    ((_ConvNd,), "convolution: not supported"),
    ((nn.RNNBase, nn.RNNCellBase), "recurrent layer: not supported"),
    ((ParametrizationList,), "parametrized: not supported, remove the parametrization first"),
    ((nn.MultiheadAttention,), ATTENTION),
)


@dataclass(frozen=True)
class ReportRow:
    """One parameter of a model.

    Attributes:
        name: its first name.
        numel: its number of elements.
        status: ``"quantized"``, ``"packed"`` or ``"full precision"``.
        reason: why it is in full precision; empty if it is not.
        config: what it is quantized to; None if it is not, or is packed.
        how: bits, scheme and groups in words, for what is quantized or packed.
    """

    name: str
    numel: int
    status: str
    reason: str = ""
    config: QuantConfig | None = None
    how: str = ""


@dataclass(frozen=True)
class QuantizationReport:
    """What is quantized in a model. ``str`` gives a table, largest shares first.

    Attributes:
        rows: every parameter once, in the model's order. Scales and zero points are not counted, because the original
            model does not have them.
    """

    rows: tuple[ReportRow, ...]

    @property
    def total(self) -> int:
        """Parameters of the model."""
        return sum(row.numel for row in self.rows)

    @property
    def quantized(self) -> int:
        """Parameters that are quantized or packed."""
        return sum(row.numel for row in self.rows if row.status != "full precision")

    @property
    def share(self) -> float:
        """``quantized / total``, 0 for a model without parameters."""
        return self.quantized / max(self.total, 1)

    @property
    def summary(self) -> str:
        """One line: how much is quantized."""
        return f"quantized {self.quantized:,} of {self.total:,} parameters ({self.share:.1%})"

    def __str__(self) -> str:
        """Return the summary and a table of what is quantized, to what, and what is not, and why."""
        return "\n".join((self.summary, *self.lines(self.rows)))

    def lines(self, rows: Iterable[ReportRow], limit: int | None = None) -> list[str]:
        """Return lines of a table, one for all rows of the same status and reason; the largest ``limit`` lines."""
        groups: dict[str, list[ReportRow]] = {}
        for row in rows:
            groups.setdefault(row.reason or f"{row.status}: {row.how}", []).append(row)
        sizes = {why: sum(row.numel for row in group) for why, group in groups.items()}
        lines = []
        for why in sorted(groups, key=lambda why: -sizes[why])[:limit]:
            names = [row.name.removesuffix(".weight") for row in groups[why]]
            lines.append(f"{sizes[why] / max(self.total, 1):7.1%} {sizes[why]:>14,}  {listed(names, 3)}: {why}")
        return lines


def quantization_report(model: nn.Module) -> QuantizationReport:
    """Return what is quantized or packed in a model, what is not, and why.

    The report describes the model as it is now: ``print(quantization_report(model))``. A model does not store the
    patterns of the :func:`quantize_model` call. A layer that a pattern left out is therefore "not quantized" here; the
    log of the call names the pattern.
    """
    return survey(model).report


class Survey(NamedTuple):
    """A report, the rows that the caller left out, and the rows that matched but could not be quantized."""

    report: QuantizationReport
    asked: set[str]
    loud: set[str]


def survey(
    model: nn.Module, rules: Rules | None = None, chosen: Mapping[Candidate, QuantConfig | Left] | None = None
) -> Survey:
    """Describe every parameter of a model.

    Args:
        model: the model.
        rules: the patterns of a call, or None outside a call.
        chosen: the decision about each layer in that call.
    """
    if rules is None or chosen is None:
        chosen = choose(model, Rules(QuantConfig(), None, EXCLUDE), requantize=True)
        since = Left("was quantized, and something replaced it by a plain layer since", loud=True)
        chosen.update(dict.fromkeys(replaced_layers(model).values(), since))
    names, never = names_of(model), adapters(model)
    holders: dict[int, list[tuple[nn.Module, str, Tensor]]] = {}
    rows: list[ReportRow] = []
    for module in names:
        for name, parameter in module._parameters.items():
            if parameter is not None and not (isinstance(module, Float32Scales) and name in module.uncast):
                holders.setdefault(id(parameter), []).append((module, name, parameter))
    asked, loud = set(), set()
    for uses in holders.values():
        row, left = _row(names, uses, chosen, never)
        rows.append(row)
        if left is None or rules is None:
            continue
        every = [n for module, name, _ in uses for n in (*names[module], *(_join(m, name) for m in names[module]))]
        found = rules.wanted(every)
        decided = [chosen.get(_candidate(module, name)) for module, name, _ in uses]
        if left.loud and any(decision is left for decision in decided):  # decided of a layer that matched
            loud.add(row.name)
        elif any(isinstance(reason, Left) and reason.asked for reason in (found, *decided)):
            asked.add(row.name)
        elif left.loud:
            loud.add(row.name)
    packed = {module.weight: names[module][0] for module in reversed(names) if isinstance(module, Packed)}
    for weight, prefix in reversed(packed.items()):  # the first name of each, in the model's order
        how = f"{weight.grid.bits:g} bits, {weight.grid.scheme}"
        rows.append(ReportRow(_join(prefix, "weight"), weight.shape.numel(), "packed", how=how))
    return Survey(QuantizationReport(tuple(rows)), asked, loud)


def _row(
    names: Mapping[nn.Module, list[str]], uses: list[tuple[nn.Module, str, Tensor]],
    chosen: Mapping[Candidate, QuantConfig | Left], never: Mapping[nn.Module, str],
) -> tuple[ReportRow, Left | None]:  # fmt: skip
    """Return the row of a parameter that one module holds, or several that share it."""
    module, name, parameter = uses[0]
    full_name = _join(names[module][0], name)
    numel = 0 if is_lazy(parameter) else parameter.numel()
    for layer, its_name, _ in uses:
        if isinstance(layer, Quantized) and its_name == "weight":
            row = ReportRow(full_name, numel, "quantized", config=layer.config, how=str(layer.config))
            return row, None
    left = next((found for m, n, p in uses if (found := _left(m, n, p, chosen, never)) is not None), None)
    left = left or Left("parameter of a module that uses it in a forward of its own: not supported")
    return ReportRow(full_name, numel, "full precision", left.reason), left


def _left(
    module: nn.Module, name: str, parameter: Tensor, chosen: Mapping[Candidate, QuantConfig | Left],
    never: Mapping[nn.Module, str],
) -> Left | None:  # fmt: skip
    """Return why a parameter is in full precision, None if nothing about it is known."""
    if module in never:
        return Left(never[module])
    if is_lazy(parameter):
        return Left("not initialized yet: give the model a batch first", loud=True)
    for kinds, reason in _UNSUPPORTED:
        if isinstance(module, kinds):
            return Left(reason, loud=reason == ATTENTION)
    if parameter.ndim < 2 or (name == "bias" and isinstance(module, Quantized)):  # that of a stack has two
        return Left("vectors (biases, norms): not quantized")
    if type(module).__name__.endswith("Router"):
        return Left("router of experts: not quantized")
    if is_candidate(layer := _candidate(module, name)):
        found = chosen.get(layer)
        return (
            found if isinstance(found, Left) else Left("not quantized, or left out in the call that quantized others")
        )
    if parameter.ndim == 3 and parameter.shape[0] > 1 and not type(module).__module__.startswith("torch.nn."):
        return Left(_stack(module, parameter), loud=True)
    return None


def _candidate(module: nn.Module, name: str) -> Candidate:
    """Return what could be quantized that has this parameter: a stack of experts, otherwise the module."""
    return next((stack for stack in stacks_of(module) if stack.name == name), module)


def _stack(module: nn.Module, parameter: Tensor) -> str:
    """Say what a parameter that looks like the stacked weights of experts is, and what takes it."""
    shape = tuple(parameter.shape)
    transposed = getattr(module, "is_transposed", STACKS.get(qualified_name(type(module))))
    if not isinstance(transposed, bool):
        return (
            f"has shape {shape}: stacked experts? No layer is called for it. If its module's forward can call one, "
            "GroupedQuantLinear.from_stacked takes it: look up whether it is [E, N, K] (F.linear(x, w[e])) or "
            "[E, K, N] (x @ w[e], transposed=True)"
        )
    order = "[E, K, N]" if transposed else "[E, N, K]"
    return (
        f"has shape {shape}, stacked experts kept as {order}: no layer is called for it. If its module's forward can "
        f"call one, GroupedQuantLinear.from_stacked(w, transposed={transposed}, ...) takes it"
    )


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name


def listed(names: list[str], limit: int) -> str:
    """Return the first ``limit`` names, and how many there are beside."""
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
