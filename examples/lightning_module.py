"""Train a quantized model with Lightning.

    python examples/lightning_module.py

Needs: pip install qatkernels lightning
"""

import logging

import lightning as L
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

from qatkernels import QuantConfig, pack_model, param_groups, quantize_model, save_packed
from qatkernels.methods import WinQ

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


class Regression(L.LightningModule):
    """A small network that is quantized to 2 bits, with WinQ's noise and resets."""

    def __init__(self) -> None:
        super().__init__()
        net = torch.nn.Sequential(torch.nn.Linear(32, 128), torch.nn.GELU(), torch.nn.Linear(128, 8))
        self.net = quantize_model(net, QuantConfig(bits=2))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return AdamW, with a smaller rate and no weight decay for scales."""
        return torch.optim.AdamW(param_groups(self.net, lr=3e-3))

    def on_fit_start(self) -> None:
        """Turn the noise on."""
        self.winq = WinQ(self.net, reset_every=20, reset_weight=0.4, noise_std=1e-3)

    def training_step(self, batch: list[torch.Tensor], index: int) -> torch.Tensor:
        """Return the loss of a batch."""
        inputs, targets = batch
        return F.mse_loss(self.net(inputs), targets)

    def on_train_batch_end(self, outputs: dict, batch: list[torch.Tensor], index: int) -> None:
        """Tell WinQ that the optimizer has taken a step. With gradient accumulation: only after the last part."""
        self.winq.after_step()

    def on_fit_end(self) -> None:
        """Turn the noise off."""
        self.winq.remove()


L.seed_everything(0, verbose=False)
x = torch.randn(2048, 32)
y = torch.sin(x @ torch.randn(32, 8) / 6)  # what the model has to learn
model = Regression()
print(f"before: {F.mse_loss(model.net(x), y):.4f}")
trainer = L.Trainer(
    max_epochs=3, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
    enable_model_summary=False,
)  # fmt: skip
trainer.fit(model, DataLoader(TensorDataset(x, y), batch_size=64, shuffle=True))
print(f"after:  {F.mse_loss(model.net.eval()(x), y):.4f}, resets {model.winq.resets}")
save_packed(pack_model(model.net), "packed.safetensors")
