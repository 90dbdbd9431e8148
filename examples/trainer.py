"""Train a quantized model with transformers' Trainer, and distil it from the same model in full precision.

    python examples/trainer.py

The folder it leaves is one of transformers: `from_pretrained` reads it, `qatkernels pack` and `export` take it.
Needs: pip install 'qatkernels[hf]' accelerate
"""

import copy

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, TrainingArguments

from qatkernels import QuantConfig, quantize_model
from qatkernels.integrations.transformers import QATTrainer, WinQCallback

STEPS = 40


def sequences(count: int, seed: int) -> list[dict[str, torch.Tensor]]:
    """Return sequences that count upwards from a random start. Use your own text instead."""
    start = torch.randint(64, (count, 1), generator=torch.Generator().manual_seed(seed))
    return [{"input_ids": row, "labels": row} for row in (start + torch.arange(32)) % 64]


def arguments(steps: int) -> TrainingArguments:
    """Return the usual settings of a Trainer."""
    return TrainingArguments(
        output_dir="trainer-runs", max_steps=steps, per_device_train_batch_size=8, learning_rate=3e-3, use_cpu=True,
        report_to=[], save_strategy="no", logging_steps=steps, disable_tqdm=True, seed=0,
    )  # fmt: skip


torch.manual_seed(0)
shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
model = LlamaForCausalLM(LlamaConfig(vocab_size=64, **shape))
text = {"train_dataset": sequences(256, 0), "eval_dataset": sequences(32, 1)}

full_precision = QATTrainer(model, arguments(4 * STEPS), **text)  # in real life: a model that you have
full_precision.train()
print(f"full precision: loss {full_precision.evaluate()['eval_loss']:.3f}")

teacher = copy.deepcopy(model)
model = quantize_model(model, QuantConfig(bits=2, group_size=32))  # lm_head stays in full precision
trainer = QATTrainer(
    model, arguments(STEPS), **text, teacher=teacher, distill=0.5,
    callbacks=[WinQCallback(reset_every=STEPS // 2, reset_weight=0.4, noise_std=1e-3)],
)  # fmt: skip
print(f"rounded:        loss {trainer.evaluate()['eval_loss']:.3f}")
trainer.train()
print(f"trained:        loss {trainer.evaluate()['eval_loss']:.3f}")

trainer.save_model("trained")
loaded = AutoModelForCausalLM.from_pretrained("trained").eval()
ids = text["eval_dataset"][0]["input_ids"][None]
with torch.no_grad():
    difference = (loaded(ids).logits - model.eval()(ids).logits).abs().max()
print(f"loaded again:   logits differ by at most {difference:.1e}")
