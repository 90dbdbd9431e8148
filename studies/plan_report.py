"""Tables and pictures of the planner's sweep: the fitted law, and fused against classic schedules."""

from __future__ import annotations

import csv
import io
import warnings
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from qatkernels import files
from qatkernels.methods.schedules import DECAYS, classic, fused
from qatkernels.plan import FitError, LossFit, fit_loss_law, optimal_qat_fraction, tokens_per_parameter_byte
from qatkernels.plan.fit import select
from qatkernels.plan.formula import ExtrapolationWarning
from qatkernels.plan.plot import draw_optima
from qatkernels.plotting import COLOURS, QUIET, tidy

from .results import Results

#: Columns of runs.csv, which ``qatkernels plan --runs`` reads.
COLUMNS = ("params", "bits", "tokens_fp", "tokens_qat", "loss", "seed", "schedule", "shape", "fraction", "model",
           "round_to_nearest", "seconds")  # fmt: skip
#: Options of the fit by size of the study.
FITS = {"smoke": {"starts": 2, "resamples": 4}}
_FIT = {"starts": 16, "resamples": 200}


def report(results: Results, folder: Path) -> str:
    """Write runs.csv and fit.json, draw the pictures, and return the tables."""
    runs = table(results)
    files.write(folder / "runs.csv", as_csv(runs))
    draw_schedules(folder / "schedules.png")
    runs = complete(runs)
    compared = compare(runs)
    classic = select(runs, schedule="classic")
    budgets = sorted(set(_budgets(classic)[np.array(classic["tokens_qat"]) > 0]))
    options = FITS.get(results.study["size"], _FIT)
    try:
        fits = {
            "all budgets": fit_loss_law(classic, **options),
            "without the smallest budget": fit_loss_law(_from(classic, budgets[1]), **options),
        }
    except (FitError, IndexError) as error:
        return f"too few runs to fit the law ({error})\n\n{markdown_of_schedules(compared)}"
    chosen = fits["without the smallest budget"]
    files.write_json(folder / "fit.json", {
        "fits": {name: fit.to_dict() | against_formula(fit) | without_smallest(fit, budgets[0])
                 for name, fit in fits.items()},
        "regret_percent": regret(chosen, classic),
        "fused_against_classic": compared,
    })  # fmt: skip
    draw_optima(folder / "optima.png", chosen)
    draw_losses(folder / "losses.png", runs, chosen)
    regrets = ", ".join(f"{name} {value:.3f} %" for name, value in regret(chosen, classic).items())
    return f"{markdown_of_optima(chosen)}\n\n{markdown_of_schedules(compared)}\n\nregret: {regrets}"


def table(results: Results) -> dict[str, list[Any]]:
    """Return the runs as columns."""
    rows = [{"seed": row["seed"], **row["settings"], **row["figures"]} for row in results.rows]
    return {name: [row[name] for row in rows] for name in COLUMNS}


def as_csv(runs: Mapping[str, Sequence[Any]]) -> bytes:
    """Return the runs as the content of runs.csv."""
    text = io.StringIO()
    out = csv.writer(text, lineterminator="\n")
    out.writerow(runs)
    out.writerows(zip(*runs.values(), strict=True))
    return text.getvalue().encode()


def complete(runs: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """Leave out quantized runs of a size, budget, seed and schedule of which a sweep that was stopped lacks some."""
    cells = list(zip(runs["params"], _budgets(runs), runs["seed"], runs["schedule"], strict=True))
    quantized = np.array(runs["tokens_qat"]) > 0
    counts = Counter(cell for cell, q in zip(cells, quantized, strict=True) if q)
    kept = [not q or counts[cell] == max(counts.values()) for cell, q in zip(cells, quantized, strict=True)]
    return {name: [value for value, keep in zip(column, kept, strict=True) if keep] for name, column in runs.items()}


def _budgets(runs: Mapping[str, Sequence[Any]]) -> Any:
    return np.array(runs["tokens_fp"]) + np.array(runs["tokens_qat"])


def _from(runs: dict[str, list[Any]], tokens: float) -> dict[str, list[Any]]:
    """Return the rows with at least so many tokens."""
    kept = _budgets(runs) >= tokens
    return {name: [value for value, keep in zip(column, kept, strict=True) if keep] for name, column in runs.items()}


def _formula(params: float, tokens: float, bits: float) -> float | None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExtrapolationWarning)
        above = tokens_per_parameter_byte(params, tokens, bits) > 1
        return optimal_qat_fraction(params, tokens, bits) if above else None


def against_formula(fit: LossFit) -> dict[str, float]:
    """Return how far the paper's formula is from the measured optima."""
    errors = [abs(f - g["measured"]) for g in fit.optima if (f := _formula(g["params"], g["tokens"], g["bits"]))]
    return {"formula_mae": float(np.mean(errors))}


