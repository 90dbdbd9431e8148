"""A small decoder-only transformer over bytes. It uses plain nn.Linear, which `quantize_model` can replace."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..methods.values import check_count
from ..options import AT_LEAST_1, ConfigError, check, option


@dataclass(frozen=True)
class ModelConfig:
    """Shape of a :class:`Transformer`; ``vocab`` is the number of tokens, 256 for bytes.

    Raises:
        ConfigError: if a number is out of range, or ``width / heads`` is odd: rotary positions need pairs of features.
    """

    width: int = option(192, "features of the residual stream", AT_LEAST_1)
    depth: int = option(3, "transformer blocks", AT_LEAST_1)
    heads: int = option(3, "attention heads", AT_LEAST_1)
    context: int = option(128, "tokens (bytes) in a window", AT_LEAST_1)
    vocab: int = 256

    def __post_init__(self) -> None:
        check(self)
        check_count("vocab", self.vocab, 1)
        if self.width % (2 * self.heads):
            raise ConfigError(f"--heads is {self.heads}, twice that must divide --width ({self.width})")


class RMSNorm(nn.Module):
    """Root mean square normalization (Zhang and Sennrich, 2019) in the dtype of its input."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """Normalize the last dimension of ``x``."""
        return F.rms_norm(x, (x.shape[-1],), self.weight.to(x.dtype), 1e-6)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply rotary positions (Su et al., 2021) to ``x`` ``[batch, heads, time, features]``."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)


class Cache:
    """Keys and values of the tokens so far, so that the next token costs one position.

    Args:
        config: shape of the model; the cache holds ``config.context`` positions.
    """

    def __init__(self, config: ModelConfig) -> None:
        self.config = config
        self.length = 0
        self._layers: dict[int, Tensor] = {}

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append keys and values ``[batch, heads, time, features]`` of one layer and return all of them."""
        if layer not in self._layers:
            batch, heads, _, features = k.shape
            self._layers[layer] = k.new_empty(2, batch, heads, self.config.context, features)
        end = self.length + k.shape[2]
        keys, values = self._layers[layer]
        keys[:, :, self.length : end], values[:, :, self.length : end] = k, v
        return keys[:, :, :end], values[:, :, :end]


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Return scaled dot-product attention, causal without a mask.

    On a CPU it computes in float32 even under autocast to bfloat16: over 128 tokens, forward and backward take 3 ms in
    float32 and 12 ms in bfloat16.

    Args:
        q: queries ``[batch, heads, time, features]``.
        k: keys of the same shape, possibly with more positions.
        v: values like ``k``.
        mask: bool ``[queries, keys]``, True where a query sees a key.
    """
    if q.device.type != "cpu" or not torch.is_autocast_enabled("cpu"):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
    with torch.autocast("cpu", enabled=False):
        return F.scaled_dot_product_attention(q.float(), k.float(), v.float(), attn_mask=mask, is_causal=mask is None)


class Attention(nn.Module):
    """Causal self-attention with rotary positions."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.qkv = nn.Linear(config.width, 3 * config.width, bias=False)
        self.out = nn.Linear(config.width, config.width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cache: Cache | None = None, layer: int = 0) -> Tensor:
        """Map ``x`` ``[batch, time, width]`` with the angles' ``cos`` and ``sin`` ``[time, features / 2]``."""
        batch, time, width = x.shape
        q, k, v = self.qkv(x).view(batch, time, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        q, k, mask = rotate(q, cos, sin), rotate(k, cos, sin), None
        if cache is not None:
            k, v = cache.extend(layer, k, v)
            # New token i is at position cache.length + i of the sequence, and sees that position and all before it.
            mask = torch.ones(time, k.shape[2], dtype=torch.bool, device=x.device).tril(cache.length)
        y = attend(q, k, v, mask)
        return self.out(y.transpose(1, 2).reshape(batch, time, width))


class MLP(nn.Module):
    """SwiGLU (Shazeer, 2020), with about as many weights as a plain MLP with hidden layer ``4 * width``."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        hidden = -(-config.width * 8 // 3 // 32) * 32
        self.gate_up = nn.Linear(config.width, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, config.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map the last dimension of ``x``."""
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class Block(nn.Module):
    """One transformer layer: attention and MLP, each on the normalized residual stream."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attention_norm, self.mlp_norm = RMSNorm(config.width), RMSNorm(config.width)
        self.attention, self.mlp = Attention(config), MLP(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cache: Cache | None = None, layer: int = 0) -> Tensor:
        """Map ``x`` ``[batch, time, width]``; other arguments as in :class:`Attention`."""
        x = x + self.attention(self.attention_norm(x), cos, sin, cache, layer)
        return x + self.mlp(self.mlp_norm(x))


class Transformer(nn.Module):
    """A byte-level language model.

    Args:
        config: its shape. Weights are drawn from torch's default generator.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.norm = RMSNorm(config.width)
        self.lm_head = nn.Linear(config.width, config.vocab, bias=False)
        half = config.width // config.heads // 2
        angles = torch.outer(torch.arange(config.context), 1e4 ** (-torch.arange(half) / half))
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)
        self._initialize()

    def _initialize(self) -> None:
        for name, module in self.blocks.named_modules():
            if isinstance(module, nn.Linear):
                # Layers that write to the residual stream start smaller, so that its variance does not grow with depth.
                depth = 2 * self.config.depth if name.endswith((".out", ".down")) else 1
                nn.init.normal_(module.weight, std=(module.in_features * depth) ** -0.5)
        for vocabulary_layer in (self.embedding, self.lm_head):
            nn.init.normal_(vocabulary_layer.weight, std=0.02)

    def forward(self, tokens: Tensor, cache: Cache | None = None) -> Tensor:
        """Return next-token logits.

        Args:
            tokens: int64 ``[batch, time]``, ``time`` at most ``config.context``.
            cache: keys and values of the tokens before these; those of ``tokens`` are appended. If None, ``tokens`` is
                the whole sequence.

        Returns:
            ``[batch, time, vocab]``, in the dtype of autocast where it is on.

        Raises:
            ValueError: if the sequence is longer than the context.
        """
        start = 0 if cache is None else cache.length
        end = start + tokens.shape[1]
        if end > self.config.context:
            after = f" after the {start} of the cache" if start else ""
            room = self.config.context - start
            raise ValueError(f"tokens has {tokens.shape[1]} positions{after}, must have at most {room}")
        x = self.embedding(tokens)
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        cos, sin = self.cos[start:end].to(x.dtype), self.sin[start:end].to(x.dtype)
        for layer, block in enumerate(self.blocks):
            x = block(x, cos, sin, cache, layer)
        if cache is not None:
            cache.length = end
        return self.lm_head(self.norm(x))
