"""The page of a run: its report as HTML (`qatkernels.page`)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

from ..charts import Chart, Line, histogram
from ..options import settings_of
from ..page import Markup, Page, facts, figure, figures, folded, joined, paragraph, table, tag
from ..units import human
from . import spectra_page

#: What the log has beside losses, rates and counts of codes: what a method measures, and how to read it.
_OF_METHODS = {
    "sharpness": (
        "Sharpness", "loss in nats",
        "How much the loss rises at the worst weights near the quantized ones. SQuAT is there to lower it; one that "
        "grows says that training moves into a narrower valley.",
    ),
    "perturbation_norm": (
        "Norm of the perturbation", "norm", "How far SQuAT moves the weights to measure the sharpness.",
    ),
    "resets": (
        "Resets", "resets so far", "How often WinQ has moved master weights towards their levels.",
    ),
}  # fmt: skip
#: Layers up to which the histograms are shown without a click.
_FEW_LAYERS = 16

Report = Mapping[str, Any]


def page(report: Report, spectra: Mapping[str, Report] | None = None) -> bytes:
    """Return the page of a run.

    Args:
        report: the report (`report.write`); that of an interrupted run may have no result.
        spectra: reports of ``qatkernels spectrum`` on this run, by the name of their folder.
    """
    config = report["config"]
    text, sizes = report["text"], ""
    if report["parameters"] is not None:
        quantized = report["quantized_parameters"]
        sizes = f"{report['parameters']:,} parameters" + (f", {quantized:,} of them quantized; " if quantized else "; ")
    drawn = Page(
        f"Training run {config['out']}",
        f"{sizes}trained on {text['train_bytes']:,} bytes in {text['train_files']} files of {text['source']}; "
        f"{text['held_out_bytes']:,} bytes in {text['held_out_files']} files held out",
    )
    drawn.add("Result", *_stop(report), *_notes(report), *_result(report))
    drawn.add("Curves", figures(_losses(report), *_qat_losses(report), _training_losses(report), _rates(report)))
    drawn.add("Quantized weights", *_quantized(report))
    drawn.add("Codes by layer", *_codes(report))
    for name, spectrum in (spectra or {}).items():
        drawn.add(f"Spectrum of the Hessian ({name})", *spectra_page.blocks(spectrum))
    drawn.add("Settings", *_settings(config))
    drawn.add("Machine and text", facts(report["machine"]), facts({"text": text["source"], "sha256": text["sha256"]}))
    return drawn.encode()


def _stop(report: Report) -> list[Markup]:
    if report.get("stopped") is None:
        return []
    left = [name for name in report["starts"] if name not in _finished(report)]
    return [
        tag("p", f"This run is not finished: {report['stopped']}. Not finished: {', '.join(left)}.", "note bad"),
    ]


def _finished(report: Report) -> set[str]:
    return {row["phase"] for row in (report["full_precision"], *report["rows"]) if row}


def _notes(report: Report) -> list[Markup]:
    return [tag("p", f"{e['phase']}, step {e['step']}: {e['note']}", "note") for e in report.get("notes", ())]


def _result(report: Report) -> list[Markup]:
    if report["full_precision"] is None:
        return [paragraph("No phase is finished yet.")]
    head = (
        "bits", "full precision", "rounded to nearest", "after QAT", "quantized weights, bytes", "whole model, bytes",
        "steps", "seconds", "tokens/s",
    )  # fmt: skip
    rows = []
    for row in (report["full_precision"], *report["rows"]):
        losses = (row["full_precision"], row["round_to_nearest"], row["qat"])
        rows.append([
            f"{row['bits']:g}", *(None if value is None else f"{value:.3f}" for value in losses),
            *(None if row[name] is None else f"{row[name]:,}" for name in ("quantized_bytes", "model_bytes", "steps")),
            f"{row['seconds']:.1f}", human(row["tokens_per_second"]),
        ])  # fmt: skip
    how = (
        "Losses are bits per byte on held-out text: lower is better. Rounded to nearest is the full-precision model "
        "with its weights rounded and not trained again; after QAT, the same width after training. What QAT is worth "
        "is the difference of the two."
    )
    fused = "With the fused schedule only QAT decays: full-precision losses are at the constant learning rate."
    return [table(head, rows, words=0), paragraph(how), *([paragraph(fused)] if _is_fused(report) else [])]


def _is_fused(report: Report) -> bool:
    return bool(report["config"].get("schedule") == "fused")


def _bits(report: Report) -> dict[str, float | None]:
    """Return the bit width of each phase that has curves, None for full precision."""
    widths = {row["phase"]: row["bits"] for row in report["rows"]} | dict(report.get("bits", {}))
    return {name: widths.get(name) for name in report["curves"]}


def _lines(report: Report, kind: str, *, quantized: bool = False, **style: Any) -> list[Line]:
    """Return a line for each phase over the steps of the run: full precision in ink, each bit width in a colour."""
    lines: list[Line] = []
    colour = 0
    for name, bits in _bits(report).items():
        first = report["starts"][name][1]
        points = [(first + step, value) for step, value in report["curves"][name].get(kind, ())]
        if bits is not None or not quantized:
            label = "full precision" if bits is None else f"{bits:g} bit" + ("" if bits == 1 else "s")
            label = "" if label in [line.label for line in lines] else label
            lines.append(Line(label, points, None if bits is None else colour, **style))
        colour += bits is not None
    return lines


def _first_of_qat(report: Report) -> list[float]:
    """Return the steps at which quantized phases start."""
    return sorted({float(report["starts"][name][1]) for name, bits in _bits(report).items() if bits is not None})


def _losses(report: Report) -> Markup:
    chart = Chart(
        "Held-out loss", _lines(report, "held_out", marks=True), "step", "bits per byte (logarithmic)", log_y=True,
        verticals=_first_of_qat(report),
    )  # fmt: skip
    return figure(
        chart,
        "Lower is better. At a dotted vertical line the full-precision weights are rounded: the first mark of a colour "
        "is the loss of rounding alone, its last mark the loss after QAT. A width whose line ends at the height of "
        "full precision has lost nothing.",
    )


def _qat_losses(report: Report) -> list[Markup]:
    """Return the chart of the quantized phases alone, in which their differences can be seen."""
    lines, full = _lines(report, "held_out", quantized=True, marks=True), report["full_precision"]
    steps = [x for line in lines for x, _ in line.points]
    if not steps or full is None:
        return []
    end = full["full_precision"]
    reference = Line("end of full precision", [(min(steps), end), (max(steps), end)], None, "dashed")
    chart = Chart("Held-out loss in QAT", [reference, *lines], "step", "bits per byte (logarithmic)", log_y=True)
    how = (
        "The right end of the picture before it. Below the dashed line a width is better than full precision was when "
        "QAT began; QAT also trains on."
    )
    return [figure(chart, how)]


def _training_losses(report: Report) -> Markup:
    chart = Chart(
        "Training loss", _lines(report, "train"), "step", "bits per byte (logarithmic)", log_y=True,
        verticals=_first_of_qat(report),
    )  # fmt: skip
    distilled = report["config"].get("distill")
    return figure(
        chart,
        "The loss of each logged batch, so it scatters. A line that rises or jumps within a phase says that the "
        "learning rate is too large; one far below the held-out loss says that the model learns the text by heart."
        + (" With distillation it is the mixed loss, which differs from the held-out loss." if distilled else ""),
    )


def _rates(report: Report) -> Markup:
    chart = Chart(
        "Learning rate", _lines(report, "lr"), "step", "learning rate of the weights", verticals=_first_of_qat(report)
    )
    return figure(chart, "Each phase warms up and decays as its schedule says. Scales have a rate of their own.")


def _quantized(report: Report) -> list[Markup]:
    if not any(bits is not None for bits in _bits(report).values()):
        return []
    drawn = []
    flips = _lines(report, "flips", quantized=True)
    if any(line.points for line in flips):
        drawn += [_flips(report, flips), _distances(report)]
    for kind, (title, unit, how) in _OF_METHODS.items():
        lines = _lines(report, kind, quantized=True)
        if any(line.points for line in lines):
            drawn.append(figure(Chart(title, lines, "step", unit), how))
    floors = _lines(report, "scales_at_floor", quantized=True)
    blocks = []
    if any(value > 0 for line in floors for _, value in line.points):
        how = (
            "Scales that have fallen to the smallest value compute next to nothing. The line should be at zero; where "
            "it rises, --scale-lr is too large."
        )
        drawn.append(figure(Chart("Scales at their floor", floors, "step", "scales"), how))
    elif any(line.points for line in floors):
        blocks.append(
            paragraph("No scale was at its floor (the smallest value that a scale may have) at a logged step.")
        )
    if not any(line.points for line in flips):
        blocks.append(paragraph("Flips of codes were not counted: --stats-every STEPS counts them."))
    return [*([figures(*drawn)] if drawn else []), *blocks]


def _flips(report: Report, lines: list[Line]) -> Markup:
    """Return the chart of flips; the first count of a phase is of nothing before it, and is left out."""
    per_step = []
    for line in lines:
        points = [(x, flips / (x - before)) for (before, _), (x, flips) in pairwise(line.points) if x > before]
        per_step.append(Line(line.label, points, line.colour))
    return figure(
        Chart("Flips of codes per step", per_step, "step", "weights that change code in a step", percent=True),
        "The share of weights whose code differs from that at the count before, divided by the steps between. It falls "
        "with the learning rate. If it stays high to the end, weights swing between two levels; if it is near zero "
        "from the start, the learning rate is too small for the spacing of the levels.",
    )


def _distances(report: Report) -> Markup:
    return figure(
        Chart(
            "Distance of weights to their levels", _lines(report, "distance", quantized=True), "step",
            "root mean square, in spacings of levels",
        ),
        "Weights spread evenly between levels give 0.29. A line that falls below says that weights settle on levels; "
        "one far above says that many lie beyond the outermost level.",
    )  # fmt: skip


def _codes(report: Report) -> list[Markup]:
    """Return a table of histograms: a row for each layer, a column for each quantized phase."""
    codes = report.get("codes") or {}
    if not codes:
        return []
    layers = list(dict.fromkeys(layer for steps in codes.values() for found in steps.values() for layer in found))
    rows = [[layer, *(_histogram(steps, layer) for steps in codes.values())] for layer in layers]
    head = ["layer", *(f"{name}, step {max(steps, key=int)}" for name, steps in codes.items())]
    how = (
        "How many weights have each code, from the smallest code to the largest: bars at the step above, the line "
        "before QAT (rounded). Below it, the bits of information in a code, and the share of weights at the two "
        "outermost codes. A layer whose entropy is far below the width does not need it; one with most weights at the "
        "ends has too small a scale."
    )
    grid = table(head, rows, words=len(head))
    few = len(layers) <= _FEW_LAYERS
    return [paragraph(how), grid if few else folded(f"Histograms of {len(layers)} layers", grid)]


def _histogram(steps: Mapping[str, Mapping[str, list[int]]], layer: str) -> Markup | None:
    """Return a histogram at the last step that has one, with those before QAT as a line."""
    first, last = min(steps, key=int), max(steps, key=int)
    counts = steps[last].get(layer)
    total = sum(counts or ())
    if not counts or not total:
        return None
    shares = [count / total for count in counts]
    entropy = -sum(share * math.log2(share) for share in shares if share)
    ends = f", {100 * (shares[0] + shares[-1]):.3g}% at the ends" if len(shares) > 2 else ""
    before = steps[first].get(layer) if first != last else None
    return joined(Markup(histogram(counts, before)), tag("div", f"{abs(entropy):.2f} bits{ends}", "quiet"))


def _settings(config: Mapping[str, Any]) -> list[Markup]:
    """Return the settings: those that differ from the defaults, and all of them behind a click."""
    from .config import TrainConfig  # the configuration is built from modules that use the report

    defaults = {name: setting.field.default for name, setting in settings_of(TrainConfig).items()}
    plain = {name: _shown(value) for name, value in config.items()}
    changed = {name: value for name, value in plain.items() if name not in defaults or value != _shown(defaults[name])}
    return [
        paragraph("What differs from the defaults, with each auto replaced by its value:") if changed
        else paragraph("All settings are the defaults."),
        facts(changed),
        folded(f"All {len(plain)} settings", facts(plain)),
    ]  # fmt: skip


def _shown(value: Any) -> str:
    if isinstance(value, list | tuple):
        return " ".join(map(_shown, value))
    return f"{value:g}" if isinstance(value, float) else "-" if value is None else str(value)