def without_smallest(fit: LossFit, smallest: float) -> dict[str, float]:
    """Return the errors at the groups that all fits have, those above the smallest budget."""
    errors = [abs(g["predicted"] - g["measured"]) for g in fit.optima if g["tokens"] > smallest]
    return {"optimum_mae_above_smallest": float(np.mean(errors))}


def regret(fit: LossFit, runs: Mapping[str, Sequence[Any]]) -> dict[str, float]:
    """Return the mean loss in percent above the best measured one if each rule had chosen the fraction.

    Losses are averaged over seeds and interpolated over the logit of the fraction, and held beyond the grid's ends.
    """
    fractions, total = np.array(runs["tokens_qat"]) / _budgets(runs), _budgets(runs)
    found: dict[str, list[float]] = defaultdict(list)
    for g in fit.optima:
        mine = (total == g["tokens"]) & (fractions > 0)
        for name in ("params", "bits"):
            mine &= np.array(runs[name]) == g[name]
        grid, which = np.unique(fractions[mine], return_inverse=True)
        losses = np.bincount(which, np.array(runs["loss"])[mine]) / np.bincount(which)
        rules = {"fitted law": g["predicted"], "formula": _formula(g["params"], g["tokens"], g["bits"])}
        rules |= {f"always {100 * f:g}%": f for f in (0.05, 0.1, 0.2, 0.35, 0.5)}
        for name, fraction in rules.items():
            if fraction:
                at = np.interp(np.log(fraction / (1 - fraction)), np.log(grid / (1 - grid)), losses)
                found[name].append(100 * (at / losses.min() - 1))
    return {name: float(np.mean(values)) for name, values in found.items()}


