"""Quantize a transformers model to 4 bits, train it a little, and compare with rounding alone.

    python examples/quantize_transformers.py                  a tiny Llama with random weights, in seconds
    python examples/quantize_transformers.py path/to/model    a model that `save_pretrained` wrote

Needs: pip install 'qatkernels[hf]'
"""

import sys

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from qatkernels import QuantConfig, check, param_groups, quantization_report, quantize_model

STEPS = 30


def load() -> torch.nn.Module:
    """Return the model of the command line, or a tiny one."""
    if len(sys.argv) > 1:
        return AutoModelForCausalLM.from_pretrained(sys.argv[1])
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
    )


def batch(model: torch.nn.Module, seed: int) -> torch.Tensor:
    """Return token ids. Here: sequences that count upwards from a random start. Use your own text instead."""
    start = torch.randint(model.config.vocab_size, (8, 1), generator=torch.Generator().manual_seed(seed))
    return (start + torch.arange(32)) % model.config.vocab_size


def loss_of(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Return the loss of predicting each token from those before it; transformers shifts the labels itself."""
    return model(input_ids=ids, labels=ids).loss


model = load()
model = quantize_model(model, QuantConfig(bits=4, group_size=32))  # lm_head stays in full precision
print(quantization_report(model).summary)
print("check:", "ok" if check(model, batch(model, 0)).ok else check(model, batch(model, 0)))

held_out = batch(model, 10_000)
with torch.no_grad():
    print(f"rounded to nearest: loss {loss_of(model, held_out):.3f}")

optimizer = torch.optim.AdamW(param_groups(model, lr=3e-3))  # scales get a smaller rate, and no weight decay
for step in range(STEPS):
    optimizer.zero_grad()
    loss = loss_of(model, batch(model, step))
    loss.backward()
    optimizer.step()

model.eval()
with torch.no_grad():
    print(f"after {STEPS} steps:     loss {loss_of(model, held_out):.3f}")
