"""Tiny causal language models of transformers, quantized."""

import torch

import qatkernels as qk

IDS = torch.tensor([[1, 7, 250, 33, 98, 4, 4, 121, 64], [2, 9, 11, 200, 5, 17, 31, 77, 140]])
SIZES = {
    "vocab_size": 259, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "initializer_range": 0.08,
}  # fmt: skip


def build(kind="llama", config=None, **settings):
    """Return a quantized model whose weights reach every code, in rows of 64, 96 and 128."""
    import transformers

    torch.manual_seed(0)
    heads = {} if kind in ("llama", "qwen2", "gpt2") else {"head_dim": 32}
    described = transformers.AutoConfig.for_model(kind, **{**SIZES, **heads, **settings})
    model = transformers.AutoModelForCausalLM.from_config(described).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name or name.endswith("bias"):
            torch.nn.init.normal_(parameter, 0.0 if name.endswith("bias") else 1.0, 0.1)
    if config is None:
        return model
    qk.quantize_model(model, config, warn_below=0)
    with torch.no_grad():
        for layer in qk.quantized_modules(model).values():
            layer.weight.mul_(1.5)  # beyond the clamp
            if layer.zero_point is not None:
                layer.zero_point.copy_(layer.zero_point.round())
    return model


@torch.no_grad()
def logits(model):
    """Return the logits of two sequences."""
    return model(input_ids=IDS).logits
