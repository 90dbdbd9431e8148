"""The old place of :mod:`qatkernels.methods.schedules`."""

from .._moved import moved

__getattr__ = moved(
    __name__, dict.fromkeys(("DECAYS", "classic", "cosine", "fused", "split", "wsd"), "qatkernels.methods.schedules")
)
