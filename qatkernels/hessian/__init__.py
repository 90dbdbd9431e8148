"""Hessian-vector products, and the spectrum, eigenpairs, trace and sharpness computed from them."""

from ._eigs import Eigs, eigs
from ._hvp import hvp
from ._sharpness import Sharpness, gradient_norm_ratio, sharpness
from ._spectrum import Estimate, Spectrum, spectrum
from ._trace import trace
from .lanczos import NotFiniteError
from .operator import HessianOperator, MatrixMap, SymmetricMap

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
