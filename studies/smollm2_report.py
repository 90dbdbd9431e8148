"""Table and picture of the study of SmolLM2."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from qatkernels.plotting import COLOURS, INK, tidy

from .results import Figures, Results

#: What variants are called, in the order in which they are drawn.
NAMES = {
    "qat": "trained on the text", "winq": "trained on the text, with WinQ",
    "distill": "trained to predict as in full precision",
    "winq+distill": "trained to predict as in full precision, with WinQ",
}  # fmt: skip


def report(results: Results, out: Path) -> str:
    """Draw smollm2.png, and return a table of what is finished."""
    draw(out / "smollm2.png", results.rows)
    lines = [
        "| | packed file | perplexity, rounded | trained | GGUF | in llama.cpp: perplexity | tokens/s |",
        "|---|---|---|---|---|---|---|",
    ]
    computed: set[str] = set()
    for row in results.rows:
        f = row["figures"]
        if row["case"] == "float":
            lines.append(
                f"| full precision (bfloat16) | {_mb(f['bytes'])} | | {f['perplexity']:.2f} | "
                f"| {_there(f.get('llama_cpp'))} |"
            )
            continue
        computed |= {f.get("precision", "float32")}
        lines.append(
            f"| {row['settings']['bits']:g} bits, {NAMES[row['settings']['variant']]} | {_mb(f['packed_bytes'])} "
            f"| {f['rounded']:,.2f} | {f['trained']:.2f} "
            f"| {_mb(f['bytes'])}, {', '.join(f['stored_as'])} "
            f"| {_there(f['llama_cpp'])} |"
        )
    if computed - {"float32"}:
        lines.append(f"\nPerplexities but those of llama.cpp are computed in {', '.join(sorted(computed))}.")
    return "\n".join(lines)


def _there(figures: Figures | None) -> str:
    """Return the cells of a file's perplexity and speed in llama.cpp."""
    if figures is None or "failed" in figures:
        return f"{figures['failed'] if figures else ''} | "
    return f"{figures['perplexity']:.2f} | {figures['tokens_per_second']:.0f}"


def _mb(nbytes: int) -> str:
    return f"{nbytes / 1e6:.0f} MB"


def draw(path: Path, rows: list[dict[str, Any]]) -> None:
    """Draw perplexity by width: rounded, and trained by each variant, beside full precision."""
    full = [row["figures"] for row in rows if row["case"] == "float"]
    trained = [row for row in rows if row["case"] != "float"]
    if not full or not trained:
        return
    figure = Figure(figsize=(6.4, 3.2), layout="constrained")
    axes = figure.add_subplot()
    axes.axhline(full[0]["perplexity"], color=INK, linewidth=1, label="full precision")
    widths: dict[float, Figures] = {row["settings"]["bits"]: row["figures"] for row in trained}
    places = {bits: i for i, bits in enumerate(sorted(widths, reverse=True))}
    points = [(-0.12, COLOURS[3], "rounded to nearest", {bits: f["rounded"] for bits, f in widths.items()})]
    for k, (variant, name) in enumerate(NAMES.items()):
        own = {row["settings"]["bits"]: row["figures"] for row in trained if row["settings"]["variant"] == variant}
        if own:
            points.append((0.06 * k, (*COLOURS[:3], COLOURS[4])[k], name, {b: f["trained"] for b, f in own.items()}))
    for shift, colour, name, values in points:
        axes.plot([places[bits] + shift for bits in values], list(values.values()), "o", color=colour, label=name)
        for bits, value in values.items():
            axes.annotate(f"{value:,.1f}", (places[bits] + shift, value), (0, 6), textcoords="offset points",
                          ha="center", fontsize=7)  # fmt: skip
    axes.set_yscale("log")
    shown = [value for *_, values in points for value in values.values()]
    axes.set_ylim(0.7 * min(shown), 2 * max(shown))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.set_xlim(-0.4, len(places) + 0.1)
    axes.set_xticks(range(len(places)), [f"{bits:g} bits, {_mb(widths[bits]['packed_bytes'])}" for bits in places])
    axes.set_title(f"SmolLM2-135M; {_mb(full[0]['bytes'])} in bfloat16", fontsize=9)
    axes.set_ylabel("perplexity of held-out text")
    axes.legend(fontsize=7, frameon=False, loc="upper left")
    tidy(axes)
    figure.savefig(path, dpi=150)
