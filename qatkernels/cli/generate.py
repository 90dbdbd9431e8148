"""`qatkernels generate`."""

from __future__ import annotations

import argparse
import codecs
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from .common import fail


def run(argv: Sequence[str]) -> int:
    """Write text with a trained model, packed or not."""
    from ..files import CheckpointError
    from ..methods.values import check_seed
    from ..trainer import generate as job
    from ..units import human

    parser = argparse.ArgumentParser(prog="qatkernels generate", description=run.__doc__)
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
        return fail("--tokens must be at least 1, --temperature finite and at least 0, --prompt not empty")
    try:
        check_seed("--seed", args.seed)
    except ValueError as error:
        return fail(error)
    try:
        model = job.load(args.model)
    except CheckpointError as error:
        return fail(error)
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


def _show(text: str) -> None:
    """Print text at once, with a replacement for what the terminal's encoding lacks."""
    encoding = sys.stdout.encoding or "utf-8"
    print(text.encode(encoding, "replace").decode(encoding), end="", flush=True)
