"""The old place of :mod:`qatkernels.methods` and :mod:`qatkernels.trainer`."""

from .._moved import moved

_METHODS = ("GridStats", "SQuAT", "WinQ", "hadamard")
_TRAINER = (
    "CheckpointError", "ConfigError", "DataError", "DivergedError", "Interrupted", "TrainConfig", "resumed", "show",
    "train",
)  # fmt: skip
_MODULES = ("data", "loop", "parallel", "phases", "toml")

__all__ = [*_METHODS, *_TRAINER]
__getattr__ = moved(
    __name__,
    dict.fromkeys(_METHODS, "qatkernels.methods") | dict.fromkeys(_TRAINER, "qatkernels.trainer"),
    {name: f"qatkernels.trainer.{name}" for name in _MODULES},
)
