"""The reference application: crash-safe training from a configuration, first in full precision, then quantized.

It needs the extra ``train``: rich prints progress and tables.
"""

from ..extras import missing

try:
    import rich  # noqa: F401
except ImportError as error:
    raise missing("qatkernels.trainer", "train", error) from error

from ..files import CheckpointError
from .config import ConfigError, TrainConfig, resumed
from .data import DataError
from .guard import DivergedError
from .loop import train
from .report import show
from .signals import Interrupted

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
