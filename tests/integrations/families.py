"""Tiny models of transformers, one of each family, with inputs to train on and to generate from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers

IDS = torch.arange(3, 27).view(2, 12)
SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


@dataclass(frozen=True)
class Family:
    """One kind of model.

    Attributes:
        config: makes its configuration.
        model: name of its class.
        share: share of the parameters that is quantized; the rest is embeddings, heads, convolutions and vectors.
        experts: whether it has stacked experts.
        inputs: what the model is trained on.
        prompt: what it generates from; None if it does not generate.
        checkpointing: whether the model has gradient checkpointing.
    """

    config: Callable[[], Any]
    share: float
    model: str = "AutoModelForCausalLM"
    experts: bool = False
    inputs: Callable[[], dict[str, Any]] = lambda: {"input_ids": IDS, "labels": IDS}
    prompt: Callable[[], dict[str, Any]] | None = lambda: {"input_ids": IDS[:, :4]}
    checkpointing: bool = True

    def build(self, **changes: Any) -> Any:
        """Return a model with the same random weights at every call."""
        torch.manual_seed(0)
        config = self.config()
        for name, value in changes.items():
            setattr(config, name, value)
        cls = getattr(transformers, self.model)
        return cls.from_config(config) if self.model.startswith("Auto") else cls(config)


def _lm(kind: str, **changes: Any) -> Callable[[], Any]:
    return lambda: transformers.AutoConfig.for_model(kind, **{**SIZES, **changes})


def _of(cls: str, **values: Any) -> Callable[[], Any]:
    return lambda: getattr(transformers, cls)(**values)


def _pixels() -> dict[str, Any]:
    return {"pixel_values": torch.randn(2, 3, 16, 16, generator=_generator()), "labels": torch.tensor([0, 1])}


def _sound() -> dict[str, Any]:
    return {"input_features": torch.randn(2, 8, 32, generator=_generator())}


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(1)


_BERT = {name: value for name, value in SIZES.items() if name != "num_key_value_heads"}
_T5 = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
_VIT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
_WHISPER = {
    "vocab_size": 64, "num_mel_bins": 8, "d_model": 32, "encoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_layers": 2, "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64,
    "max_source_positions": 16, "max_target_positions": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "decoder_start_token_id": 1, "begin_suppress_tokens": None,
}  # fmt: skip
_DEEPSEEK = {
    "num_key_value_heads": 4, "n_routed_experts": 4, "n_group": 2, "topk_group": 1, "num_experts_per_tok": 2,
    "moe_intermediate_size": 32, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "v_head_dim": 8,
    "qk_nope_head_dim": 8, "first_k_dense_replace": 1,
}  # fmt: skip
_MAMBA = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8}

FAMILIES = {
    "llama": Family(_lm("llama"), 0.81),
    "qwen3": Family(_lm("qwen3", head_dim=8), 0.81),
    "gemma": Family(_lm("gemma", head_dim=8), 0.89),
    "gemma3": Family(_lm("gemma3_text", head_dim=8), 0.88),
    "mistral": Family(_lm("mistral"), 0.81),
    "phi": Family(_lm("phi"), 0.75),
    "phi3": Family(_lm("phi3"), 0.81),
    "gpt2": Family(_of("GPT2Config", vocab_size=64, n_positions=64, n_embd=32, n_layer=2, n_head=4), 0.83),
    "bert": Family(_of("BertConfig", **_BERT), 0.72, model="BertForMaskedLM", prompt=None),
    "t5": Family(
        _of("T5Config", **_T5, decoder_start_token_id=0), 0.93, model="T5ForConditionalGeneration",
        prompt=lambda: {"input_ids": IDS},
    ),
    "vit": Family(
        _of("ViTConfig", **_VIT, image_size=16, patch_size=4), 0.84, model="ViTForImageClassification", inputs=_pixels,
        prompt=None,
    ),
    "whisper": Family(
        _of("WhisperConfig", **_WHISPER), 0.81, model="WhisperForConditionalGeneration",
        inputs=lambda: {**_sound(), "labels": IDS}, prompt=_sound,
    ),
    "mixtral": Family(_lm("mixtral", num_local_experts=4), 0.92, experts=True),
    "qwen3-moe": Family(
        _lm("qwen3_moe", num_experts=4, moe_intermediate_size=32, num_experts_per_tok=2, head_dim=8), 0.87, experts=True
    ),
    "gpt-oss": Family(  # whose stacks are transposed, down_proj square, with biases, gates and values in turn
        _lm("gpt_oss", num_local_experts=4, num_experts_per_tok=2, head_dim=8, intermediate_size=32), 0.84, experts=True
    ),
    "deepseek-v3": Family(_lm("deepseek_v3", **_DEEPSEEK), 0.87, experts=True),
    "olmoe": Family(_lm("olmoe", num_experts=4, num_experts_per_tok=2), 0.92, experts=True),
    "mamba": Family(_of("MambaConfig", **_MAMBA, time_step_rank=4), 0.76),
    "mamba2": Family(_of("Mamba2Config", **_MAMBA, num_heads=8, head_dim=8, n_groups=1), 0.72),
    "jamba": Family(_lm("jamba", num_experts=4, attn_layer_period=2, attn_layer_offset=1), 0.87, experts=True),
    "rwkv": Family(
        _of("RwkvConfig", **{**_MAMBA, "state_size": None}, context_length=32, rescale_every=0), 0.84,
        checkpointing=False,
    ),
}  # fmt: skip
EXPERTS = [name for name, family in FAMILIES.items() if family.experts]
