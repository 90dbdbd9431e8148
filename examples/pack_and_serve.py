"""Pack a quantized model, write it to a file, load it, and run it: codes of 2 bits in place of weights.

    python examples/pack_and_serve.py [FILE]

The file is read without running code from it, and has a digest (docs/packing.md).
"""

import sys
import tempfile
from pathlib import Path

import torch

import qatkernels as qk


def build() -> torch.nn.Module:
    """Return the model before it is quantized; loading a packed file needs the same structure."""
    return torch.nn.Sequential(torch.nn.Linear(256, 512), torch.nn.GELU(), torch.nn.Linear(512, 64))


torch.manual_seed(0)
model = qk.quantize_model(build(), qk.QuantConfig(bits=2)).eval()  # train here
x = torch.randn(4, 256)
expected = model(x)

packed = qk.pack_model(model)
path = Path(sys.argv[1] if len(sys.argv) > 1 else Path(tempfile.mkdtemp()) / "model.safetensors")
qk.save_packed(packed, path, {"made by": "pack_and_serve.py"})

loaded = qk.load_packed(path, lambda config: build()).eval()
y = loaded(x)
full = sum(p.numel() * 4 for p in build().parameters())
print(f"{path}: {path.stat().st_size:,} bytes, {full / path.stat().st_size:.1f} times smaller than float32")
print(f"largest difference to the fake-quantized model: {(y - expected).abs().max():.2e}")
torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
