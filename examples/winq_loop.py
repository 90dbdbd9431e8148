"""WinQ in a plain training loop: noise in every forward, and weight resets every few steps.

    python examples/winq_loop.py

Paper: WinQ, weight resetting and noise-injected gradients; docs/winq-squat.md says which numbers it uses.
"""

import torch
import torch.nn.functional as F

from qatkernels import QuantConfig, param_groups, quantize_model
from qatkernels.methods import WinQ

STEPS = 60

torch.manual_seed(0)
x = torch.randn(512, 32)
y = torch.sin(x @ torch.randn(32, 8))  # what the model has to learn

model = torch.nn.Sequential(torch.nn.Linear(32, 128), torch.nn.GELU(), torch.nn.Linear(128, 8))
model = quantize_model(model, QuantConfig(bits=2))
optimizer = torch.optim.AdamW(param_groups(model, lr=3e-3))
winq = WinQ(model, reset_every=STEPS // 3, reset_weight=0.4, noise_std=1e-3)


def closure() -> torch.Tensor:
    """Compute the loss and its gradients."""
    optimizer.zero_grad()
    loss = F.mse_loss(model(x), y)
    loss.backward()
    return loss


for step in range(STEPS):
    loss = winq.gradient(closure)  # one pass; with two_sided=True or samples=2 it averages over several
    optimizer.step()
    winq.after_step()  # every reset_every-th call resets the weights; no quantized value changes by that
    if step % 10 == 9:
        log = winq.log()
        print(f"step {step + 1:3}  loss {loss:.4f}  resets {winq.resets}  flips {log['winq/flips']:.4f}")

winq.remove()  # no noise from here on
model.eval()
print(f"without noise: {F.mse_loss(model(x), y):.4f}")
