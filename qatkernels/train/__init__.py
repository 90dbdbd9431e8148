"""The reference training loop. `loop.py` is meant to be read and copied."""

from .checkpoint import CheckpointError
from .config import ConfigError, TrainConfig, resumed
from .data import DataError
from .loop import DivergedError, Interrupted, train
from .report import show

__all__ = [
    "CheckpointError",
    "ConfigError",
    "DataError",
    "DivergedError",
    "Interrupted",
    "TrainConfig",
    "resumed",
    "show",
    "train",
]
