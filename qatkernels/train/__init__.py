"""The reference training loop, meant to be read and copied, and WinQ and SQuAT, parts for any loop."""

from .checkpoint import CheckpointError
from .config import ConfigError, TrainConfig, resumed
from .data import DataError
from .loop import DivergedError, Interrupted, train
from .report import show
from .squat import SQuAT
from .stats import GridStats
from .winq import WinQ, hadamard

__all__ = [
    "CheckpointError",
    "ConfigError",
    "DataError",
    "DivergedError",
    "GridStats",
    "Interrupted",
    "SQuAT",
    "TrainConfig",
    "WinQ",
    "hadamard",
    "resumed",
    "show",
    "train",
]
