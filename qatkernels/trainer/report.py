"""What a run leaves to read: a line per logged step, and at the end a table, a JSON file and a picture."""

from __future__ import annotations

import json
import platform
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from .. import files
from ..methods.values import is_number
from ..units import human
from .data import Corpus
from .plot import plot


class Log:
    """``log.jsonl``: one JSON object a line with the phase, the step, and whatever was measured there.

    Args:
        path: the file.
        writes: whether this process is the one that writes it.
        board: folder for the same in the files of TensorBoard, a run for each phase; None for none.
    """

    def __init__(self, path: Path, writes: bool = True, board: Path | None = None) -> None:
        self.path, self.writes = path, writes
        self._board = board
        self._writer: Any = None

    def add(self, **entry: Any) -> None:
        """Append one line; what is worth a sentence is a ``note``."""
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
        """Return every line that is an entry; one that a kill cut short or a disk damaged is left out."""
        if not self.path.exists():
            return []
        found = []
        with files.explained("read", self.path):
            lines = self.path.read_bytes().splitlines()
        for line in lines:
            try:
                entry = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(entry, dict) and isinstance(entry.get("phase"), str) and is_number(entry.get("step")):
                found.append(entry)
        return found

    def trim(self, phase: str, step: int) -> None:
        """Forget what a phase logged after the step of the checkpoint that it goes on from, but for notes."""
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
        """Finish TensorBoard's file."""
        if self._writer is not None:
            self._writer.close()


def write(out: Path, config: dict[str, Any], corpus: Corpus, results: list[dict[str, Any]], log: Log) -> dict[str, Any]:
    """Write ``report.json`` and ``curves.png``, and return the report.

    Args:
        out: folder of the run.
        config: settings of the run.
        corpus: text that it read.
        results: one result a phase.
        log: its log.
    """
    quantized = [result for result in results if result["bits"] is not None]
    starts = {name: r for r in results if (name := r["phase"]) in {q["start"] for q in quantized}}
    first = max(starts.values(), key=lambda r: r["first"] + r["steps"])  # the longest training in full precision
    entries = log.entries()
    curves = {result["phase"]: _curves(result, entries) for result in results}
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
        "parameters": first["parameters"],
        "quantized_parameters": quantized[0]["quantized_parameters"],
        "full_precision": _row(first, first, 4 * quantized[0]["quantized_parameters"]),
        "rows": [_row(result, starts[result["start"]], result["quantized_bytes"]) for result in quantized],
        "starts": {result["phase"]: [result["start"], result["first"]] for result in results},
        "curves": curves,
    }
    files.write_json(out / "report.json", report)
    with files.explained("written", out / "curves.png"):
        plot(report, out / "curves.png")
    return report


def _curves(result: dict[str, Any], entries: list[dict[str, Any]]) -> dict[str, list[list[float]]]:
    """Return the points ``[step, bits per byte]`` of a phase; of a log that was lost, the first and the last."""
    own = [e for e in entries if e["phase"] == result["phase"]]
    train, held_out = ([[e["step"], e[kind]] for e in own if kind in e] for kind in ("train", "held_out"))
    ends = [[0, result["start_bits_per_byte"]], [result["steps"], result["bits_per_byte"]]]
    return {"train": train, "held_out": held_out or ends}


def _row(result: dict[str, Any], first: dict[str, Any], quantized_bytes: int) -> dict[str, Any]:
    """One row of the table; bits per byte are on held-out text, sizes in bytes."""
    is_first = result is first
    return {
        "phase": result["phase"],
        "bits": 32 if is_first else result["bits"],
        "full_precision": first["bits_per_byte"],
        "round_to_nearest": None if is_first else result["start_bits_per_byte"],
        "qat": None if is_first else result["bits_per_byte"],
        "quantized_bytes": quantized_bytes,
        "model_bytes": result["model_bytes"],
        "first": result["first"],
        "steps": result["steps"],
        "seconds": result["seconds"],
        "tokens_per_second": result["tokens_per_second"],
    }


def machine() -> dict[str, Any]:
    """Return what a report says of the machine and the versions."""
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
    """Print the report, and where its files are."""
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
    console.print(f"{out}/report.json, {out}/curves.png", soft_wrap=True)


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
