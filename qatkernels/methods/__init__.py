"""Training methods for any loop: WinQ and SQuAT, and statistics of the codes. Needs torch alone."""

from .squat import SQuAT
from .stats import GridStats
from .winq import WinQ, hadamard

__all__ = ["GridStats", "SQuAT", "WinQ", "hadamard"]
