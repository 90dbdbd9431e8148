"""Compute-optimal QAT: how many tokens to train in full precision, how many quantized, and at which bit width."""

from .decide import BitChoice, best_bits_under_memory, full_precision_parity, wasted_tokens
from .fit import FitError, LossFit, fit_loss_law, measured_optima, read_runs
from .formula import (
    ExtrapolationWarning,
    PlanError,
    optimal_qat_fraction,
    tokens_per_parameter_byte,
    tokens_per_parameter_byte_at,
)
from .law import LossLaw

__all__ = [
    "BitChoice",
    "ExtrapolationWarning",
    "FitError",
    "LossFit",
    "LossLaw",
    "PlanError",
    "best_bits_under_memory",
    "fit_loss_law",
    "full_precision_parity",
    "measured_optima",
    "optimal_qat_fraction",
    "read_runs",
    "tokens_per_parameter_byte",
    "tokens_per_parameter_byte_at",
    "wasted_tokens",
]
