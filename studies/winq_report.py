"""From the studies to their results: ``python -m studies.winq_report``. Compares with plain QAT, draws."""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import shutil
import statistics
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from qatkernels import files
from qatkernels.plotting import COLOURS, tidy

from . import winq_why
from .winq import named

#: What is held against plain QAT under the cosine: the paper's, ours.
TABLES = (("noise", "reset", "both"), ("wsd", "plateau"))
VARIANTS = ("base", *TABLES[0], *TABLES[1])
Cell = tuple[float, str, int]  # bits, act_bits (empty for none), steps


def main(argv: Sequence[str] | None = None) -> int:
    """Write results.json and pictures beside a copy of what was measured, and print the tables."""
    parser = argparse.ArgumentParser(prog="python -m studies.winq_report", description=__doc__)
    parser.add_argument("--study", type=Path, default=Path("runs/winq-cpu"), help="folder of studies.winq")
    parser.add_argument("--out", type=Path, default=Path("docs/results/winq-amd-epyc"))
    parser.add_argument(
        "--why", type=Path, default=Path("runs/winq-why-cpu"), help="folder of studies.winq_why, and with -long"
    )
    options = parser.parse_args(argv)
    options.out.mkdir(parents=True, exist_ok=True)
    long = options.why.with_name(f"{options.why.name}-long")
    for source, name in (
        (options.why / "why.json", "why.json"), (options.why / "spectra" / "report.json", "spectra.json"),
        (options.why / "spectra" / "spectra.png", "spectra.png"), (long / "why.json", "why-long.json"),
    ):  # fmt: skip
        if source.exists():
            shutil.copyfile(source, options.out / name)
    for name in ("why", "why-long"):
        if (options.out / f"{name}.json").exists():
            trials = json.loads((options.out / f"{name}.json").read_text())["trials"]
            winq_why.draw(options.out / f"{name}.png", trials)
            print(winq_why.table(trials), end="\n\n")
    for name in ("runs.csv", "curves.json", "study.json"):
        if (options.study / name).exists():
            shutil.copyfile(options.study / name, options.out / name)
    found = cells(options.out)
    files.write_json(options.out / "results.json", {"cells": [compared(cell, runs) for cell, runs in found.items()]})
    draw(options.out / "curves.png", found)
    print(markdown(found))
    return 0


def cells(folder: Path) -> dict[Cell, dict[str, dict[int, dict[str, Any]]]]:
    """Return the reported trainings by cell, variant and seed, each with its curve; seed 0 chose the resets."""
    curves = json.loads((folder / "curves.json").read_text())
    found: dict[Cell, dict[str, dict[int, dict[str, Any]]]] = defaultdict(lambda: defaultdict(dict))
    with open(folder / "runs.csv", newline="") as file:
        for line in csv.DictReader(file):
            if line["seed"] == "0":
                continue
            bits, steps = float(line["bits"]), int(line["steps"])
            run = {**line, "loss": float(line["loss"]), "curve": curves[line["seed"]][named(line)]}
            found[bits, line["act_bits"], steps][line["variant"]][int(line["seed"])] = run
    return found


def reached(curve: list[list[float]], loss: float) -> float | None:
    """Return the step at which a curve first is as low as a loss, linear between its points; None if it never is."""
    for (step, value), (after, lower) in itertools.pairwise(curve):
        if lower <= loss:
            return step if value <= loss else step + (after - step) * (value - loss) / (value - lower)
    return None


def lead(curve: list[list[float]], plain: list[list[float]]) -> list[float]:
    """Return the largest lead over plain QAT at one step, and that step."""
    return max([round(other[1] - own[1], 6), own[0]] for own, other in zip(curve, plain, strict=True))


def compared(cell: Cell, runs: dict[str, dict[int, dict[str, Any]]]) -> dict[str, Any]:
    """Return mean and deviation of each variant's final loss, its paired difference to plain QAT, when it was there."""
    bits, act_bits, steps = cell
    result: dict[str, Any] = {"bits": bits, "act_bits": int(act_bits) if act_bits else None, "steps": steps}
    for variant in VARIANTS:
        if not (own := runs.get(variant)):
            continue
        pairs = [(own[seed], runs["base"][seed]) for seed in own if seed in runs.get("base", {})]
        losses = [run["loss"] for run in own.values()]
        differences = [run["loss"] - base["loss"] for run, base in pairs]
        at = [reached(run["curve"], base["loss"]) for run, base in pairs]
        result[variant] = {
            "seeds": sorted(own),
            "resets": [next(iter(own.values()))[name] for name in ("reset_every", "reset_weight")],
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


def markdown(found: dict[Cell, dict[str, dict[int, dict[str, Any]]]]) -> str:
    """Return the results as tables: final loss of plain QAT, the differences to it, and the steps to its end."""
    return "\n\n".join(_table(found, variants) for variants in TABLES)


def _table(found: dict[Cell, dict[str, dict[int, dict[str, Any]]]], variants: Sequence[str]) -> str:
    lines = [
        f"| bits, steps | base | {' | '.join(variants)} | largest lead of {variants[-1]} on the way, at step "
        f"| steps of {variants[-1]} to the end of base |",
        "|---|---|" + "---|" * len(variants) + "---|---|",
    ]
    for cell, runs in sorted(found.items(), key=lambda item: (item[0][2], item[0][1], item[0][0])):
        result = compared(cell, runs)
        if not any(variant in result for variant in variants) or "base" not in result:
            continue
        shown = [
            f"{cell[0]:g}{', A' + cell[1] if cell[1] else ''}, {cell[2]}",
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


def draw(path: Path, found: dict[Cell, dict[str, dict[int, dict[str, Any]]]]) -> None:
    """Draw the mean held-out loss of each variant by step, a panel for each cell."""
    panels = sorted(found.items(), key=lambda item: (item[0][2], item[0][1], item[0][0]))
    columns = min(4, max(len(panels), 1))
    rows = max(-(-len(panels) // columns), 1)
    figure = Figure(figsize=(3.2 * columns, 2.6 * rows), layout="constrained")
    for i, (cell, runs) in enumerate(panels):
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
        axes.set_title(f"{cell[0]:g} bits{', A' + cell[1] if cell[1] else ''}, {cell[2]} steps", fontsize=9)
        tidy(axes)
        if i == 0:
            axes.legend(fontsize=7, frameon=False)
            axes.set_ylabel("held-out bits per byte")
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    sys.exit(main())
