"""Tables and pictures of the study of WinQ: its variants against plain QAT."""

from __future__ import annotations

import itertools
import statistics
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from qatkernels.plotting import COLOURS, tidy

from .results import Figures, Results

#: Variants that are compared with plain QAT under a cosine: those of the paper, and ours.
TABLES = (("noise", "reset", "both"), ("wsd", "plateau"))
VARIANTS = ("base", *TABLES[0], *TABLES[1])
Cell = tuple[float, int | None, int]  # bits, act_bits, steps
Runs = dict[str, dict[int, Figures]]  # by variant, then by seed


def report(results: Results, folder: Path) -> str:
    """Draw curves.png, and return the tables: the final loss of plain QAT, and the differences to it."""
    found = cells(results)
    draw(folder / "curves.png", found)
    return "\n\n".join(_table(found, variants) for variants in TABLES)


def cells(results: Results) -> dict[Cell, Runs]:
    """Return the figures of the reported trainings by cell, variant and seed. Seed 0 only chose the resets."""
    found: dict[Cell, Runs] = defaultdict(lambda: defaultdict(dict))
    for row in results.rows:
        if row["seed"]:
            own = row["settings"]
            cell = own["bits"], own["act_bits"], own["steps"]
            found[cell][own["variant"]][row["seed"]] = row["figures"]
    return dict(sorted(found.items(), key=lambda item: (item[0][2], item[0][1] or 0, item[0][0])))


def reached(curve: list[list[float]], loss: float) -> float | None:
    """Return the step at which a curve first is as low as a loss, linear between its points; None if it never is."""
    for (step, value), (after, lower) in itertools.pairwise(curve):
        if lower <= loss:
            return step if value <= loss else step + (after - step) * (value - loss) / (value - lower)
    return None


def lead(curve: list[list[float]], plain: list[list[float]]) -> list[float]:
    """Return the largest lead over plain QAT at one step, and that step."""
    return max([round(other[1] - own[1], 6), own[0]] for own, other in zip(curve, plain, strict=True))


def compared(runs: Runs) -> dict[str, dict[str, Any]]:
    """Return, for each variant of a cell, mean and deviation over the seeds.

    ``loss`` is the final loss, ``difference`` that to plain QAT on the same seed, ``steps_to_base`` when the variant is
    as low as plain QAT at its end, and ``lead`` the largest lead over plain QAT.
    """
    result = {}
    for variant in VARIANTS:
        if not (own := runs.get(variant)):
            continue
        pairs = [(own[seed], runs["base"][seed]) for seed in own if seed in runs.get("base", {})]
        losses = [run["loss"] for run in own.values()]
        differences = [run["loss"] - base["loss"] for run, base in pairs]
        at = [reached(run["curve"], base["loss"]) for run, base in pairs]
        result[variant] = {
            "loss": statistics.mean(losses),
            "deviation": _deviation(losses),
            "difference": statistics.mean(differences) if differences else None,
            "difference_deviation": _deviation(differences),
            "steps_to_base": [None if step is None else round(step) for step in at],
            "lead": [lead(run["curve"], base["curve"]) for run, base in pairs],
        }
    return result


def _shown(mean: float, deviation: float | None, form: str) -> str:
    return f"{mean:{form}}" + ("" if deviation is None else f" ± {deviation:.4f}")


def _deviation(values: list[float]) -> float | None:
    return statistics.stdev(values) if len(values) > 1 else None


def _table(found: dict[Cell, Runs], variants: Sequence[str]) -> str:
    lines = [
        f"| bits, steps | base | {' | '.join(variants)} | largest lead of {variants[-1]} on the way, at step "
        f"| steps of {variants[-1]} to the end of base |",
        "|---|---|" + "---|" * len(variants) + "---|---|",
    ]
    for cell, runs in found.items():
        result = compared(runs)
        if not any(variant in result for variant in variants) or "base" not in result:
            continue
        shown = [
            f"{_widths(cell)}, {cell[2]}",
            _shown(result["base"]["loss"], result["base"]["deviation"], ".4f"),
        ]
        for v in (result.get(variant) or {"difference": None} for variant in variants):
            missing = v["difference"] is None
            shown.append("-" if missing else _shown(v["difference"], v["difference_deviation"], "+.4f"))
        last = result.get(variants[-1]) or {}
        shown.append(", ".join(f"{value:.3f} at {step:g}" for value, step in last.get("lead", [])) or "-")
        steps = last.get("steps_to_base", [])
        shown.append(", ".join("never" if step is None else str(step) for step in steps) or "-")
        lines.append("| " + " | ".join(shown) + " |")
    return "\n".join(lines)


def _widths(cell: Cell, unit: str = "") -> str:
    return f"{cell[0]:g}{unit}" + (f", A{cell[1]}" if cell[1] else "")


def draw(path: Path, found: dict[Cell, Runs]) -> None:
    """Draw the mean held-out loss of each variant by step, a panel for each cell."""
    columns = min(4, max(len(found), 1))
    rows = max(-(-len(found) // columns), 1)
    figure = Figure(figsize=(3.2 * columns, 2.6 * rows), layout="constrained")
    for i, (cell, runs) in enumerate(found.items()):
        axes = figure.add_subplot(rows, columns, i + 1)
        for colour, variant in zip(COLOURS, VARIANTS, strict=False):
            if not (own := runs.get(variant)):
                continue
            curves = [run["curve"] for run in own.values()]
            steps = [step for step, _ in curves[0]]
            axes.plot(steps, [statistics.mean(curve[k][1] for curve in curves) for k in range(len(steps))],
                      color=colour, label=variant, linewidth=1.2)  # fmt: skip
        last = [run["curve"][-1][1] for own in runs.values() for run in own.values()]
        axes.set_ylim(min(last) - 0.02, min(last) + 0.35)
        axes.set_title(f"{_widths(cell, ' bits')}, {cell[2]} steps", fontsize=9)
        tidy(axes)
        if i == 0:
            axes.legend(fontsize=7, frameon=False)
            axes.set_ylabel("held-out bits per byte")
    figure.savefig(path, dpi=150)
