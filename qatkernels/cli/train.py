"""`qatkernels train`."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any

from .common import fail

_TRAIN = """\
Train a small byte-level transformer in full precision on real text, then by
quantization-aware training at each bit width from that checkpoint, and compare
with rounding its weights to the nearest level without training.

The defaults take about five minutes on two CPU cores and download nothing: the
text is the source of this Python's standard library, with some files held out.
Ctrl-C stops at a checkpoint. The same command goes on from there, and finished
parts are not run again; `--resume` does so without repeating other options.
"""

_EPILOG = """\
written to --out:
  report.json, curves.png      table, curves, and what they were measured on
  log.jsonl                    losses over the steps
  fp/, w4/, w2/, w1.58/, w1/   model.safetensors and config.json of each model

examples:
  qatkernels train
  qatkernels train --data novels/ --bits 4 2 --steps 5000 --out runs/novels
  qatkernels train --resume --out runs/novels
"""


def run(argv: Sequence[str]) -> int:
    """Train in full precision and at low bit widths, and compare."""
    from .. import trainer as job  # matplotlib takes half a second to import
    from ..trainer import toml
    from ..trainer.parallel import ParallelError

    given = vars(parser(job.TrainConfig).parse_args(argv))
    resume, restart, file = given.pop("resume"), given.pop("restart"), given.pop("config", None)
    if "bits" in given:
        given["bits"] = tuple(given["bits"])
    try:
        given = {**(toml.read(file) if file else {}), **given}
        config = job.resumed(given) if resume else job.TrainConfig(**given)
        report = job.train(config, restart=restart)
    except job.Interrupted as stop:
        print(f"{stop}; `qatkernels train --resume --out {shlex.quote(config.out)}` goes on from here", file=sys.stderr)
        return 128 + stop.number
    except (job.ConfigError, job.DataError, job.CheckpointError, job.DivergedError, ParallelError) as error:
        return fail(error)
    if os.environ.get("RANK", "0") == "0":
        job.show(report, config.out)
    return 0


def parser(config: Any) -> argparse.ArgumentParser:
    """Return the parser of `train`, with an option for each field of the configuration."""
    parser = argparse.ArgumentParser(
        prog="qatkernels train", description=_TRAIN, epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter, argument_default=argparse.SUPPRESS,
    )  # fmt: skip
    names = dict.fromkeys(entry.metadata["group"] for entry in fields(config))
    groups = {name: parser.add_argument_group(name) for name in names}
    for entry in fields(config):
        default: Any = entry.default
        several = isinstance(default, tuple)
        shown = "" if default is None else f" (default: {' '.join(map(str, default)) if several else default})"
        kind: Callable[[str], Any] = entry.metadata["parse"] or (
            bit_width if several else str if default is None else type(default)
        )
        option, group = f"--{entry.name.replace('_', '-')}", groups[entry.metadata["group"]]
        if isinstance(default, bool):
            group.add_argument(option, action=argparse.BooleanOptionalAction, help=entry.metadata["help"])
            continue
        group.add_argument(
            option, type=kind, nargs="+" if several else None,
            metavar={int: "N", float: "X", bit_width: "BITS"}.get(kind, entry.name.upper()),
            help=entry.metadata["help"] + shown,
        )  # fmt: skip
    groups["run"].add_argument(
        "--config", metavar="TOML", help="file with any of these options; what is given here goes before it"
    )
    again = parser.add_argument_group("going on").add_mutually_exclusive_group()
    for name, text in (("resume", "go on with the run in --out, with its options"),
                       ("restart", "delete the run in --out and start over")):  # fmt: skip
        again.add_argument(f"--{name}", action="store_true", default=False, help=text)
    return parser


def bit_width(text: str) -> float:
    """Return a number, integral where it is a whole one; argparse names this function when the text is none."""
    value = float(text)
    return int(value) if value.is_integer() else value
