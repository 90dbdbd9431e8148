"""`qatkernels pack`."""

from __future__ import annotations

import argparse
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Literal

import torch

from ..options import check, option
from .arguments import add_options, from_arguments
from .common import Answer, fail

LONG = """\
Write a trained model with the codes of its quantized layers at their bit width,
their scales, and all other tensors unchanged: as one file, or, if it is a model
of transformers and OUT does not end in .safetensors, as a folder that
transformers reads.
"""


@dataclass(frozen=True)
class PackConfig:
    """The settings of `qatkernels pack`."""

    checkpoint: str = option(
        MISSING,
        "folder of a low-bit model, such as runs/demo/w2, or one of save_pretrained",
        metavar="CKPT",
        positional=True,
    )
    out: str = option(MISSING, "file or folder to write", metavar="OUT", positional=True)
    scale_dtype: Literal["float32", "bfloat16", "float16"] = option(
        "float32", "dtype of the stored scales: float32, which is exact, bfloat16 or float16", metavar="DTYPE"
    )

    def __post_init__(self) -> None:
        check(self)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add an option for each setting."""
    add_options(parser, PackConfig)


def run(args: argparse.Namespace) -> Answer | int:
    """Pack a model, and return its size."""
    from ..trainer import CheckpointError, generate

    try:
        config = from_arguments(args, PackConfig)
        size = generate.pack(Path(config.checkpoint), Path(config.out), getattr(torch, config.scale_dtype))
    except (CheckpointError, ValueError) as error:
        return fail(error)

    def show() -> None:
        for dtype, width in (("float32", 4), ("bfloat16", 2)):
            full = width * size["parameters"]
            ratio = full / size["disk"]
            print(f"{config.out}: {size['disk']:,} bytes, {ratio:.1f} times smaller than in {dtype} ({full:,})")

    return Answer({"path": config.out, **size}, show)
