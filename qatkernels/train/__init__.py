"""The reference training loop. `loop.py` is meant to be read and copied."""

from .checkpoint import CheckpointError
from .data import DataError
from .loop import ConfigError, DivergedError, Interrupted, TrainConfig, train

__all__ = ["CheckpointError", "ConfigError", "DataError", "DivergedError", "Interrupted", "TrainConfig", "train"]
