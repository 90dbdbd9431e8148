"""Table and picture of the study of SQuAT."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from qatkernels.plotting import COLOURS, tidy

from .results import Figures, Results, Row

#: Method and what it is called: LSQ, SQuAT, LSQ for twice the steps.
METHODS = {"lsq": "LSQ", "squat": "SQuAT", "lsq-twice": "LSQ, twice the steps"}
MEASURES: dict[str, Callable[[Figures], float]] = {
    "accuracy": lambda x: 100 * x["test"]["accuracy"],
    "loss": lambda x: x["test"]["loss"],
    "train loss": lambda x: x["train_loss"],
    "sharpness": lambda x: x["sharpness"],
    "sharpness at 0.5": lambda x: x["sharpness at 0.5"],
    "largest eigenvalue": lambda x: x["lambda_max"],
    "seconds": lambda x: x["seconds"],
}
Runs = dict[tuple[int, str], dict[int, Figures]]  # by width and method, then by seed


def report(results: Results, folder: Path) -> str:
    """Draw squat.png, and return the table."""
    runs, full = grouped(results)
    if not full or not runs:
        return "too few trainings are finished for a table"
    table = [compared(bits, method, own, runs.get((bits, "lsq"), {})) for (bits, method), own in sorted(runs.items())]
    draw(folder / "squat.png", runs, full)
    return markdown(estimate(full, MEASURES["accuracy"]), table)


def merit(figures: Figures) -> tuple[float, float]:
    """Return by what trainings are chosen: right about most validation sentences, of two equals the lower loss."""
    return figures["validation"]["accuracy"], -figures["validation"]["loss"]


def choices(results: Results) -> dict[int, Row]:
    """Return the training of SQuAT's on seed 0 that chose learning rate and rho, for each width that has one."""
    tried = [row for row in results.rows if row["seed"] == 0 and row["settings"]["bits"]]
    found = {}
    for bits in sorted({row["settings"]["bits"] for row in tried}):
        own = [row for row in tried if row["settings"]["bits"] == bits]
        plain = [row for row in own if row["settings"]["rho"] is None]
        rate = max(plain, key=lambda row: merit(row["figures"]))["settings"]["lr"]
        squat = [row for row in own if row["settings"]["rho"] and row["settings"]["lr"] == rate]
        if squat:
            found[bits] = max(squat, key=lambda row: merit(row["figures"]))
    return found


def grouped(results: Results) -> tuple[Runs, list[Figures]]:
    """Return the reported trainings by width and method, and those in full precision.

    Seed 0 only chose. Trainings with another learning rate or rho than the chosen ones are not reported.
    """
    chosen = {bits: row["settings"] for bits, row in choices(results).items()}
    runs: Runs = {}
    full = []
    for row in results.rows:
        own = row["settings"]
        right = chosen.get(own["bits"])
        if row["seed"] == 0:
            continue
        if own["bits"] is None:
            full.append(row["figures"])
        elif right is not None and own["lr"] == right["lr"] and own["rho"] in (None, right["rho"]):
            plain = "lsq" if own["epochs"] == right["epochs"] else "lsq-twice"
            method = plain if own["rho"] is None else "squat"
            runs.setdefault((own["bits"], method), {})[row["seed"]] = row["figures"]
    return runs, full


def estimate(found: Sequence[Figures], measure: Callable[[Figures], float]) -> list[float]:
    """Return mean and standard deviation over seeds."""
    values = [measure(x) for x in found]
    return [statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0]


def compared(bits: int, method: str, own: dict[int, Figures], base: dict[int, Figures]) -> dict[str, Any]:
    """Return the measures of a method, and its differences to LSQ, seed by seed."""
    row: dict[str, Any] = {"bits": bits, "method": method, "seeds": sorted(own)}
    for name, measure in MEASURES.items():
        row[name] = estimate(list(own.values()), measure)
    gains = [MEASURES["accuracy"](own[seed]) - MEASURES["accuracy"](base[seed]) for seed in own if seed in base]
    row["gain"] = [statistics.mean(gains), statistics.stdev(gains) if len(gains) > 1 else 0.0] if gains else None
    return row


def markdown(full: Sequence[float], table: Sequence[dict[str, Any]]) -> str:
    """Return the results as a table."""
    mean, deviation = full
    lines = [
        f"Full precision: {mean:.2f} ± {deviation:.2f} %",
        "",
        "| bits | method | accuracy, % | against LSQ, points | training loss | sharpness | at 0.5 | "
        "largest eigenvalue |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in table:
        shown = [f"{row['accuracy'][0]:.2f} ± {row['accuracy'][1]:.2f}"]
        shown.append("" if row["method"] == "lsq" or not row["gain"] else "{:+.2f} ± {:.2f}".format(*row["gain"]))
        shown += [rounded(*row[n]) for n in list(MEASURES)[2:6]]
        lines.append(f"| {row['bits']} | {METHODS[row['method']]} | {' | '.join(shown)} |")
    return "\n".join(lines)


def rounded(mean: float, deviation: float) -> str:
    """Return both to the second digit of the deviation."""
    places = max(1 - math.floor(math.log10(deviation)), 0) if deviation > 0 else 3
    return f"{mean:.{places}f} ± {deviation:.{places}f}"


def draw(path: Path, runs: Runs, full: Sequence[Figures]) -> None:
    """Draw accuracy and the largest eigenvalue of every seed by width."""
    figure = Figure(figsize=(7.2, 2.8), layout="constrained")
    widths = sorted({bits for bits, _ in runs})
    for i, name in enumerate(("accuracy", "largest eigenvalue")):
        axes = figure.add_subplot(1, 2, i + 1)
        for k, (method, label) in enumerate(METHODS.items()):
            for j, bits in enumerate(widths):
                values = [MEASURES[name](x) for x in runs.get((bits, method), {}).values()]
                axes.plot([j + 0.22 * (k - 1)] * len(values), values, "o", color=COLOURS[k], markersize=4,
                          label=None if j else label)  # fmt: skip
        if name == "accuracy":
            axes.axhline(estimate(full, MEASURES[name])[0], color="0.6", linewidth=0.8, label="full precision")
            axes.set_ylabel("test accuracy, %")
            axes.legend(fontsize=7, frameon=False)
        else:
            axes.set_yscale("log")
            axes.set_ylabel("largest eigenvalue")
        axes.set_xticks(range(len(widths)), [f"{bits} bits" for bits in widths])
        tidy(axes)
    figure.savefig(path, dpi=150)
