"""`qatkernels pack`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from .common import fail

_PACK = """\
Write a model of `qatkernels train` as one file: the codes of its quantized
layers at their width, their scales, and everything else as it is.
"""


def run(argv: Sequence[str]) -> int:
    """Pack a trained model into a small file."""
    from ..files import CheckpointError
    from ..trainer import generate as job

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
        return fail(error)
    for dtype, width in (("float32", 4), ("bfloat16", 2)):
        full = width * size["parameters"]
        print(f"{args.out}: {size['disk']:,} bytes, {full / size['disk']:.1f} times smaller than in {dtype} ({full:,})")
    return 0
