"""Files of quantized models: this library's own, and those of others."""

from ._export import ExportReport, ExportRow, export
from .compressed_checkpoint import load_compressed_tensors
from .integers import UnfitError
from .packed import load_packed, save_packed
from .paretoq import load_paretoq

__all__ = [
    "ExportReport",
    "ExportRow",
    "UnfitError",
    "export",
    "load_compressed_tensors",
    "load_packed",
    "load_paretoq",
    "save_packed",
]
