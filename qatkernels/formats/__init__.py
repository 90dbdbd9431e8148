"""Files of quantized models: this library's own, and those of other runtimes."""

from ._export import ExportReport, ExportRow, export
from .integers import UnfitError
from .packed import load_packed, save_packed

__all__ = ["ExportReport", "ExportRow", "UnfitError", "export", "load_packed", "save_packed"]
