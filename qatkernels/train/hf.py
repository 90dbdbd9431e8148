"""The old place of :mod:`qatkernels.integrations.transformers`."""

from .._moved import moved

__getattr__ = moved(
    __name__, dict.fromkeys(("SQuATTrainer", "WinQCallback", "QATTrainer"), "qatkernels.integrations.transformers")
)
