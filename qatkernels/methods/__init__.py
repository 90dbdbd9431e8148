"""Training methods for any loop: WinQ, SQuAT and distillation, and statistics of the codes. Needs torch alone."""

from .distillation import distillation_loss
from .squat import SQuAT
from .stats import GridStats
from .winq import WinQ, hadamard

__all__ = ["GridStats", "SQuAT", "WinQ", "distillation_loss", "hadamard"]
