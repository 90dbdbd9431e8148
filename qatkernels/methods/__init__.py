"""Training methods for any loop: WinQ, SQuAT, StableQAT, bfloat16 weights, distillation, and statistics of the codes.

Needs torch alone.
"""

from .bfloat16_weights import Bfloat16Weights
from .distillation import distillation_loss
from .squat import SQuAT
from .stable_qat import StableQAT
from .stats import GridStats
from .winq import WinQ, hadamard

__all__ = ["Bfloat16Weights", "GridStats", "SQuAT", "StableQAT", "WinQ", "distillation_loss", "hadamard"]
