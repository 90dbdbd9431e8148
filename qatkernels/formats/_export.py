"""``export``: a trained model in a format that another runtime reads."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from ..nn._gather_model import is_sharded, whole_in_every_process

#: The module of each format, which has ``export(model, path, **options) -> ExportReport``.
_FORMATS = {
    "safetensors": ".packed",
    "gguf": ".gguf",
    "compressed-tensors": ".compressed_tensors",
    "mlx": ".mlx",
    "onnx": ".onnx",
    "gemma": ".gemma",
    "torchao": ".torchao",
}


@dataclass(frozen=True)
class ExportRow:
    """One quantized weight in a file.

    Attributes:
        name: name of the layer in the model.
        stored_as: the format's own name of how it is stored.
        bits_per_weight: bits that the file takes for each weight, scales included.
        error: largest difference between a stored and a trained value, over the largest trained value; 0 means that
            all of them are equal bit for bit.
    """

    name: str
    stored_as: str
    bits_per_weight: float
    error: float = 0.0


@dataclass
class ExportReport:
    """What an export wrote.

    Attributes:
        path: the file or folder.
        rows: one row for each quantized layer.
        nbytes: bytes written.
        notes: what else a user should know.
    """

    path: Path
    rows: list[ExportRow]
    nbytes: int
    notes: list[str] = field(default_factory=list)

    @property
    def exact(self) -> bool:
        """Whether every quantized weight is stored bit for bit."""
        return all(row.error == 0 for row in self.rows)

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON-able values."""
        return {
            "path": str(self.path), "bytes": self.nbytes, "exact": self.exact, "notes": self.notes,
            "layers": [asdict(row) for row in self.rows],
        }  # fmt: skip

    def __str__(self) -> str:
        """Return a few lines: a line for each way of storing, then the size and the notes."""
        kinds: dict[tuple[str, float], list[float]] = {}
        for row in self.rows:
            kinds.setdefault((row.stored_as, row.bits_per_weight), []).append(row.error)
        lines = [
            f"{len(errors)} layers as {name} ({bits:.2f} bits a weight), "
            + ("exact" if not max(errors) else f"off by up to {max(errors):.1e} of the largest weight")
            for (name, bits), errors in sorted(kinds.items())
        ]
        return "\n".join([*lines, *self.notes, f"{self.path}: {self.nbytes:,} bytes"])


def writer(to: str, options: Iterable[str] = ()) -> Callable[..., ExportReport]:
    """Return the function that writes a format.

    Raises:
        ValueError: if the format is unknown, or does not have one of the options.
    """
    if to not in _FORMATS:
        raise ValueError(f"to is {to!r}, must be one of {sorted(_FORMATS)}")
    write: Callable[..., ExportReport] = importlib.import_module(_FORMATS[to], __package__).export
    known = _options(write)
    if unknown := [name for name in options if name not in known]:
        raise ValueError(f"{unknown[0]} is not an option of to={to!r}, which has {', '.join(known)}")
    return write


def takes(to: str, option: str) -> bool:
    """Whether a format has an option.

    Raises:
        ValueError: if the format is unknown.
    """
    return option in _options(writer(to))


def _options(write: Callable[..., ExportReport]) -> list[str]:
    return [name for name, p in inspect.signature(write).parameters.items() if p.kind is p.KEYWORD_ONLY]


def export(model: nn.Module, path: str | Path, to: str, **options: Any) -> ExportReport:
    """Write a trained model for another runtime, with the quantized values kept bit for bit.

    Codes and scales are written as they were trained; nothing is quantized anew. What a format cannot hold exactly is
    an error that says why and what fits.

    Args:
        model: a model from :func:`qatkernels.quantize_model`, or from :func:`qatkernels.pack_model`.
        path: the file or folder to write; a file is replaced only when the new one is complete.
        to: the format: ``"gguf"`` (llama.cpp), ``"compressed-tensors"`` (vLLM, transformers), ``"mlx"`` (mlx-lm),
            ``"onnx"`` (ONNX Runtime), ``"gemma"`` (transformers' own, which runs in PyTorch alone), ``"torchao"``, or
            ``"safetensors"`` (this library's own, packed models only).
        **options: of the format; see its ``export``, such as :func:`qatkernels.formats.gguf.export`.

    Returns:
        How each layer was stored, and the size.

    Raises:
        ValueError: if ``to`` or an option is unknown, the model has no quantized layer, or the format does not have
            models of its kind.
        UnfitError: if the format does not hold a weight exactly.
        MissingExtraError: if a package that the format needs is not installed.
        CheckpointError: if the file cannot be written.
    """
    write = writer(to, options)
    if is_sharded(model):
        raise ValueError(f"the model is sharded: {whole_in_every_process(model)}, and export that in one of them")
    return write(model, Path(path), **options)
