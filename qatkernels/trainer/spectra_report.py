"""Spectra of several checkpoints as a table and as JSON.

An *entry* is a dictionary with ``name``, ``phase``, ``step``, ``bits``, ``bits_per_byte``, ``clamped``,
``gradient_norm_ratio``, ``sharpness`` and ``spectrum`` (:meth:`Spectrum.to_dict`).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.table import Table

from ..hessian import Spectrum

#: Logarithmic bins of the density: exponents of the smallest and largest edge, and bins per decade. The same bins serve
#: negative eigenvalues, and one bin between them is for values closer to zero.
_FINEST, _COARSEST, _PER_DECADE = -6, 4, 4


#: Thresholds of the near-zero mass in a report, from that of WinQ's paper to one that a few Lanczos steps resolve.
THRESHOLDS = (1.5e-3, 5e-3, 1e-2, 2e-2, 5e-2, 1e-1)


def masses(result: Spectrum) -> list[dict[str, Any]]:
    """Return near-zero and negative mass at several thresholds: value, standard error, and bounds on the value."""

    def mass(low: float, high: float) -> dict[str, float | None]:
        least, most = result.bounds(low, high)
        return result.mass(low, high).to_dict() | {"least": least, "most": most}

    return [{"below": t, "near_zero": mass(-t, t), "negative": mass(-math.inf, -t)} for t in THRESHOLDS]


def bins(result: Spectrum) -> dict[str, list[float]]:
    """Return the mass in logarithmic bins: edges, mean over the probes, standard error."""
    decades = torch.arange(_FINEST * _PER_DECADE, _COARSEST * _PER_DECADE + 1, dtype=torch.float64) / _PER_DECADE
    edges = torch.cat([-(10**decades).flip(0), 10**decades])
    masses = torch.stack(
        [torch.histogram(t, edges, weight=w).hist for t, w in zip(result.ritz, result.weights, strict=True)]
    )
    used = masses.sum(0).nonzero().flatten()
    first, last = int(used[0]), int(used[-1]) + 1
    masses = masses[:, first:last]
    error = masses.std(0) / len(masses) ** 0.5 if len(masses) > 1 else torch.zeros_like(masses[0])
    rows = {"edges": edges[first : last + 1], "mass": masses.mean(0), "error": error}
    return {name: [float(f"{x:.4g}") for x in row.tolist()] for name, row in rows.items()}


def summary(entry: dict[str, Any]) -> dict[str, Any]:
    """Return an entry with bins instead of all Ritz values."""
    full = entry["spectrum"]
    short = {k: v for k, v in full.items() if k not in ("ritz", "weights", "residuals")}
    rest = {k: v for k, v in entry.items() if k not in ("identity", "spectrum")}
    spectrum = Spectrum.from_dict(full)
    return rest | {"spectrum": short | {"masses": masses(spectrum), "bins": bins(spectrum)}}


def line(entry: dict[str, Any]) -> str:
    """Return one checkpoint's result as a line of text."""
    found = entry["spectrum"]
    return (
        f"eigenvalues {found['lambda_min']:.4g} ... {found['lambda_max']:.4g}, near zero "
        f"{_percent(found['near_zero_mass'])} (steps allow {_range(found['near_zero_bounds'])}), "
        f"negative {_percent(found['negative_mass'])}"
    )


def _range(bounds: list[float]) -> str:
    least, most = (100 * x for x in bounds)
    return f"{least:.1f}-{most:.1f}"


def _percent(estimate: dict[str, float | None], unit: str = "%") -> str:
    error = estimate["error"]
    return f"{100 * (estimate['value'] or 0):.2f}{unit}" + ("" if error is None else f" ± {100 * error:.2f}")


def table(report: dict[str, Any]) -> Table:
    """Return the report as a table for the terminal."""
    near = report["settings"]["near_zero"]
    result = Table(
        box=SIMPLE_HEAD, title_justify="left",
        title=f"Hessian of the loss in nats at the quantized weights; near zero: below {near:g}; ± standard error;\n"
        "allowed: what the Lanczos steps leave open",
    )  # fmt: skip
    names = (
        "checkpoint", "step", "smallest", "largest", "near zero %", "allowed", "negative %", "allowed", "trace",
        "sharpness", "gradient",
    )  # fmt: skip
    for name in names:
        result.add_column(name, justify="left" if name == "checkpoint" else "right", no_wrap=True)
    for entry in report["checkpoints"]:
        found = entry["spectrum"]
        trace, sharp = found["trace"], entry["sharpness"]
        result.add_row(
            entry["name"], str(entry["step"]), f"{found['lambda_min']:.4g}", f"{found['lambda_max']:.4g}",
            _percent(found["near_zero_mass"], ""), _range(found["near_zero_bounds"]),
            _percent(found["negative_mass"], ""), _range(found["negative_bounds"]),
            f"{trace['value']:.4g}" + ("" if trace["error"] is None else f" ± {trace['error']:.2g}"),
            f"{sharp.get('quantized', sharp['latent']):.3g}", f"{entry['gradient_norm_ratio']:.3g}",
        )  # fmt: skip
    return result
