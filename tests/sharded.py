"""A small model with what FSDP2 may shard, for tests of what works on shards."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import qatkernels as qk
from qatkernels.nn import GroupedQuantLinear, QuantConfig, calibrate, shard_scales

CONFIGS = {
    "row": QuantConfig(4),
    "tensor": QuantConfig(3, per_tensor=True),
    "affine": QuantConfig(4, "affine", group_size=4),
    "inputs and outputs": QuantConfig(4, act_bits=8, act_scheme="lsq+", out_bits=8),
}


class Model(nn.Module):
    """Tied weights, rows that do not divide by two, experts, a frozen weight, and a parameter that no layer has."""

    def __init__(self, config):
        super().__init__()
        self.embedding, self.head = nn.Embedding(11, 8), nn.Linear(8, 11, bias=False)
        self.head.weight = self.embedding.weight
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 5), nn.Tanh(), nn.Linear(5, 8)) for _ in range(2))
        self.norm, self.dropout = nn.LayerNorm(8), nn.Dropout(0.3)
        self.shift = nn.Parameter(0.1 * torch.randn(8))
        self.experts = GroupedQuantLinear(2, 8, 8, config=config)
        qk.quantize_model(self, config, include=["blocks.*.0"], exclude=())
        self.norm.bias.requires_grad_(False)

    def forward(self, tokens):
        x = self.embedding(tokens)
        for block in self.blocks:
            x = x + block(x)
        x = self.experts(x, torch.tensor([len(x) // 2, len(x)], dtype=torch.int32))
        return self.head(self.dropout(self.norm(x) * (1 + self.shift)))


BATCHES = [torch.arange(i, i + 6) % 11 for i in range(3)]


def make(name="row"):
    torch.manual_seed(0)
    model = Model(CONFIGS[name])
    calibrate(model, BATCHES[0])
    return model.eval()


def shard(model, scales=False, cast=True):
    """Shard blocks and the rest; with scales by themselves, and perhaps mixed precision beside it."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    options = {}
    if scales:
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16 if cast else None, reduce_dtype=torch.float32)
        options |= {"ignored_params": shard_scales(model), "mp_policy": policy}
    for block in model.blocks:
        fully_shard(block, **options)
    fully_shard(model, **options)
    return model


def loss_of(model, tokens):
    return F.cross_entropy(model(tokens).double(), tokens.roll(1))


def trained(model):
    return [p for p in model.parameters() if p.requires_grad]


def llama(width):
    """Return a Llama of two layers, quantized to 4 bits; skips the test without transformers."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=width, intermediate_size=width, num_hidden_layers=2, num_attention_heads=2
    )
    return qk.quantize_model(transformers.LlamaForCausalLM(config), QuantConfig(4)).eval()
