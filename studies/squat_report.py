"""From a study's files to its results: ``python -m studies.squat_report``. Compares with LSQ, draws."""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from qatkernels import files
from qatkernels.plotting import COLOURS, tidy

#: Method and what it is called: LSQ, SQuAT, LSQ for twice the steps.
METHODS = {"lsq": "LSQ", "squat": "SQuAT", "lsq-twice": "LSQ, twice the steps"}
MEASURES: dict[str, Callable[[dict[str, Any]], float]] = {
    "accuracy": lambda x: 100 * x["test"]["accuracy"],
    "loss": lambda x: x["test"]["loss"],
    "train loss": lambda x: x["train_loss"],
    "sharpness": lambda x: x["sharpness"],
    "sharpness at 0.5": lambda x: x["sharpness at 0.5"],
    "largest eigenvalue": lambda x: x["lambda_max"],
    "seconds": lambda x: x["seconds"],
}
Runs = dict[tuple[int, str], dict[int, dict[str, Any]]]  # by width and method, then by seed


def main(argv: Sequence[str] | None = None) -> int:
    """Write results.json and squat.png, and print the table."""
    parser = argparse.ArgumentParser(prog="python -m studies.squat_report", description=__doc__)
    parser.add_argument("--study", type=Path, default=Path("runs/squat-cpu"), help="folder of studies.squat")
    parser.add_argument("--out", type=Path, default=Path("docs/results/squat-amd-epyc"))
    options = parser.parse_args(argv)
    study = files.read_json(options.study / "study.json")
    trainings = [files.read_json(path) for path in sorted(options.study.glob("seed*/*.json"))]
    runs, full = grouped(trainings, study["preset"]["epochs"][1], study["chosen"])
    table = [compared(bits, method, own, runs[bits, "lsq"]) for (bits, method), own in sorted(runs.items())]
    report = {"study": study, "full precision": estimate(full, MEASURES["accuracy"]), "rows": table}
    options.out.mkdir(parents=True, exist_ok=True)
    files.write_json(options.out / "results.json", {**report, "trainings": trainings})
    draw(options.out / "squat.png", runs, full)
    print(markdown(report))
    return 0


def grouped(
    trainings: Sequence[dict[str, Any]], epochs: int, chosen: dict[str, dict[str, float]]
) -> tuple[Runs, list[dict[str, Any]]]:
    """Return the reported trainings, and those in full precision; seed 0 made the choices."""
    runs: Runs = {}
    full = []
    for x in trainings:
        if x["seed"] == 0:
            continue
        if x["bits"] is None:
            full.append(x)
            continue
        right = chosen.get(str(x["bits"]))
        if right is None or x["lr"] != right["lr"] or x["rho"] not in (None, right["rho"]):
            continue  # of an earlier choice
        method = "squat" if x["rho"] is not None else "lsq" if x["epochs"] == epochs else "lsq-twice"
        runs.setdefault((x["bits"], method), {})[x["seed"]] = x
    return runs, full


def estimate(found: Sequence[dict[str, Any]], measure: Callable[[dict[str, Any]], float]) -> list[float]:
    """Return mean and standard deviation over seeds."""
    values = [measure(x) for x in found]
    return [statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0]


def compared(bits: int, method: str, own: dict[int, dict[str, Any]], base: dict[int, dict[str, Any]]) -> dict[str, Any]:
    """Return the measures of a method, and its differences to LSQ, seed by seed."""
    row: dict[str, Any] = {"bits": bits, "method": method, "seeds": sorted(own)}
    for name, measure in MEASURES.items():
        row[name] = estimate(list(own.values()), measure)
    gains = [MEASURES["accuracy"](own[seed]) - MEASURES["accuracy"](base[seed]) for seed in own if seed in base]
    row["gain"] = [statistics.mean(gains), statistics.stdev(gains) if len(gains) > 1 else 0.0] if gains else None
    return row


def markdown(report: dict[str, Any]) -> str:
    """Return the results as a table."""
    mean, deviation = report["full precision"]
    lines = [
        f"Full precision: {mean:.2f} ± {deviation:.2f} %",
        "",
        "| bits | method | accuracy, % | against LSQ, points | training loss | sharpness | at 0.5 | "
        "largest eigenvalue |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in report["rows"]:
        shown = [f"{row['accuracy'][0]:.2f} ± {row['accuracy'][1]:.2f}"]
        shown.append("" if row["method"] == "lsq" or not row["gain"] else "{:+.2f} ± {:.2f}".format(*row["gain"]))
        shown += [rounded(*row[n]) for n in list(MEASURES)[2:6]]
        lines.append(f"| {row['bits']} | {METHODS[row['method']]} | {' | '.join(shown)} |")
    return "\n".join(lines)


def rounded(mean: float, deviation: float) -> str:
    """Return both to the second digit of the deviation."""
    places = max(1 - math.floor(math.log10(deviation)), 0) if deviation > 0 else 3
    return f"{mean:.{places}f} ± {deviation:.{places}f}"


def draw(path: Path, runs: Runs, full: Sequence[dict[str, Any]]) -> None:
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


if __name__ == "__main__":
    sys.exit(main())
