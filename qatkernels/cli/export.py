"""`qatkernels export`."""

from __future__ import annotations

import argparse
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any

from ..options import check, option
from .arguments import add_options, from_arguments
from .common import Answer, fail

LONG = """\
Write a trained low-bit model for another runtime. Codes and scales are written
as they were trained, so that the runtime computes with the same weights. What
the format cannot hold exactly is an error that says why.
"""
EPILOG = "example: qatkernels export my-llama-w4 my-llama-w4.gguf --to gguf"


@dataclass(frozen=True)
class ExportConfig:
    """The settings of `qatkernels export`."""

    model: str = option(
        MISSING, "folder of a low-bit model that save_pretrained or `qatkernels train` wrote", metavar="MODEL",
        positional=True,
    )  # fmt: skip
    out: str = option(MISSING, "file or folder to write", metavar="OUT", positional=True)
    to: str = option(
        "gguf",
        "gguf (for llama.cpp), compressed-tensors (for vLLM and transformers), mlx, onnx, gemma or torchao",
        metavar="FORMAT",
    )
    tokenizer: str | None = option(
        None, "folder of a tokenizer, or a GGUF file whose vocabulary is copied; MODEL's own if it has one",
        metavar="PATH",
    )  # fmt: skip
    convert: bool = option(False, "round scales that the format does not hold, and say how far off weights are")

    def __post_init__(self) -> None:
        check(self)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add an option for each setting."""
    add_options(parser, ExportConfig)


def run(args: argparse.Namespace) -> Answer | int:
    """Export a model, and return how its layers are stored."""
    from ..files import CheckpointError
    from ..formats._export import takes, writer
    from ..trainer.generate import open_model

    try:
        config = from_arguments(args, ExportConfig)
        source = Path(config.model)
        options: dict[str, Any] = {"convert": True} if config.convert else {}
        wanted = config.tokenizer is not None or takes(config.to, "tokenizer")
        if wanted and (tokenizer := _tokenizer(source, config.tokenizer)) is not None:
            options["tokenizer"] = tokenizer
        write = writer(config.to, options)  # raises for a wrong option, before the model is loaded
        model, described = open_model(source)
        if takes(config.to, "config"):
            options["config"] = {"model": described}  # from which `generate` builds the model
        report = write(model.eval(), Path(config.out), **options)
    except (CheckpointError, ValueError, OSError) as error:
        return fail(error)
    return Answer(report.to_dict(), lambda: print(report))


def _tokenizer(source: Path, given: str | None) -> Any:
    """Return the tokenizer that an option names, or the model's own, or None."""
    if given is None and not (source / "tokenizer.json").exists():
        return None
    path = source if given is None else Path(given)
    if path.suffix == ".gguf":
        return path
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(path)
