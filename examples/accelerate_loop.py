"""Quantize a model in a loop with accelerate: several devices, mixed precision, gradient accumulation.

    python examples/accelerate_loop.py
    accelerate launch --multi_gpu --num_processes 2 examples/accelerate_loop.py      # on CPUs too: --cpu starts one

Needs: pip install qatkernels accelerate
"""

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch.utils.data import DataLoader, TensorDataset

from qatkernels import QuantConfig, pack_model, param_groups, quantize_model, save_packed
from qatkernels.methods import WinQ

EPOCHS = 3

torch.manual_seed(0)
x = torch.randn(2048, 32)
y = torch.sin(x @ torch.randn(32, 8) / 6)  # what the model has to learn
batches = DataLoader(TensorDataset(x, y), batch_size=64, shuffle=True)

model = torch.nn.Sequential(torch.nn.Linear(32, 128), torch.nn.GELU(), torch.nn.Linear(128, 8))
model = quantize_model(model, QuantConfig(bits=2))  # before prepare, so that DDP sees the scales
optimizer = torch.optim.AdamW(param_groups(model, lr=3e-3))

accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)  # on GPUs: without cpu=True
model, optimizer, batches = accelerator.prepare(model, optimizer, batches)
winq = WinQ(model, reset_every=16, reset_weight=0.4, noise_std=1e-3)

for epoch in range(EPOCHS):
    for inputs, targets in batches:
        with accelerator.accumulate(model):
            loss = F.mse_loss(model(inputs), targets)
            accelerator.backward(loss)
            optimizer.step()
            if accelerator.sync_gradients:  # the optimizer has taken a step, so the weights have moved
                winq.after_step()
            optimizer.zero_grad()
    accelerator.print(f"epoch {epoch + 1}: loss {loss:.4f}, resets {winq.resets}")

winq.remove()
trained = accelerator.unwrap_model(model).eval()
accelerator.print(f"{accelerator.num_processes} processes, without noise: {F.mse_loss(trained(x), y):.4f}")
if accelerator.is_main_process:
    save_packed(pack_model(trained), "packed.safetensors")
