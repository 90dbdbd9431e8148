"""The `qatkernels` command. A subcommand is a function that takes its arguments and returns the exit code."""

from __future__ import annotations

import argparse
import codecs
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from . import __version__

BROKEN, BAD_USAGE = 1, 2

_TRAIN = """\
Train a small byte-level transformer in full precision on real text, then by
quantization-aware training at each bit width from that checkpoint, and compare
with rounding its weights to the nearest level without training.

The defaults take about five minutes on two CPU cores and download nothing: the
text is the source of this Python's standard library, with some files held out.
Ctrl-C stops at a checkpoint. The same command goes on from there, and finished
parts are not run again; `--resume` does so without repeating other options.
"""

_PACK = """\
Write a model of `qatkernels train` as one file: the codes of its quantized
layers at their width, their scales, and everything else as it is.
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


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        The exit code: 0, 1 if something is broken, 2 for bad usage or input, 128 + n where signal n stopped it.
    """
    parser = argparse.ArgumentParser(
        prog="qatkernels", description="Train and run neural networks at 1 to 8 bits.",
        epilog="commands:\n" + "\n".join(f"  {name:<8} {run.__doc__}" for name, run in COMMANDS.items())
        + "\n\n`qatkernels COMMAND --help` explains one.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--version", action="version", version=f"qatkernels {__version__}")
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help="one of the commands below")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...", help="its arguments")
    args = parser.parse_args(argv)
    try:
        return COMMANDS[args.command](args.arguments)
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except BrokenPipeError:  # the reader of a pipe left, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE


def run() -> int:
    """Be the command `qatkernels`: run the command line, and end well after training with other processes too."""
    code = main()
    parallel = sys.modules.get("qatkernels.train.parallel")  # not imported: nothing has trained
    if parallel is not None and parallel.joined_any():
        parallel.leave(code)
    return code


def _fail(message: object) -> int:
    print(f"qatkernels: {message}", file=sys.stderr)
    return BAD_USAGE


def train(argv: Sequence[str]) -> int:
    """Train in full precision and at low bit widths, and compare."""
    from . import train as job  # matplotlib takes half a second to import
    from .train import toml
    from .train.parallel import ParallelError

    given = vars(_train_parser(job.TrainConfig).parse_args(argv))
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
        return _fail(error)
    if os.environ.get("RANK", "0") == "0":
        job.show(report, config.out)
    return 0


def spectrum(argv: Sequence[str]) -> int:
    """Estimate the Hessian's spectrum at checkpoints."""
    from .hessian import NotFiniteError
    from .train import CheckpointError, ConfigError, DataError, spectra

    try:
        config = spectra.configured(argv)
        report = spectra.run(config)
    except (ConfigError, DataError, CheckpointError, NotFiniteError) as error:
        return _fail(error)
    spectra.show(report, config.out)
    return 0


def _train_parser(config: Any) -> argparse.ArgumentParser:
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


def pack(argv: Sequence[str]) -> int:
    """Pack a trained model into a small file."""
    from .train import generate as job
    from .train.checkpoint import CheckpointError

    parser = argparse.ArgumentParser(prog="qatkernels pack", description=_PACK)
    parser.add_argument("checkpoint", metavar="CKPT", type=Path, help="folder of a low-bit model, such as runs/demo/w2")
    parser.add_argument("out", metavar="OUT", type=Path, help="file to write")
    parser.add_argument(
        "--scale-dtype", choices=("float32", "bfloat16", "float16"), default="float32",
        help="dtype of the stored scales (default: %(default)s, in which nothing is lost)",
    )  # fmt: skip
    args = parser.parse_args(argv)
    try:
        size = job.pack(args.checkpoint, args.out, getattr(torch, args.scale_dtype))
    except (CheckpointError, ValueError) as error:
        return _fail(error)
    for dtype, width in (("float32", 4), ("bfloat16", 2)):
        full = width * size["parameters"]
        print(f"{args.out}: {size['disk']:,} bytes, {full / size['disk']:.1f} times smaller than in {dtype} ({full:,})")
    return 0


