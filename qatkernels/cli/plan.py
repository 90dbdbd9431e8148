"""`qatkernels plan`: the plan as data and as text."""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Sequence
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any

from .. import files, units
from ..files import CheckpointError
from ..options import AT_LEAST_0, AT_LEAST_1, ConfigError, check, option
from ..plan.decide import best_bits_under_memory, full_precision_parity, wasted_tokens
from ..plan.fit import FitError, LossFit, fit_loss_law, read_runs, select
from ..plan.formula import PlanError, optimal_qat_fraction, tokens_per_parameter_byte
from ..plan.law import LossLaw
from ..plan.page import page
from .arguments import add_options, from_arguments
from .common import Answer, fail

LONG = """\
Compute how many tokens to train in full precision and how many quantized. The
fraction is that of the paper's formula, a function of the tokens per byte of
weights. With a table of your own runs, a law of the loss is fitted to them, and
the fraction is the optimum of that law.
"""
EPILOG = """\
examples:
  qatkernels plan --params 1.2B --tokens 100B --bits 2
  qatkernels plan --params 1.2B --tokens 100B --bits 2 4 --html plan.html
  qatkernels plan --params 1M --tokens 50M --bits 1 --runs runs.csv --save law.json
  qatkernels plan --params 1M --tokens 50M --bits 1 --law law.json

columns of runs.csv:
  params, tokens_qat, tokens_fp, bits, loss; tokens_qat is 0 in full precision.
  Other columns are allowed: --where schedule=classic uses the rows with that
  value only
"""
#: Smallest bit width for which the fused schedule is recommended. In the paper it is better at 4 and 6 bits, and worse
#: at 1 bit and in some runs at 2. For 3 bits this is inferred.
FUSED_FROM = 3


@dataclass(frozen=True)
class PlanConfig:
    """The settings of `qatkernels plan`."""

    params: int = option(MISSING, "parameters, such as 1.2B", AT_LEAST_1, parse=units.count)
    tokens: int = option(MISSING, "tokens of both phases, such as 100B", AT_LEAST_1, parse=units.count)
    bits: tuple[float, ...] = option(MISSING, "bit widths to plan for")
    fraction: float = option(0.1, "another QAT fraction; the plan shows how many tokens it wastes")
    runs: str | None = option(None, "table of runs to fit a law to", metavar="CSV")
    law: str | None = option(None, "file with a law that --save wrote; replaces --runs", metavar="JSON")
    where: tuple[str, ...] = option((), "use only the rows of --runs with this value", metavar="COLUMN=VALUE")
    resamples: int = option(200, "bootstrap fits for the confidence intervals", AT_LEAST_0)
    seed: int = option(0, "seed of the fit")
    save: str | None = option(None, "file to write the law to that was fitted to --runs", metavar="JSON")
    memory: int | None = option(
        None,
        "also compare bit widths for weights that fill this memory, such as 300MB, at the compute 6·N·D; needs a law",
        AT_LEAST_1, parse=units.size, metavar="SIZE",
    )  # fmt: skip
    plot: str | None = option(None, "draw the law and the optimum into a picture (extra plot)", metavar="PNG")
    html: str | None = option(None, "write the plan with its charts as a page, one file that needs no network",
                              metavar="HTML")  # fmt: skip

    def __post_init__(self) -> None:
        check(self)
        if self.runs and self.law:
            raise ConfigError("--runs and --law are both given, must be one of them")
        if self.save and not self.runs:
            raise ConfigError("--save needs --runs, to which the law is fitted")
        if self.memory and not (self.runs or self.law):
            raise ConfigError("--memory needs a law: give --runs or --law")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add an option for each setting."""
    add_options(parser, PlanConfig)


def run(args: argparse.Namespace) -> Answer | int:
    """Return the plan, and print warnings to standard error."""
    try:
        config = from_arguments(args, PlanConfig)
        result, messages = answer(config)
    except (ConfigError, PlanError, CheckpointError) as error:
        return fail(error)
    for message in messages:
        print(f"qatkernels: warning: {message}", file=sys.stderr)
    return Answer(result, lambda: print(text(result)))


def answer(config: PlanConfig) -> tuple[dict[str, Any], list[str]]:
    """Return the plan, and the texts of the warnings that were given while it was made.

    Raises:
        PlanError: if an argument or the content of a file cannot be used.
        CheckpointError: if a file cannot be read or written.
    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        law, fit = _law(config)
        result = plan(config.params, config.tokens, config.bits, law, fit, config.fraction, config.memory)
        if config.plot:
            from ..plan.plot import draw  # matplotlib takes half a second to import

            with files.explained("written", Path(config.plot)):
                draw(config.plot, config.params, config.tokens, list(config.bits), law)
    messages = list(dict.fromkeys(str(warning.message) for warning in caught))
    if config.html:
        rows = [_rows(one, result) for one in result["plans"]]
        files.write(Path(config.html), page(result, rows, messages, law))
    return result, messages


