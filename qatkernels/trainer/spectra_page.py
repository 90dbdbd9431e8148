"""Spectra of checkpoints as HTML (`qatkernels.page`): a page of their own, or a section of the page of a run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ..charts import Chart, Line, Point
from ..page import Markup, Page, facts, figure, figures, joined, paragraph, table

Report = Mapping[str, Any]
#: Decades of |eigenvalue| that the axis of the densities has on both sides of zero, 10^-6 to 10^4.
_FINEST = -6
#: Half of the room between 10^-6 and zero, in decades.
_GAP = 0.5


def page(report: Report) -> bytes:
    """Return the page of a report of ``qatkernels spectrum``."""
    text, settings = report["text"], report["settings"]
    drawn = Page(
        "Spectra of the Hessian",
        f"{len(report['checkpoints'])} checkpoints; loss on windows of {text['context']} tokens of {text['source']}; "
        f"{settings['probes']} probes, {settings['steps']} Lanczos steps",
    )
    drawn.add("Spectra", *blocks(report))
    drawn.add("Settings", facts(settings))
    drawn.add("Machine and text", facts(report["machine"]), facts({"text": text["source"], "sha256": text["sha256"]}))
    return drawn.encode()


def blocks(report: Report) -> list[Markup]:
    """Return the table and the charts of a report."""
    groups: dict[str, list[Report]] = {}
    for entry in report["checkpoints"]:
        groups.setdefault(entry["phase"], []).append(entry)
    drawn = [_density(name, group, groups) for name, group in _panels(groups).items()]
    if any(len(group) > 1 for group in groups.values()):
        drawn += [_masses(report, groups), _extremes(groups)]
    return [_table(report), figures(*drawn)]


def _table(report: Report) -> Markup:
    near = report["settings"]["near_zero"]
    head = (
        "checkpoint", "step", "bits", "bits per byte", "smallest", "largest", f"below {near:g} in magnitude, %",
        "allowed", f"below -{near:g}, %", "allowed", "trace", "sharpness", "gradient", "clamped, %",
    )  # fmt: skip
    rows = []
    for entry in report["checkpoints"]:
        found = entry["spectrum"]
        rows.append([
            entry["name"], entry["step"], "32" if entry["bits"] is None else f"{entry['bits']:g}",
            f"{entry['bits_per_byte']:.3f}", f"{found['lambda_min']:.4g}", f"{found['lambda_max']:.4g}",
            _estimate(found["near_zero_mass"], 100), _bounds(found["near_zero_bounds"]),
            _estimate(found["negative_mass"], 100), _bounds(found["negative_bounds"]), _estimate(found["trace"], 1),
            f"{entry['sharpness'].get('quantized', entry['sharpness']['latent']):.3g}",
            f"{entry['gradient_norm_ratio']:.3g}", f"{100 * entry['clamped']:.2f}",
        ])  # fmt: skip
    how = (
        "Eigenvalues of the Hessian of the loss in nats with respect to the quantized weights. ± is the standard error "
        "over the probes. Allowed is the range that the Lanczos steps leave open: where it is wide, the share beside "
        "it is not resolved, and more --steps are needed. Clamped weights have a zero row in the Hessian."
    )
    return joined(table(head, rows), paragraph(how))


def _estimate(estimate: Mapping[str, float | None], factor: float) -> str:
    value, error = estimate["value"] or 0.0, estimate["error"]
    return f"{factor * value:.4g}" + ("" if error is None else f" ± {factor * error:.2g}")


def _bounds(bounds: Sequence[float]) -> str:
    return " to ".join(f"{100 * bound:.1f}" for bound in bounds)


def _panels(groups: Mapping[str, list[Report]]) -> dict[str, list[Report]]:
    """Return a panel for each phase with several checkpoints, or one for all."""
    several = {name: group for name, group in groups.items() if len(group) > 1}
    return several or {"": [entry for group in groups.values() for entry in group]}


def _density(name: str, entries: list[Report], groups: Mapping[str, list[Report]]) -> Markup:
    """Return the chart of densities; phases with one checkpoint are drawn beside those with several."""
    alone = [group[0] for phase, group in groups.items() if name and len(group) == 1 and phase != name]
    lines = [Line(_label(entry), _steps(entry["spectrum"]["bins"]), None, "dashed") for entry in alone]
    lines += [Line(_label(entry), _steps(entry["spectrum"]["bins"]), i) for i, entry in enumerate(entries)]
    ends = [x for line in lines for x, _ in line.points]
    ticks = [(_position(v), _tick(v)) for v in (-1e4, -1e2, -1, -1e-2, -1e-4, 0, 1e-4, 1e-2, 1, 1e2, 1e4)]
    return figure(
        Chart(
            "Density of eigenvalues" + (f", {name}" if name else ""), lines, "eigenvalue (logarithmic on both sides)",
            "share of all eigenvalues in a bin (logarithmic)", log_y=True, percent=True,
            x_ticks=[tick for tick in ticks if ends and min(ends) <= tick[0] <= max(ends)],
        ),
        "Four bins to a decade of magnitude, negative eigenvalues to the left of 0. Mass in the middle is flat "
        "directions; the right end is the largest curvature, which limits the learning rate; mass on the left is "
        "directions in which the loss bends down. Single peaks close to 0 are nodes of the estimate rather than "
        "eigenvalues: the table's \"allowed\" says how far they may be off.",
    )  # fmt: skip


def _label(entry: Report) -> str:
    return f"{entry['phase']}, step {entry['step']}"


def _position(value: float) -> float:
    """Return where an eigenvalue is on the axis, in decades from zero."""
    return math.copysign(max(math.log10(abs(value)) - _FINEST, 0.0) + _GAP, value) if value else 0.0


def _tick(value: float) -> str:
    power = f"{abs(value):.0e}".replace("e-0", "e-").replace("e+0", "e")
    return "0" if not value else ("-" if value < 0 else "") + ("1" if abs(value) == 1 else power)


def _steps(bins: Mapping[str, Sequence[float]]) -> list[Point]:
    """Return the outline of a histogram; on a logarithmic axis it has a gap where bins are empty."""
    edges = bins["edges"]
    points: list[Point] = []
    for low, high, mass in zip(edges[:-1], edges[1:], bins["mass"], strict=True):
        points += [(_position(low), mass), (_position(high), mass)]
    return points


def _over_steps(groups: Mapping[str, list[Report]]) -> list[tuple[str, int | None, list[tuple[float, Report]]]]:
    """Return the name, the colour and the spectra by step of each phase.

    A phase with one checkpoint is what the others are compared with: it has no colour, and the same value at both ends
    of the axis. Phases are shifted a little against each other, so that their marks can be told apart.
    """
    steps = [entry["step"] for group in groups.values() if len(group) > 1 for entry in group]
    ends, shift = (min(steps), max(steps)), 0.012 * (max(steps) - min(steps))
    rows: list[tuple[str, int | None, list[tuple[float, Report]]]] = []
    for index, (name, group) in enumerate(groups.items()):
        if len(group) == 1:
            rows.append((name, None, [(float(end), group[0]["spectrum"]) for end in ends]))
        else:
            rows.append((name, index, [(entry["step"] + index * shift, entry["spectrum"]) for entry in group]))
    return rows


def _masses(report: Report, groups: Mapping[str, list[Report]]) -> Markup:
    lines = []
    for name, colour, found in _over_steps(groups):
        points = [(step, s["near_zero_mass"]["value"]) for step, s in found]
        ranges = [] if colour is None else [(step, *s["near_zero_bounds"]) for step, s in found]
        lines.append(Line(name, points, colour, "dashed" if colour is None else "", colour is not None, ranges))
    near = report["settings"]["near_zero"]
    return figure(
        Chart(f"Eigenvalues below {near:g} in magnitude", lines, "training step", "share of all", percent=True),
        "Marks are estimates, bars what the Lanczos steps leave open. Two checkpoints differ where their bars do not "
        "overlap.",
    )


def _extremes(groups: Mapping[str, list[Report]]) -> Markup:
    lines = []
    for name, colour, found in _over_steps(groups):
        largest = [(step, s["lambda_max"]) for step, s in found]
        smallest = [(step, -s["lambda_min"]) for step, s in found]
        several = colour is not None
        lines += [
            Line(name, largest, colour, "" if several else "dashed", several),
            Line("", smallest, colour, "dotted", several),
        ]
    return figure(
        Chart("Largest and smallest eigenvalue", lines, "training step", "magnitude (logarithmic)", log_y=True),
        "Full and dashed lines are the largest eigenvalue, dotted lines minus the smallest. A plain gradient step is "
        "stable up to a learning rate of 2 over the largest eigenvalue.",
    )
