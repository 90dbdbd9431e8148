"""`qatkernels plan`: its answer as data and as text."""

from __future__ import annotations

import argparse
import json
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
from .arguments import add_options, made
from .common import fail

LONG = """\
Say how many tokens to train in full precision and how many quantized. The share
is the paper's formula, a function of the tokens for each byte of weights; with
runs of your own a law of the loss is fitted, whose optimum is given beside it.
"""
EPILOG = """\
examples:
  qatkernels plan --params 1.2B --tokens 100B --bits 2
  qatkernels plan --params 1.2B --tokens 100B --bits 2 4 --plot plan.png
  qatkernels plan --params 1M --tokens 50M --bits 1 --runs runs.csv --save law.json
  qatkernels plan --params 1M --tokens 50M --bits 1 --law law.json

columns of runs.csv:
  params, tokens_qat, tokens_fp, bits, loss; tokens_qat is 0 in full precision,
  others may be there: --where schedule=classic keeps the rows with that value
"""
#: From how many bits fused is advised: it won at 4 and 6 and lost at 1 and some 2 [paper]; that 3 wins is inferred.
FUSED_FROM = 3


@dataclass(frozen=True)
class PlanConfig:
    """What `qatkernels plan` is asked for."""

    params: int = option(MISSING, "parameters, such as 1.2B", AT_LEAST_1, parse=units.count)
    tokens: int = option(MISSING, "tokens of both phases, such as 100B", AT_LEAST_1, parse=units.count)
    bits: tuple[float, ...] = option(MISSING, "bit widths to plan for")
    fraction: float = option(0.1, "another share of QAT, of which to say what it wastes")
    runs: str | None = option(None, "table of runs to fit a law to", metavar="CSV")
    law: str | None = option(None, "a law that --save wrote, instead of --runs", metavar="JSON")
    where: tuple[str, ...] = option((), "rows of --runs to use", metavar="COLUMN=VALUE")
    resamples: int = option(200, "bootstrap fits", AT_LEAST_0)
    seed: int = option(0, "seed of the fit")
    save: str | None = option(None, "write the law fitted to --runs", metavar="JSON")
    memory: int | None = option(
        None,
        "also say which bit width is best if the weights fill so much memory, such as 300MB, at the compute 6·N·D; "
        "needs a law",
        AT_LEAST_1, parse=units.size, metavar="SIZE",
    )  # fmt: skip
    plot: str | None = option(None, "draw the law and the optimum", metavar="PNG")
    json: bool = option(False, "print one JSON object")

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


def run(args: argparse.Namespace) -> int:
    """Answer on the standard output; warnings go to the standard error."""
    try:
        config = made(args, PlanConfig)
        answered, warned = answer(config)
    except (ConfigError, PlanError, CheckpointError) as error:
        return fail(error)
    for message in warned:
        print(f"qatkernels: warning: {message}", file=sys.stderr)
    print(json.dumps(answered, indent=2) if config.json else text(answered))
    return 0


def answer(config: PlanConfig) -> tuple[dict[str, Any], list[str]]:
    """Return the plan and the warnings on the way to it.

    Raises:
        PlanError: if an argument or the content of a file cannot be used.
        CheckpointError: if a file cannot be read or written.
    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        law, fit = _law(config)
        answered = plan(config.params, config.tokens, config.bits, law, fit, config.fraction, config.memory)
        if config.plot:
            from ..plan.plot import draw  # matplotlib takes half a second to import

            with files.explained("written", Path(config.plot)):
                draw(config.plot, config.params, config.tokens, list(config.bits), law)
    return answered, list(dict.fromkeys(str(warning.message) for warning in caught))


def _law(config: PlanConfig) -> tuple[LossLaw | None, LossFit | None]:
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
    """Return the plan as data; numbers are parameters, tokens, bytes and shares.

    Args:
        params: N.
        tokens: D, of both phases.
        bits: widths, each with a plan of its own.
        law: a law of the loss.
        fit: where that came from, for its intervals.
        other: another share of quantized tokens, of which to say what it wastes.
        memory: bytes that the weights may fill, for the choice of the width.
    """
    answer: dict[str, Any] = {"params": params, "tokens": tokens, "plans": []}
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
        answer["plans"].append(one)
    if fit:
        answer["fit"] = fit.to_dict()
    if law and memory:
        choices = best_bits_under_memory(law, memory, 6.0 * params * tokens)
        answer["memory"] = {"bytes": memory, "choices": [vars(choice) for choice in choices]}
    return answer


def _by_law(
    law: LossLaw, fit: LossFit | None, params: float, tokens: float, bits: float, other: float
) -> dict[str, Any]:
    parity = full_precision_parity(law, params, bits)
    one = {
        "fraction": law.optimal_fraction(params, tokens, bits),
        "loss": law.minimum(params, tokens, bits),
        "other_fraction": other,
        "wasted_tokens": wasted_tokens(law, params, tokens, bits, other),
        "parity_from": parity and parity[0],
    }
    if fit and len(fit.resampled):
        low, high = fit.interval(lambda one: one.optimal_fraction(params, tokens, bits))
        one["fraction_interval"] = [float(low), float(high)]
    return one


def text(answer: dict[str, Any]) -> str:
    """Return a plan for people."""
    params, tokens, human = answer["params"], answer["tokens"], units.human
    blocks = []
    for one in answer["plans"]:
        fraction, b, full = one["fraction"], one["bits"], one["tokens_fp"]
        lines = [f"{human(params)} parameters, {human(tokens)} tokens, {b:g} bit{'' if b == 1 else 's'}"]
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
            found = "at no number of tokens" if parity is None else f"from {human(parity)} tokens on"
            rows += [("within 1% of fp", found), ("loss", f"{one['loss']:.4g}")]
        blocks.append("\n".join(lines + [f"  {name:<16} {value}" for name, value in rows]))
    if "fit" in answer:
        blocks.append(_fit_text(answer["fit"]))
    if "memory" in answer:
        blocks.append(_memory_text(answer["memory"]))
    return "\n\n".join(blocks)


def _schedule(name: str, full: float) -> str:
    at = units.human(full)
    if name == "fused":
        return f"fused: constant rate up to {at} tokens, then quantized: re-warmup and decay"
    return f"classic: cooldown that ends at {at} tokens, then quantized: re-warmup and decay"


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
