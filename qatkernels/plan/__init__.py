"""Compute-optimal QAT: how many tokens in full precision, how many quantized, at which bit width."""

from .formula import (
    ExtrapolationWarning,
    optimal_qat_fraction,
    tokens_per_parameter_byte,
    tokens_per_parameter_byte_at,
)

__all__ = [
    "ExtrapolationWarning",
    "optimal_qat_fraction",
    "tokens_per_parameter_byte",
    "tokens_per_parameter_byte_at",
]