def generate(argv: Sequence[str]) -> int:
    """Write text with a trained model, packed or not."""
    from .plan.units import human
    from .train import generate as job
    from .train.checkpoint import CheckpointError
    from .train.values import check_seed

    parser = argparse.ArgumentParser(prog="qatkernels generate", description=generate.__doc__)
    parser.add_argument("model", metavar="MODEL", type=Path, help="file of `pack`, or a folder such as runs/demo/w2")
    parser.add_argument("--prompt", default="def ", help="text to go on from (default: %(default)r)")
    parser.add_argument("--tokens", type=int, default=200, metavar="N", help="bytes to write (default: %(default)s)")
    parser.add_argument(
        "--temperature", type=float, default=0.0, metavar="T",
        help="0 takes the likeliest byte, 1 draws from the distribution (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="seed of the draws (default: %(default)s)")
    args = parser.parse_args(argv)
    if args.tokens < 1 or not 0 <= args.temperature < float("inf") or not args.prompt:
        return _fail("--tokens must be at least 1, --temperature finite and at least 0, --prompt not empty")
    try:
        check_seed("--seed", args.seed)
    except ValueError as error:
        return _fail(error)
    try:
        model = job.load(args.model)
    except CheckpointError as error:
        return _fail(error)
    # The bytes that were given, which need not be text, as the model's need not be.
    prompt, decoder = os.fsencode(args.prompt), codecs.getincrementaldecoder("utf-8")("replace")
    _show(decoder.decode(prompt))
    draws = torch.Generator().manual_seed(args.seed)
    began = time.perf_counter()
    for token, _ in job.generate(model, prompt, args.tokens, temperature=args.temperature, generator=draws):
        _show(decoder.decode(bytes([token])))
    seconds = time.perf_counter() - began
    _show(decoder.decode(b"", final=True) + "\n")
    print(f"{args.tokens} tokens, {human(args.tokens / seconds)} tokens/s", file=sys.stderr)
    return 0


def check(argv: Sequence[str]) -> int:
    """Look for what makes training go wrong without an error."""
    from .nn import check as look
    from .train import generate as job
    from .train import sources
    from .train.checkpoint import CheckpointError

    parser = argparse.ArgumentParser(
        prog="qatkernels check",
        description=f"{check.__doc__} Runs a model that `qatkernels train` or `pack` left forward and backward on "
        f"random tokens, and prints a table of its quantized layers. The exit code is {BROKEN} if there is a problem.",
    )
    parser.add_argument("model", metavar="MODEL", type=Path, help="file of `pack`, or a folder such as runs/demo/w2")
    parser.add_argument(
        "--tokens", type=int, default=64, metavar="N", help="tokens to run it on (default: %(default)s)"
    )
    args = parser.parse_args(argv)
    if args.tokens < 1:
        return _fail(f"--tokens is {args.tokens}, must be at least 1")
    try:
        model, described = job.opened(args.model)
        vocabulary, longest = sources.limits(described)
        tokens = args.tokens if longest is None else min(args.tokens, longest)
        drawn = torch.randint(vocabulary or 2, (2, tokens), generator=torch.Generator().manual_seed(0))
        report = look(model, drawn)
    except (CheckpointError, ValueError) as error:
        return _fail(error)
    print(report)
    return 0 if report.ok else BROKEN


def _show(text: str) -> None:
    """Print text at once, with a replacement for what the terminal's encoding lacks."""
    encoding = sys.stdout.encoding or "utf-8"
    print(text.encode(encoding, "replace").decode(encoding), end="", flush=True)


def bit_width(text: str) -> float:
    """Return a number, integral where it is a whole one; argparse names this function when the text is none."""
    value = float(text)
    return int(value) if value.is_integer() else value


def plan(argv: Sequence[str]) -> int:
    """Say how many tokens to train in full precision and how many quantized."""
    from .files import CheckpointError
    from .plan import PlanError, command  # scipy takes a while to import

    try:
        return command.run(argv)
    except (PlanError, CheckpointError) as error:
        return _fail(error)


def doctor(argv: Sequence[str]) -> int:
    """Say which backend serves which op here, what is missing, and how to get it."""
    from . import doctor as job

    parser = argparse.ArgumentParser(
        prog="qatkernels doctor", description=f"{doctor.__doc__} The exit code is {BROKEN} if something is broken."
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args(argv)
    found = job.diagnosis()
    print(json.dumps(found, indent=2) if args.json else job.prescription(found))
    return BROKEN if found["broken"] else 0


def bench(argv: Sequence[str]) -> int:
    """Run the benchmarks (from a checkout)."""
    root = Path(__file__).resolve().parent.parent
    if not (root / "bench" / "__main__.py").exists():
        return _fail(
            "the benchmarks are not part of the installed package; "
            "get a checkout of the repository and run `python -m bench` there"
        )
    path = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))
    return subprocess.call([sys.executable, "-m", "bench", *argv], env={**os.environ, "PYTHONPATH": path})


#: Subcommands by name. The first line of a docstring is its line in `qatkernels --help`.
COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "train": train, "plan": plan, "spectrum": spectrum, "pack": pack, "generate": generate,
    "check": check, "doctor": doctor, "bench": bench,
}  # fmt: skip
