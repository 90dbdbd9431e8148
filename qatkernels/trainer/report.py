"""The log of a run, and its report: a table, a JSON file and a page."""

from __future__ import annotations

import contextlib
import json
import platform
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from .. import files
from ..methods.values import is_number
from ..units import human
from . import train_page
from .data import Corpus
from .phases import Phase


class Log:
    """The file ``log.jsonl``: each line is a JSON object with the phase, the step, and the values measured there.

    Args:
        path: the file.
        writes: whether this process writes it; the other processes log nothing.
        board: folder for TensorBoard files with the same values, one TensorBoard run per phase; None for none.
    """

    def __init__(self, path: Path, writes: bool = True, board: Path | None = None) -> None:
        self.path, self.writes = path, writes
        self._board = board
        self._writer: Any = None

    def add(self, **entry: Any) -> None:
        """Append one line. Text, such as a warning, goes into the key ``note``."""
        if not self.writes:
            return
        with files.explained("written", self.path), open(self.path, "a") as file:
            file.write(json.dumps(entry) + "\n")
        if self._writer is not None:
            for name, value in entry.items():
                if isinstance(value, float):
                    self._writer.add_scalar(name, value, entry["step"])
            self._writer.flush()

    def entries(self) -> list[dict[str, Any]]:
        """Return the valid entries. Lines that were cut short by a kill, or damaged, are skipped."""
        if not self.path.exists():
            return []
        entries = []
        with files.explained("read", self.path):
            lines = self.path.read_bytes().splitlines()
        for line in lines:
            try:
                entry = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(entry, dict) and isinstance(entry.get("phase"), str) and is_number(entry.get("step")):
                entries.append(entry)
        return entries

    def trim(self, phase: str, step: int) -> None:
        """Delete the entries of a phase after a step, except notes. A resumed phase logs those steps again."""
        if not self.writes:
            return
        kept = [e for e in self.entries() if e["phase"] != phase or "note" in e or (step > 0 and e["step"] <= step)]
        files.write(self.path, "".join(json.dumps(e) + "\n" for e in kept).encode())
        if self._board is not None:
            from torch.utils.tensorboard import SummaryWriter

            self.close()
            with files.explained("written", self._board):
                self._writer = SummaryWriter(str(self._board / phase), purge_step=step + 1 if step else 0)

    def close(self) -> None:
        """Close the TensorBoard file."""
        if self._writer is not None:
            self._writer.close()


