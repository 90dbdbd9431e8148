"""Pictures of the documents that no study makes. ``python docs/_site/pictures.py`` writes them into docs/pictures.

They show what the library computes and what bench/results holds: nothing is drawn by hand.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

import qatkernels as qk
from qatkernels.grids import Grid, make_grid
from qatkernels.plotting import COLOURS, INK, QUIET, tidy

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "bench" / "results"
#: The grids that are drawn: each scheme at its usual width, `seq` and `lsq` at two.
DRAWN = (("binary", 1), ("ternary", 1.58), ("seq", 2), ("seq", 3), ("lsq", 2), ("lsq", 3), ("affine", 3))
#: Result file, shape of the weight and what its machine is called, for the picture of speeds.
MACHINES = (
    ("lowbit-amd-epyc.json", [4096, 4096], "two cores of an AMD EPYC, 4096 x 4096"),
    ("lowbit-intel-xeon-amx.json", [4096, 4096], "two cores of an Intel Xeon with AMX, 4096 x 4096"),
    ("lowbit-h100.json", [8192, 28672], "H100, 8192 x 28672, in CUDA graphs"),
)
LINES = (("lsq4", "packed", "4 bits"), ("seq2", "packed", "2 bits"), ("binary1", "packed", "1 bit"),
         ("lsq4", "packed, A8", "4 bits, 8-bit activations"))  # fmt: skip


def grids(path: Path) -> None:
    """Draw what each grid makes of a weight, where its gradient passes, and the derivative by the scale."""
    figure = Figure(figsize=(12, 6), layout="constrained")
    for i, (scheme, bits) in enumerate(DRAWN):
        grid = make_grid(scheme, bits)
        reach = max(abs(end) for end in (*grid.clamp, 1.0)) * 1.4
        w = torch.linspace(-reach, reach, 2001, dtype=torch.float64).unsqueeze(1).requires_grad_()
        y, dw, ds = derivatives(w, grid)
        axes = figure.add_subplot(2, 4, i + 1)
        passes = w[dw != 0]
        axes.axvspan(passes.min().item(), passes.max().item(), color=COLOURS[1], alpha=0.12, linewidth=0)
        axes.plot(*_broken(w, y), color=COLOURS[0], linewidth=2.2)
        axes.plot(*_broken(w, ds), color=COLOURS[2], linewidth=1.1)
        axes.set_title(f"{scheme}, {bits:g} {'bit' if bits == 1 else 'bits'}", fontsize=10)
        axes.set_xlabel("weight / scale")
        tidy(axes)
    axes = figure.add_subplot(2, 4, len(DRAWN) + 1)
    axes.axis("off")
    axes.legend(loc="center", frameon=False, fontsize=9, handles=[
        Line2D([], [], color=COLOURS[0], linewidth=2.2, label="quantized weight / scale"),
        Line2D([], [], color=COLOURS[2], linewidth=1.1, label="derivative of the quantized\nweight by the scale"),
        Patch(color=COLOURS[1], alpha=0.12, label="the gradient passes to the weight\nunchanged; elsewhere it is 0"),
    ])  # fmt: skip
    figure.savefig(path, dpi=110)


def derivatives(w: torch.Tensor, grid: Grid) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the quantized weights with scales of 1, and their derivatives by weight and by scale; all (N, 1)."""
    scale = torch.ones_like(w, requires_grad=True)  # a row, and so a scale, for each weight
    zero = torch.full_like(w, 3.0) if grid.has_zero_point else None
    y = qk.fake_quantize(w, scale, grid, zero_point=zero, grad_scale=1.0)
    dw, ds = torch.autograd.grad(y.sum(), (w, scale))
    return y.detach(), dw, ds


def _broken(w: torch.Tensor, y: torch.Tensor) -> tuple[list[float], list[float]]:
    """Return a line that is interrupted where y jumps, so that no slope is drawn where there is none."""
    xs, ys = w.detach().flatten().tolist(), y.flatten().tolist()
    jumps = [i for i in range(1, len(ys)) if abs(ys[i] - ys[i - 1]) > 0.1]
    for i in reversed(jumps):
        xs.insert(i, xs[i])
        ys.insert(i, float("nan"))
    return xs, ys


def speed(path: Path) -> None:
    """Draw how many times faster packed products are than bfloat16 nn.Linear, by tokens, a panel for each machine."""
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    for i, (name, shape, title) in enumerate(MACHINES):
        rows = json.loads((RESULTS / name).read_text(encoding="utf-8"))["rows"]
        axes = figure.add_subplot(1, len(MACHINES), i + 1)
        axes.axhline(1, color=INK, linewidth=1)
        ticks: set[int] = set()
        for colour, (grid, implementation, label) in zip(COLOURS, LINES, strict=False):
            points = speedups(rows, shape, grid, implementation)
            if points:
                axes.plot(
                    *zip(*points, strict=True), color=colour, marker="o", markersize=3.5, linewidth=1.4, label=label
                )
                ticks.update(tokens for tokens, _ in points)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        labelled = [t for t in sorted(ticks) if t != 2048]  # which has no room beside 4096
        axes.set_xticks(labelled, [str(t) for t in labelled], fontsize=8)
        axes.set_yticks([0.5, 1, 2, 4, 8, 16], ["½", "1", "2", "4", "8", "16"])
        axes.set_ylim(0.4, 20)
        axes.minorticks_off()
        axes.set_title(title, fontsize=9)
        axes.set_xlabel("tokens")
        axes.text(0.01, 1.06, "nn.Linear", color=QUIET, fontsize=8, transform=axes.get_yaxis_transform())
        tidy(axes)
        if i == 0:
            axes.set_ylabel("times as fast as bfloat16 nn.Linear")
        if i == 1:  # which has all four
            axes.legend(fontsize=8, frameon=False)
    figure.savefig(path, dpi=110)


def speedups(rows: list[dict[str, Any]], shape: list[int], grid: str, implementation: str) -> list[tuple[int, float]]:
    """Return tokens and speed over nn.Linear's of the bfloat16 products with a scale for each row."""
    times: dict[str, dict[int, float]] = {}
    for row in rows:
        if (row["op"], row["shape"], row["grid"], row["granularity"], row["dtype"], row["status"]) == (
            "packed linear", shape, grid, "per row", "bfloat16", "ok"
        ):  # fmt: skip
            times.setdefault(row["implementation"], {})[int(row["variant"].split()[0])] = row["median_ms"]
    ours, linear = times.get(implementation, {}), times.get("nn.Linear bfloat16", {})
    return [(tokens, linear[tokens] / ours[tokens]) for tokens in sorted(ours.keys() & linear.keys())]


PICTURES = {"grids.png": grids, "speed.png": speed}


def main() -> None:
    """Write all pictures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "pictures", help="folder (default: docs/pictures)")
    out: Path = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    for name, draw in PICTURES.items():
        draw(out / name)


if __name__ == "__main__":
    main()