def compare(runs: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Return, for each size, budget and width, the losses of both schedules at equal tokens.

    The difference is fused minus classic in percent of classic, paired by seed and fraction; and, seed by seed, between
    the best fraction of each. Its spread is the standard deviation over the seeds.
    """
    losses: dict[tuple[float, ...], dict[tuple[str, int, float], float]] = defaultdict(dict)
    columns = (runs[name] for name in ("params", "tokens_qat", "tokens_fp", "bits"))
    for i, (n, q, f, b) in enumerate(zip(*columns, strict=True)):
        if q:
            key = (runs["schedule"][i], int(runs["seed"][i]), float(runs["fraction"][i]))
            losses[n, q + f, b][key] = runs["loss"][i]
    found = []
    for (params, tokens, bits), mine in sorted(losses.items()):
        fractions = sorted({f for _, _, f in mine})
        everything = [(kind, f) for kind in ("classic", "fused") for f in fractions]
        seeds = [s for s in sorted({s for _, s, _ in mine}) if all((kind, s, f) in mine for kind, f in everything)]
        if not seeds:
            continue
        same = np.array([[mine["fused", s, f] / mine["classic", s, f] - 1 for f in fractions] for s in seeds])
        best = {k: np.array([min(mine[k, s, f] for f in fractions) for s in seeds]) for k in ("classic", "fused")}
        ratio = best["fused"] / best["classic"] - 1
        found.append({
            "params": params, "tokens": tokens, "bits": bits, "seeds": len(seeds),
            "classic_best": float(best["classic"].mean()), "fused_best": float(best["fused"].mean()),
            "best_percent": float(100 * ratio.mean()),
            "best_percent_sd": float(100 * ratio.std(ddof=1)) if len(seeds) > 1 else None,
            "seeds_fused_better": int((ratio < 0).sum()),
            "by_fraction_percent": dict(zip(map(str, fractions), (100 * same.mean(0)).tolist(), strict=True)),
        })  # fmt: skip
    return found


def draw_losses(path: Path, runs: dict[str, list[Any]], fit: LossFit) -> None:
    """Draw the loss over the fraction: a panel for each size and budget, measured points and the fitted law."""
    quantized = [i for i, q in enumerate(runs["tokens_qat"]) if q]
    total = _budgets(runs)
    sizes = sorted({runs["params"][i] for i in quantized})
    budgets = sorted({total[i] for i in quantized})
    figure = Figure(figsize=(3.6 * len(budgets), 3 * len(sizes)), dpi=120, layout="constrained")
    panels = figure.subplots(len(sizes), len(budgets), squeeze=False)
    grid = np.geomspace(0.03, 0.8, 200)
    for row, params in zip(panels, sizes, strict=True):
        for axes, tokens in zip(row, budgets, strict=True):
            if not any(runs["params"][i] == params and total[i] == tokens for i in quantized):
                axes.set_visible(False)
                continue
            for colour, bits in zip(COLOURS, (1, 2, 4), strict=False):
                for schedule, marker in (("classic", "o"), ("fused", "^")):
                    mine = defaultdict(list)
                    for i in quantized:
                        if (runs["params"][i], total[i], runs["bits"][i], runs["schedule"][i]) == (
                            params, tokens, bits, schedule
                        ):  # fmt: skip
                            mine[float(runs["fraction"][i])].append(runs["loss"][i])
                    if mine:
                        x, y = zip(*sorted((f, np.mean(values)) for f, values in mine.items()), strict=True)
                        face = {"classic": colour, "fused": "white"}[schedule]
                        axes.plot(x, y, marker, color=colour, markerfacecolor=face, markersize=5)
                if tokens >= fit.ranges["tokens"][0]:
                    axes.plot(grid, fit.law.at_fraction(params, tokens, bits, grid), color=colour, linewidth=1.2)
            full = [runs["loss"][i] for i in range(len(total))
                    if not runs["tokens_qat"][i] and (runs["params"][i], total[i]) == (params, tokens)]  # fmt: skip
            if full:
                axes.axhline(np.mean(full), color=QUIET, linewidth=0.9, linestyle=(0, (5, 4)))
            axes.set_xscale("log")
            axes.set_xticks((0.05, 0.1, 0.2, 0.5), ("5%", "10%", "20%", "50%"))
            axes.minorticks_off()
            axes.set_title(f"{params:,.0f} parameters, {tokens / 1000:,.0f}k tokens", loc="left", fontsize=9)
            tidy(axes)
    for colour, bits in zip(COLOURS, (1, 2, 4), strict=False):
        panels[0][0].plot([], [], "o", color=colour, label=f"{bits} bit{'s' * (bits > 1)}")
    panels[0][0].plot([], [], "^", color=QUIET, markerfacecolor="white", label="fused (● classic)")
    panels[0][0].plot([], [], color=QUIET, linestyle=(0, (5, 4)), label="full precision")
    panels[0][0].legend(frameon=False, fontsize=7)
    figure.supxlabel("share of quantized tokens")
    figure.supylabel("bits per byte on held-out text")
    figure.savefig(path)


def draw_schedules(path: str | Path, steps: int = 1000, qat_steps: int = 300) -> None:
    """Draw the classic and the fused schedule with each shape of decay."""
    figure = Figure(figsize=(12, 4), dpi=150, layout="constrained")
    first, warmup = steps - qat_steps, steps // 20
    both: tuple[tuple[str, Any, dict[str, int]], ...] = (
        ("Classic", classic, {"cooldown": first // 5}), ("Fused", fused, {}),
    )  # fmt: skip
    for axes, (title, schedule, parts) in zip(figure.subplots(1, 2, sharey=True), both, strict=True):
        axes.axvspan(first, steps, color="#f2f2f2", zorder=0)
        for colour, shape in zip(COLOURS, DECAYS, strict=False):
            parts |= {"warmup": warmup, "rewarmup": qat_steps // 10}
            rates = [schedule(step, steps, qat_steps, shape=shape, **parts) for step in range(steps + 1)]
            axes.plot(rates, color=colour, linewidth=2, label=shape)
        axes.text(first + 8, 1.06, "quantized", color=QUIET)
        axes.set_title(title, loc="left", fontweight="bold")
        axes.set_xlabel("step")
        axes.set_ylim(0, 1.15)
        tidy(axes)
        axes.legend(frameon=False, loc="center left")
    figure.axes[0].set_ylabel("learning rate, share of the peak")
    figure.savefig(path)


def markdown_of_optima(fit: LossFit) -> str:
    """Return the table of measured and predicted fractions."""
    lines = ["| parameters | tokens | bits | S | measured | law | formula |", "|---|---|---|---|---|---|---|"]
    for g in fit.optima:
        formula, s = _formula(g["params"], g["tokens"], g["bits"]), tokens_per_parameter_byte(
            g["params"], g["tokens"], g["bits"]
        )  # fmt: skip
        measured = f"{g['measured']:.3f}" + (" (end of grid)" if g["edge"] else "")
        lines.append(
            f"| {g['params']:,.0f} | {g['tokens']:,.0f} | {g['bits']:g} | {s:.3g} | {measured} | {g['predicted']:.3f} "
            f"| {'none' if formula is None else f'{formula:.3f}'} |"
        )
    return "\n".join(lines)


def markdown_of_schedules(compared: list[dict[str, Any]]) -> str:
    """Return the table that compares both schedules at equal tokens."""
    header = "| parameters | tokens | bits | seeds | classic | fused | fused is | seeds better |"
    lines = [header, "|" + "---|" * 8]
    for c in compared:
        spread = "" if c["best_percent_sd"] is None else f" ± {c['best_percent_sd']:.2f}"
        lines.append(
            f"| {c['params']:,.0f} | {c['tokens']:,.0f} | {c['bits']:g} | {c['seeds']} | {c['classic_best']:.3f} | "
            f"{c['fused_best']:.3f} | {c['best_percent']:+.2f}{spread}% | {c['seeds_fused_better']} of {c['seeds']} |"
        )
    return "\n".join(lines)
