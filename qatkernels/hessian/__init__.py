"""Hessian-vector products, and what they tell about the loss surface of a quantized model."""

from .eigs import Eigs, eigs
from .hvp import hvp
from .lanczos import NotFiniteError
from .operator import HessianOperator, MatrixMap, SymmetricMap
from .sharpness import Sharpness, gradient_norm_ratio, sharpness
from .spectrum import Estimate, Spectrum, spectrum
from .trace import trace

__all__ = [
    "Eigs",
    "Estimate",
    "HessianOperator",
    "MatrixMap",
    "NotFiniteError",
    "Sharpness",
    "Spectrum",
    "SymmetricMap",
    "eigs",
    "gradient_norm_ratio",
    "hvp",
    "sharpness",
    "spectrum",
    "trace",
]
