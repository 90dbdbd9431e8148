"""A decode step of a packed language model: token by token with a cache, and on a GPU captured in a CUDA graph."""

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import qatkernels as qk
from qatkernels.nn.packed_linear import PackedLinear
from qatkernels.ops.packing import row_bytes
from tests.implementations import GPU


@dataclass(frozen=True)
class Size:
    """Sizes of a model of the Llama family."""

    layers: int
    hidden: int
    mlp: int
    heads: int
    kv_heads: int
    vocabulary: int
    length: int

    @property
    def head(self):
        return self.hidden // self.heads


TINY = Size(layers=2, hidden=64, mlp=160, heads=4, kv_heads=2, vocabulary=97, length=8)
#: As Llama 3.2 1B: 973 million weights in packed layers, and 263 million in 16 bits in the embedding and in the head.
ONE_B = Size(layers=16, hidden=2048, mlp=8192, heads=32, kv_heads=8, vocabulary=128256, length=256)


def packed_linear(grid, rows, cols, group_size, device, generator):
    """Return a layer of random codes. Any byte is valid, because these grids use every code."""
    packed = torch.randint(
        0, 256, (rows, row_bytes(cols, grid.storage_bits)), dtype=torch.uint8, device=device, generator=generator
    )
    groups = 1 if group_size is None else cols // group_size
    scale = 2.0 / cols**0.5 * (0.5 + torch.rand(rows, groups, device=device, generator=generator))
    return PackedLinear(qk.PackedWeight(packed, scale, None, grid, cols))


class Block(nn.Module):
    """Attention over a cache and a gated MLP."""

    def __init__(self, size, layer):
        super().__init__()
        self.size = size
        kv = size.kv_heads * size.head
        self.q, self.k, self.v = layer(size.hidden, size.hidden), layer(kv, size.hidden), layer(kv, size.hidden)
        self.o = layer(size.hidden, size.hidden)
        self.gate, self.up = layer(size.mlp, size.hidden), layer(size.mlp, size.hidden)
        self.down = layer(size.hidden, size.mlp)

    def forward(self, x, cache, position, seen):
        heads = (len(x), -1, 1, self.size.head)
        y = F.rms_norm(x, x.shape[-1:])
        cache[0].index_copy_(2, position, self.k(y).view(heads))
        cache[1].index_copy_(2, position, self.v(y).view(heads))
        shared = self.size.heads // self.size.kv_heads
        keys, values = (part.repeat_interleave(shared, 1) for part in cache)
        attended = F.scaled_dot_product_attention(self.q(y).view(heads), keys, values, seen)
        x = x + self.o(attended.reshape(len(x), -1))
        y = F.rms_norm(x, x.shape[-1:])
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class Decoder(nn.Module):
    """A model with its decoding state: cache, position and next tokens."""

    def __init__(self, size, sequences, grid, group_size, dtype, device):
        super().__init__()
        generator = torch.Generator(device).manual_seed(0)

        def layer(rows, cols):
            return packed_linear(grid, rows, cols, group_size, device, generator)

        self.embedding, self.head = (
            nn.Parameter(
                torch.randn(size.vocabulary, size.hidden, device=device, generator=generator).to(dtype),
                requires_grad=False,
            )
            for _ in range(2)
        )
        self.blocks = nn.ModuleList(Block(size, layer) for _ in range(size.layers))
        shape = (size.layers, 2, sequences, size.kv_heads, size.length, size.head)
        self.register_buffer("cache", torch.zeros(shape, dtype=dtype, device=device))
        self.register_buffer("position", torch.zeros(1, dtype=torch.int64, device=device))
        self.register_buffer("tokens", torch.zeros(sequences, dtype=torch.int64, device=device))
        self.register_buffer("places", torch.arange(size.length, device=device))

    def restart(self):
        """Clear the cache, and start each sequence with another token."""
        self.cache.zero_()
        self.position.zero_()
        self.tokens.copy_(torch.arange(len(self.tokens)) + 1)

    def forward(self):
        """Process one token of each sequence, choose the most likely next token, and return the logits."""
        x, seen = F.embedding(self.tokens, self.embedding), (self.places <= self.position)[None]
        for block, cache in zip(self.blocks, self.cache, strict=True):
            x = block(x, cache, self.position, seen)
        logits = F.linear(F.rms_norm(x, x.shape[-1:]), self.head) / x.shape[-1] ** 0.5
        self.tokens.copy_(logits.argmax(-1))
        self.position += 1
        return logits


def decoded(model, steps, step):
    """Return the logits and the tokens of the first steps."""
    model.restart()
    found = []
    with torch.inference_mode():
        for _ in range(steps):
            logits = step().float().clone()
            found.append((logits, model.tokens.clone()))
    return found


class Numbers(nn.Module):
    """A layer with an unquantized weight."""

    def __init__(self, layer):
        super().__init__()
        self.weight = layer.weight.dequantize()

    def forward(self, x):
        return F.linear(x, self.weight)


@pytest.mark.parametrize(
    ("grid", "group_size"), [(qk.grids.seq(2), None), (qk.grids.lsq(4), 32)], ids=["2 bits", "4 bits"]
)
@pytest.mark.parametrize("sequences", [1, 3])
def test_steps_of_a_small_model(grid, group_size, sequences):
    """The step that a GPU captures below, with packed and with unquantized weights."""
    model = Decoder(TINY, sequences, grid, group_size, torch.float32, torch.device("cpu"))
    packed = decoded(model, TINY.length, model)
    for block in model.blocks:
        for name, layer in list(block.named_children()):
            setattr(block, name, Numbers(layer))
    for (logits, tokens), (expected, wanted) in zip(packed, decoded(model, TINY.length, model), strict=True):
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
        assert torch.equal(tokens, wanted)
    assert len({tuple(tokens.tolist()) for _, tokens in packed}) > 2, "the cache and the tokens have no effect"


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("grid", "group_size"), [(qk.grids.seq(2), None), (qk.grids.lsq(4), 128)], ids=["2 bits", "4 bits"]
)
@pytest.mark.parametrize("sequences", [1, 8])
def test_a_step_of_a_1b_model_in_a_graph(grid, group_size, sequences):
    """A replay gives the results of eager steps. A step that synchronizes with the device could not be captured."""
    model = Decoder(ONE_B, sequences, grid, group_size, torch.bfloat16, GPU)
    eager = decoded(model, 8, model)
    side, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    side.wait_stream(torch.cuda.current_stream())
    with torch.inference_mode(), torch.cuda.stream(side):
        model()
    torch.cuda.current_stream().wait_stream(side)
    with torch.inference_mode(), torch.cuda.graph(graph):
        output = model()

    def replay():
        output.fill_(torch.nan)
        graph.replay()
        return output

    for (logits, tokens), (expected, wanted) in zip(decoded(model, 8, replay), eager, strict=True):
        # Torch's own products may be others in a graph, with another order of their sums.
        torch.testing.assert_close(logits, expected, rtol=0, atol=2.0**-6 * expected.abs().max().item())
        if not torch.equal(tokens, wanted):
            break  # two tokens were almost as likely, and what follows is another text
    else:
        return
    best = expected.gather(-1, wanted[:, None]) - expected.gather(-1, tokens[:, None])
    assert best.max() <= 2.0**-5 * expected.abs().max(), "another token was far likelier"
