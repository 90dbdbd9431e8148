"""Files of packed models."""

from .packed import load_packed, save_packed

__all__ = ["load_packed", "save_packed"]
