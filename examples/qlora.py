"""Train LoRA adapters over a packed model: the base is frozen codes of few bits, the adapters are full precision.

    python examples/qlora.py                                    a tiny Llama with random weights, in seconds
    python examples/qlora.py HuggingFaceTB/SmolLM2-135M         a model of the Hub or a folder
    python examples/qlora.py HuggingFaceTB/SmolLM2-135M 2       the same at 2 bits

Needs: pip install 'qatkernels[hf]' peft
"""

import sys

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from qatkernels import QuantConfig, pack_model, quantize_model
from qatkernels.nn import model_bytes

STEPS = 30
BITS = float(sys.argv[2]) if len(sys.argv) > 2 else 4


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
before = model_bytes(model)
# Scales with the smallest error: nothing is trained before packing. lm_head stays in full precision.
model = pack_model(quantize_model(model, QuantConfig(bits=BITS, group_size=32, scale_init="mse")))
print(f"base: {before / 1e6:.2f} MB, packed to {BITS:g} bits: {model_bytes(model) / 1e6:.2f} MB")

exclude = ["lm_head"]
model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", exclude_modules=exclude))
trained = [p for p in model.parameters() if p.requires_grad]
print(f"adapters: {sum(p.numel() for p in trained):,} parameters")

held_out = batch(model, 10_000)
with torch.no_grad():
    print(f"packed base:    loss {loss_of(model, held_out):.3f}")

optimizer = torch.optim.AdamW(trained, lr=1e-2)
for step in range(STEPS):
    optimizer.zero_grad()
    loss = loss_of(model, batch(model, step))
    loss.backward()
    optimizer.step()

model.eval()
with torch.no_grad():
    print(f"after {STEPS} steps: loss {loss_of(model, held_out):.3f}")
model.save_pretrained("adapter")  # the adapters alone