def _law(config: PlanConfig) -> tuple[LossLaw | None, LossFit | None]:
    """Return the law that --law holds, or the law and its fit to --runs; None if neither is given."""
    if config.law:
        stored = files.read_json(Path(config.law))
        try:
            return LossLaw.from_dict(stored["coefficients"]), None
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise PlanError(f"--law {config.law} holds no law ({error})") from error
    if not config.runs:
        return None, None
    runs: dict[str, list[Any]] = read_runs(config.runs)
    for condition in config.where:
        column, equals, value = condition.partition("=")
        if not equals or column not in runs:
            raise PlanError(f"--where {condition} is not COLUMN=VALUE with a column of {', '.join(runs)}")
        runs = select(runs, **{column: value})
        if not runs[column]:
            raise PlanError(f"--where {condition} leaves no runs")
    try:
        fit = fit_loss_law(runs, seed=config.seed, resamples=config.resamples)
    except FitError as error:
        raise FitError(f"--runs {config.runs}: {error}") from error
    if config.save:
        files.write_json(Path(config.save), fit.to_dict(), sealed=True)
    return fit.law, fit


def plan(
    params: float, tokens: float, bits: Sequence[float], law: LossLaw | None = None, fit: LossFit | None = None,
    other: float = 0.1, memory: float | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Return the plan as data; numbers are parameters, tokens, bytes and fractions.

    Args:
        params: N, parameters.
        tokens: D, tokens of both phases.
        bits: bit widths; each gets a plan.
        law: a law of the loss.
        fit: the fit that gave the law, for confidence intervals.
        other: another fraction of quantized tokens; the plan has the tokens that it wastes.
        memory: bytes that the weights fill, for the comparison of bit widths.
    """
    result: dict[str, Any] = {"params": params, "tokens": tokens, "plans": []}
    for b in bits:
        s = tokens_per_parameter_byte(params, tokens, b)
        fraction = optimal_qat_fraction(params, tokens, b) if law is None or s > 1 else None
        one: dict[str, Any] = {
            "bits": b,
            "tokens_per_parameter_byte": s,
            "formula_fraction": fraction,
            "fraction": fraction,
        }
        if law:
            if fit:
                fit.warn_outside(params, tokens, b)
            one |= _by_law(law, fit, params, tokens, b, other)
        quantized = round(one["fraction"] * tokens)
        one |= {
            "tokens_fp": tokens - quantized,
            "tokens_qat": quantized,
            "schedule": "fused" if b >= FUSED_FROM else "classic",
            "weight_bytes": round(params * b / 8),
        }
        result["plans"].append(one)
    if fit:
        result["fit"] = fit.to_dict()
    if law and memory:
        choices = best_bits_under_memory(law, memory, 6.0 * params * tokens)
        result["memory"] = {"bytes": memory, "choices": [vars(choice) for choice in choices]}
    return result


def _by_law(
    law: LossLaw, fit: LossFit | None, params: float, tokens: float, bits: float, other: float
) -> dict[str, Any]:
    """Return the entries of a plan that need a law."""
    parity = full_precision_parity(law, params, bits)
    one = {
        "fraction": law.optimal_fraction(params, tokens, bits),
        "loss": law.minimum(params, tokens, bits),
        "other_fraction": other,
        "wasted_tokens": wasted_tokens(law, params, tokens, bits, other),
        "parity_from": parity and parity[0],
    }
    if fit and len(fit.resampled):
        low, high = fit.interval(lambda resampled: resampled.optimal_fraction(params, tokens, bits))
        one["fraction_interval"] = [float(low), float(high)]
    return one


def text(answer: dict[str, Any]) -> str:
    """Return a plan as text."""
    blocks = []
    for one in answer["plans"]:
        b, human = one["bits"], units.human
        head = (
            f"{human(answer['params'])} parameters, {human(answer['tokens'])} tokens, {b:g} bit{'' if b == 1 else 's'}"
        )
        blocks.append("\n".join([head, *(f"  {name:<16} {value}" for name, value in _rows(one, answer))]))
    if "fit" in answer:
        blocks.append(_fit_text(answer["fit"]))
    if "memory" in answer:
        blocks.append(_memory_text(answer["memory"]))
    return "\n\n".join(blocks)


def _rows(one: dict[str, Any], answer: dict[str, Any]) -> list[tuple[str, str]]:
    """Return what is said about one bit width of a plan: names with values."""
    params, tokens, human = answer["params"], answer["tokens"], units.human
    fraction, full = one["fraction"], one["tokens_fp"]
    formula = "none, S ≤ 1" if one["formula_fraction"] is None else f"{one['formula_fraction']:.1%}"
    source = f"fitted law; formula [paper]: {formula}" if "loss" in one else "formula [paper]"
    if "fraction_interval" in one:
        low, high = one["fraction_interval"]
        level = answer["fit"]["confidence"]
        source = f"{low:.1%} to {high:.1%} at {level:.0%} confidence; {source}"
    rows = [
        ("quantized share", f"{fraction:.1%}  ({source})"),
        ("full precision", f"{human(full)} tokens"),
        ("quantized", f"{human(one['tokens_qat'])} tokens"),
        ("schedule", _schedule(one["schedule"], full)),
        ("weights", f"{human(one['weight_bytes'], 'B')}, in bfloat16 {human(2 * params, 'B')}"),
        ("S", f"{one['tokens_per_parameter_byte']:.4g} tokens per parameter byte"),
    ]
    if "loss" in one:
        waste = one["wasted_tokens"]
        rows += [(f"{one['other_fraction']:.0%} instead", f"wastes {human(waste)} tokens ({waste / tokens:.1%})")]
        parity = one["parity_from"]
        parity_text = "at no number of tokens" if parity is None else f"from {human(parity)} tokens on"
        rows += [("within 1% of fp", parity_text), ("loss", f"{one['loss']:.4g}")]
    return rows


def _schedule(name: str, full: float) -> str:
    tokens = units.human(full)
    if name == "fused":
        return f"fused: constant rate up to {tokens} tokens, then quantized: re-warmup and decay"
    return f"classic: cooldown that ends at {tokens} tokens, then quantized: re-warmup and decay"


def _fit_text(fit: dict[str, Any]) -> str:
    mae = fit["optimum_mae"]
    lines = [
        f"law fitted to {fit['runs']} runs: R² {fit['r2']:.4f}, optima "
        + ("not measured" if mae is None else f"off by {mae:.3f} on average")
    ]
    for name, value in fit["coefficients"].items():
        limits = fit["intervals"][name]
        interval = "no resamples, no interval" if limits is None else f"{limits[0]:.4g} to {limits[1]:.4g}"
        mark = "  (at its limit: the runs do not determine it)" if name in fit["undetermined"] else ""
        lines.append(f"  {name.rstrip('_'):<8} {value:<10.4g} {interval}{mark}")
    return "\n".join(lines)


def _memory_text(memory: dict[str, Any]) -> str:
    lines = [f"weights in {units.human(memory['bytes'], 'B')}, same compute: best first"]
    for choice in memory["choices"]:
        lines.append(
            f"  {choice['bits']:<5g} bits  {units.human(choice['params']):>7} parameters  "
            f"{units.human(choice['tokens']):>7} tokens  {choice['fraction']:.1%} quantized  loss {choice['loss']:.4g}"
        )
    return "\n".join(lines)