def write(
    out: Path, config: dict[str, Any], corpus: Corpus, plan: Sequence[Phase], results: list[dict[str, Any]], log: Log,
    stopped: str | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Write ``report.json`` and ``report.html``, and return the report.

    Args:
        out: folder of the run.
        config: settings of the run.
        corpus: its text.
        plan: its phases.
        results: one result per finished phase; of an interrupted run there may be none.
        log: its log.
        stopped: why the run stopped before its end; None if it is finished.
    """
    entries = log.entries()
    by_phase = {phase.name: [e for e in entries if e["phase"] == phase.name] for phase in plan}
    quantized = [result for result in results if result["bits"] is not None]
    full = [result for result in results if result["bits"] is None]
    starts = {name: r for r in full if (name := r["phase"]) in {q["start"] for q in quantized}} or {
        r["phase"]: r for r in full
    }
    longest = max(starts.values(), key=lambda r: r["first"] + r["steps"], default=None)
    size = quantized[0]["quantized_parameters"] if quantized else None
    report = {
        "config": config,
        "machine": machine(),
        "text": {
            "source": corpus.source,
            "sha256": corpus.sha256,
            "train_bytes": corpus.train_bytes,
            "held_out_bytes": corpus.held_out_bytes,
            "train_files": len(corpus.train_files),
            "held_out_files": len(corpus.held_out_files),
        },
        "stopped": stopped,
        "parameters": longest and longest["parameters"],
        "quantized_parameters": size,
        "full_precision": longest and _row(longest, longest, 4 * size if size is not None else None),
        "rows": [_row(result, starts[result["start"]], result["quantized_bytes"]) for result in quantized],
        "starts": {phase.name: [phase.start, phase.first] for phase in plan},
        "bits": {phase.name: phase.bits for phase in plan},
        "curves": {
            phase.name: _curves(of_phase, next((r for r in results if r["phase"] == phase.name), None))
            for phase in plan if (of_phase := by_phase[phase.name]) or any(r["phase"] == phase.name for r in results)
        },
        "codes": {
            name: {str(e["step"]): e["codes"] for e in of_phase if "codes" in e}
            for name, of_phase in by_phase.items() if any("codes" in e for e in of_phase)
        },
        "notes": [{k: e[k] for k in ("phase", "step", "note")} for e in entries if "note" in e],
    }  # fmt: skip
    files.write(out / "report.json", as_json(report))
    write_page(out, report)
    return report


def write_page(out: Path, report: dict[str, Any]) -> None:
    """Write ``report.html`` of a run, with the spectra that ``qatkernels spectrum`` wrote into folders of the run."""
    spectra = {}
    for path in sorted(out.glob("*/report.json")):
        with contextlib.suppress(files.CheckpointError):  # a file of that name which is no report of ours
            other = files.read_json(path)
            if other.get("checkpoints") and all("spectrum" in entry for entry in other["checkpoints"]):
                spectra[path.parent.name] = other
    files.write(out / "report.html", train_page.page(report, spectra))


def refresh_page(out: Path) -> None:
    """Write ``report.html`` of a folder again if it holds the report of a run; do nothing otherwise."""
    if not ((out / "run.json").exists() and (out / "report.json").exists()):
        return
    if "curves" in (report := files.read_json(out / "report.json")):
        write_page(out, report)


def as_json(report: dict[str, Any]) -> bytes:
    """Return a report as JSON, with each list of numbers on one line."""
    text = json.dumps(report, indent=1, allow_nan=False)
    return (re.sub(r"\[\s+([^][{}\"]*?)\s+\]", lambda m: f"[{' '.join(m[1].split())}]", text) + "\n").encode()


def _curves(entries: list[dict[str, Any]], result: dict[str, Any] | None) -> dict[str, list[list[float]]]:
    """Return the points ``[step, value]`` of each value in the log of a phase.

    Losses are in bits per byte. The names of what a method measures lose its own: ``winq/flips`` are ``flips``. If the
    log was lost, a finished phase has the first and the last loss.
    """
    curves: dict[str, list[list[float]]] = {"train": [], "held_out": []}
    for entry in entries:
        for name, value in entry.items():
            if name != "step" and is_number(value):
                curves.setdefault(name.rpartition("/")[2], []).append([entry["step"], value])
    if result is not None and not curves["held_out"]:
        curves["held_out"] = [[0, result["start_bits_per_byte"]], [result["steps"], result["bits_per_byte"]]]
    return curves


def _row(result: dict[str, Any], start: dict[str, Any], quantized_bytes: int | None) -> dict[str, Any]:
    """Return one row of the table; losses are bits per byte on held-out text, sizes are bytes.

    Args:
        result: result of a phase.
        start: result of the phase in full precision that it started from; ``result`` itself for full precision.
        quantized_bytes: bytes of the quantized weights; None if it is not known yet which are quantized.
    """
    is_full_precision = result is start
    return {
        "phase": result["phase"],
        "bits": 32 if is_full_precision else result["bits"],
        "full_precision": start["bits_per_byte"],
        "round_to_nearest": None if is_full_precision else result["start_bits_per_byte"],
        "qat": None if is_full_precision else result["bits_per_byte"],
        "quantized_bytes": quantized_bytes,
        "model_bytes": result["model_bytes"],
        "first": result["first"],
        "steps": result["steps"],
        "seconds": result["seconds"],
        "tokens_per_second": result["tokens_per_second"],
    }


def machine() -> dict[str, Any]:
    """Return the versions and the machine, for the report."""
    from ..version import __version__

    cuda = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "qatkernels": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "threads": torch.get_num_threads(),
        "cuda": cuda,
    }


def show(report: dict[str, Any], out: str) -> None:
    """Print the report, and the paths of its files."""
    text, console = report["text"], Console(highlight=False)
    console.print()
    console.print(
        f"{report['parameters']:,} parameters, {report['quantized_parameters']:,} of them quantized; "
        f"trained on {text['train_bytes']:,} bytes in {text['train_files']} files, "
        f"{text['held_out_bytes']:,} bytes in {text['held_out_files']} files held out"
    )
    console.print(table(report))
    if report["config"]["schedule"] == "fused":
        console.print(
            "With the fused schedule only QAT decays: full-precision losses are at the constant learning rate."
        )
    console.print(f"{out}/report.json, {out}/report.html", soft_wrap=True)


def table(report: dict[str, Any]) -> Table:
    """Return the report as a table for the terminal."""
    result = Table(box=SIMPLE_HEAD, title="Bits per byte on held-out text; sizes in bytes", title_justify="left")
    names = ("bits", "full\nprecision", "round to\nnearest", "QAT", "quantized\nweights", "whole\nmodel", "tokens/s")
    for name in names:
        result.add_column(name, justify="right", no_wrap=True)
    for row in (report["full_precision"], *report["rows"]):
        losses = (row["full_precision"], row["round_to_nearest"], row["qat"])
        result.add_row(
            f"{row['bits']:g}",
            *("" if value is None else f"{value:.3f}" for value in losses),
            f"{row['quantized_bytes']:,}",
            f"{row['model_bytes']:,}",
            human(row["tokens_per_second"]),
        )
    return result
