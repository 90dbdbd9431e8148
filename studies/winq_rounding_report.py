"""Tables and pictures of the study of WinQ and the rounding of weights."""

from __future__ import annotations

import statistics
from collections import defaultdict
from pathlib import Path

from matplotlib.figure import Figure

from qatkernels.plotting import COLOURS, tidy

from .results import Figures, Results

Cell = tuple[float, int, float]  # bits, steps, rate
Runs = dict[tuple[str, str], dict[int, Figures]]  # by weights and variant, then by seed
#: Variants whose difference to plain QAT is a column, in this order.
COLUMNS = ("noise", "reset-0.4", "reset-0.8", "both-0.4", "both-0.8", "stable")
#: Variants that are drawn, each with its line.
DRAWN = {"both-0.4": "-", "reset-0.4": "--"}


def report(results: Results, folder: Path) -> str:
    """Draw rounding.png, and return a table for each number of steps."""
    found = cells(results)
    draw(folder / "rounding.png", found)
    lengths = sorted({cell[1] for cell in found})
    return "\n\n".join(f"{steps} steps\n\n{table({c: r for c, r in found.items() if c[1] == steps})}"
                       for steps in lengths)  # fmt: skip


def cells(results: Results) -> dict[Cell, Runs]:
    """Return the figures by cell, weights and variant, and seed."""
    found: dict[Cell, Runs] = defaultdict(lambda: defaultdict(dict))
    for row in results.rows:
        own = row["settings"]
        found[own["bits"], own["steps"], own["rate"]][own["weights"], own["variant"]][row["seed"]] = row["figures"]
    return dict(sorted(found.items()))


def table(found: dict[Cell, Runs]) -> str:
    """Return plain QAT's loss, what was observed of it, and the differences to it, seed by seed."""
    columns = [v for v in COLUMNS if any(key[1] == v for runs in found.values() for key in runs)]
    head = ["bits", "rate", "weights", "base", "moved in a step", "flipped", "masked", "spacings", *columns]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for (bits, _, rate), runs in found.items():
        for weights in dict.fromkeys(key[0] for key in runs):
            base = runs.get((weights, "base"))
            if not base:
                continue
            shown = [f"{bits:g}", f"{rate:g}", weights, _estimate([f["loss"] for f in base.values()], ".4f")]
            shown += [
                _mean([statistics.mean(f["observed"]["moved"]) for f in base.values()], 100, " %"),
                _mean([_per_100(f, "flips") for f in base.values()], 100, " %"),
                _mean([f["observed"]["saturated"][-1] for f in base.values()], 100, " %"),
                _mean([sum(f["observed"]["travelled"]) for f in base.values()]),
            ]
            for variant in columns:
                gains = _gains(runs, weights, variant)
                shown.append(_estimate(gains, "+.4f") if gains else "")
            lines.append("| " + " | ".join(shown) + " |")
    return "\n".join(lines)


def _per_100(figures: Figures, key: str) -> float:
    """Return the mean share of codes that flip between two observations, as if those were 100 steps apart."""
    return statistics.mean(figures["observed"][key]) * 100 / figures["every"]


def _estimate(values: list[float], form: str) -> str:
    shown = f"{statistics.mean(values):{form}}"
    return shown + (f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else "")


def _mean(values: list[float], factor: float = 1, unit: str = "") -> str:
    return f"{factor * statistics.mean(values):.3g}{unit}"


def draw(path: Path, found: dict[Cell, Runs]) -> None:
    """Draw the gain of each variant by learning rate, a panel for each width, a line for each kind of weights."""
    panels: dict[tuple[float, int], list[tuple[str, str, float, float]]] = defaultdict(list)
    for (bits, steps, rate), runs in found.items():
        for weights, variant in runs:
            gains = _gains(runs, weights, variant)
            if variant in DRAWN and gains:
                panels[bits, steps].append((weights, variant, rate, statistics.mean(gains)))
    kinds = {kind: COLOURS[i] for i, kind in enumerate(dict.fromkeys(p[0] for ps in panels.values() for p in ps))}
    figure = Figure(figsize=(3.4 * max(len(panels), 1), 3.2), layout="constrained")
    for i, ((bits, steps), points) in enumerate(panels.items()):
        axes = figure.add_subplot(1, len(panels), i + 1)
        axes.axhline(0, color="0.6", linewidth=0.8)
        for weights, variant in dict.fromkeys(p[:2] for p in points):
            line = [p[2:] for p in points if p[:2] == (weights, variant)]
            axes.plot(*zip(*line, strict=True), DRAWN[variant], marker="o", markersize=3, color=kinds[weights],
                      label=f"{weights}, {variant}", linewidth=1.2)  # fmt: skip
        rates = sorted({p[2] for p in points})
        axes.set_xscale("log")
        axes.set_xticks(rates, [f"{rate:g}" for rate in rates])
        axes.minorticks_off()
        axes.set_title(f"{bits:g} {'bit' if bits == 1 else 'bits'}, {steps} steps", fontsize=9)
        axes.set_xlabel("learning rate")
        tidy(axes)
        if i == 0:
            axes.set_ylabel("difference to plain QAT, bits per byte")
            axes.legend(fontsize=6, frameon=False)
    figure.savefig(path, dpi=150)


def _gains(runs: Runs, weights: str, variant: str) -> list[float]:
    """Return the loss of a variant minus that of plain QAT, of each seed that has both."""
    base, other = runs.get((weights, "base"), {}), runs.get((weights, variant), {})
    return [other[seed]["loss"] - base[seed]["loss"] for seed in other if seed in base]
