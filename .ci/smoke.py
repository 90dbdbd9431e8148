"""Use an installed qatkernels. The argument says what is installed: ``kernels``, or ``pure`` for a package without."""

import subprocess
import sys
import warnings
from pathlib import Path

import torch

kernels = sys.argv[1] == "kernels"
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import qatkernels
said = [str(warning.message) for warning in caught if "compiled kernels" in str(warning.message)]
assert bool(said) is not kernels, f"a slow installation must say so, another must not: {said}"
assert Path(qatkernels.__file__).is_relative_to(sys.prefix), f"{qatkernels.__file__} is not the installed package"
assert qatkernels.backends.chosen("fake_quantize", "CPU") == ("cpp" if kernels else "reference")

torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.GELU(), torch.nn.Linear(32, 8))
model = qatkernels.quantize_model(model, qatkernels.QuantConfig(bits=2))
x = torch.randn(16, 64)
loss = model(x).square().mean()
loss.backward()
assert loss > 0
assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in model.parameters())
y = model.eval()(x)
torch.testing.assert_close(qatkernels.pack_model(model)(x), y, rtol=1e-4, atol=1e-5)

doctor = [str(Path(sys.prefix) / "bin" / "qatkernels"), "doctor"]
done = subprocess.run(doctor, capture_output=True, text=True, check=True)
assert ("missing: cpp" in done.stdout) is not kernels, done.stdout
print(next(line for line in done.stdout.splitlines() if line.startswith("installed")))
