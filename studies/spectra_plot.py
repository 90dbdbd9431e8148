"""The picture of spectra for the documents: densities, and mass near zero and extreme eigenvalues over training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from qatkernels.hessian import Spectrum
from qatkernels.plotting import COLOURS, INK, tidy


def plot(entries: list[dict[str, Any]], path: Path) -> None:
    """Draw densities, and near-zero mass and extreme eigenvalues over training, into a PNG file."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for entry in entries:
        groups.setdefault(entry["phase"], []).append(entry)
    alone = [group[0] for group in groups.values() if len(group) == 1]
    several = {name: group for name, group in groups.items() if len(group) > 1}
    figure = Figure(figsize=(13, 8), dpi=130, layout="constrained")
    upper, lower = figure.subfigures(2, 1, squeeze=False)[:, 0]
    # One panel for each run with several checkpoints. Single checkpoints are drawn into every panel as a reference, or
    # into one panel if there is no such run.
    panels = list(several.values()) or [alone]
    axes = upper.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    spectra = {id(e): Spectrum.from_dict(e["spectrum"]) for e in entries}
    for panel, group in zip(axes, panels, strict=True):
        shown = [*alone, *group] if several else group
        sigma, low, high, outside = _window([spectra[id(entry)] for entry in shown])
        for index, entry in enumerate(shown):
            colour: Any = INK
            if not several:
                colour = COLOURS[index % len(COLOURS)]
            elif index >= len(alone):
                colour = colormaps["viridis"](0.9 * (index - len(alone)) / max(len(group) - 1, 1))
            _draw_density(panel, spectra[id(entry)], torch.linspace(low, high, 2000).double(), sigma, colour, entry)
        panel.set_title(group[0]["phase"] if several else "densities", loc="left", fontweight="bold")
        panel.legend(frameon=False, fontsize=8)
        panel.set_xlabel("eigenvalue" + (f" (from {outside[0]:.3g} to {outside[1]:.3g})" if outside else ""))
    axes[0].set_ylabel("density (log scale)")
    mass, extremes = lower.subplots(1, 2)
    _draw_training(mass, extremes, groups)
    for ax in figure.get_axes():
        tidy(ax)
    figure.savefig(path)


def _window(spectra: list[Spectrum]) -> tuple[float, float, float, tuple[float, float] | None]:
    """Return the width of the Gaussians and the limits of the axis, and the extreme eigenvalues if outside them.

    The limits fit the spectra that are at most three times as wide as the median one.
    """
    spreads = sorted(s.lambda_max - s.lambda_min for s in spectra)
    widest = max(3 * spreads[(len(spreads) - 1) // 2], 1e-6)
    shown = [s for s in spectra if s.lambda_max - s.lambda_min <= widest]
    low, high = min(s.lambda_min for s in shown), max(s.lambda_max for s in shown)
    extremes = min(s.lambda_min for s in spectra), max(s.lambda_max for s in spectra)
    sigma = max(0.01 * (high - low), 1e-6)
    return sigma, low - 5 * sigma, high + 5 * sigma, extremes if len(shown) < len(spectra) else None


def _label(entry: dict[str, Any]) -> str:
    return f"{entry['phase']}, step {entry['step']}"


def _draw_density(
    axes: Axes, result: Spectrum, grid: torch.Tensor, sigma: float, colour: Any, entry: dict[str, Any]
) -> None:
    points, density, error = result.density(grid, sigma)
    axes.plot(points, density, color=colour, linewidth=1.4, label=_label(entry))
    if len(result.ritz) > 1:
        axes.fill_between(
            points, (density - error).clamp_min(1e-12), density + error, color=colour, alpha=0.2, linewidth=0
        )
    axes.set_yscale("log")
    axes.set_ylim(bottom=1e-7)


def _draw_training(mass: Axes, extremes: Axes, groups: dict[str, list[dict[str, Any]]]) -> None:
    """Draw the near-zero mass, and the largest and smallest eigenvalue, over the steps of each run."""
    curves = any(len(group) > 1 for group in groups.values())
    for index, (name, group) in enumerate(groups.items()):
        found = [entry["spectrum"] for entry in group]
        values = [100 * f["near_zero_mass"]["value"] for f in found]
        largest, smallest = [f["lambda_max"] for f in found], [-min(f["lambda_min"], 0.0) for f in found]
        if curves and len(group) == 1:  # a single checkpoint is the reference that the runs started from
            mass.axhline(values[0], color=INK, linewidth=1, linestyle="--", label=name)
            extremes.axhline(largest[0], color=INK, linewidth=1, linestyle="--", label=name)
            extremes.axhline(smallest[0], color=INK, linewidth=1, linestyle=":")
            continue
        colour = COLOURS[index % len(COLOURS)]
        steps = [entry["step"] for entry in group]
        errors = [100 * (f["near_zero_mass"]["error"] or 0) for f in found]
        allowed = [[100 * bound for bound in f["near_zero_bounds"]] for f in found]
        shifted = [step + (index - 0.5 * len(groups)) * 0.004 * max(steps) for step in steps]
        mass.vlines(shifted, *zip(*allowed, strict=True), color=colour, linewidth=4, alpha=0.25)
        mass.errorbar(shifted, values, errors, color=colour, marker="o", markersize=4, capsize=2, label=name)
        extremes.plot(steps, largest, color=colour, marker="o", markersize=4, label=name)
        extremes.plot(steps, smallest, color=colour, marker="v", markersize=4, linestyle=":")
    near = next(iter(groups.values()))[0]["spectrum"]["near_zero"]
    mass.set_title(f"% of eigenvalues below {near:g}; bars: what the steps allow", loc="left", fontweight="bold")
    extremes.set_title("largest eigenvalue; dotted: minus the smallest", loc="left", fontweight="bold")
    extremes.set_yscale("log")
    for axes in (mass, extremes):
        axes.set_xlabel("training steps of the run")
        axes.legend(frameon=False)
