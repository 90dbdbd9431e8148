"""Add a quantization scheme from outside of the package: a grid is a row of numbers that every kernel reads.

    python examples/add_scheme.py

The scheme here has the seven levels -3 to 3, times the scale, and is stored in 4 bits.
"""

import torch

import qatkernels as qk
from qatkernels.grids import SCHEMES, Grid


def seven(bits: float) -> Grid:
    """Return the grid of the levels -3 to 3, stored in 4 bits, with LSQ's straight-through rule."""
    if bits != 4:
        raise ValueError(f"bits is {bits}, must be 4 for scheme 'seven'")
    ends = (-3.0, 3.0)
    return Grid("seven", 4, -3, 3, steps=1.0, offset=0.0, clamp=ends, passes=ends, saturated=ends, qmax=3, reach=3.0)


SCHEMES["seven"] = seven

torch.manual_seed(0)
model = qk.quantize_model(torch.nn.Sequential(torch.nn.Linear(64, 32)), qk.QuantConfig(bits=4, scheme="seven"))
layer = model[0]
levels = (layer.quantized_weight() / layer.scale[:, None]).detach().round(decimals=4)
print("levels:", sorted(set(levels.flatten().tolist())))

x = torch.randn(8, 64)
model(x).square().mean().backward()
print("gradients:", layer.weight.grad.norm().item() > 0, layer.scale.grad.norm().item() > 0)

expected = model.eval()(x)
difference = (qk.pack_model(model)(x) - expected).abs().max()
print(f"packed: largest difference {difference:.1e}")
