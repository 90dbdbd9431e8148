"""What every op means: schema, reference, shape rule, derivatives."""

from .dynamic import fake_quantize_dynamic
from .fake_quantize import fake_quantize
from .noise import normal
from .perturb import perturb_, perturb_swap_, perturbation_norms
from .quantize import dequantize, quantize
from .reset import reset_

__all__ = [
    "dequantize",
    "fake_quantize",
    "fake_quantize_dynamic",
    "normal",
    "perturb_",
    "perturb_swap_",
    "perturbation_norms",
    "quantize",
    "reset_",
]
