"""DDP around a model that one process calibrated, with a static graph and with gradient accumulation."""

import contextlib

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.checkpoint import checkpoint

import qatkernels as qk
from qatkernels.nn import QuantConfig, calibrate
from qatkernels.testing.compare import assert_same_bits

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo")

STEPS, PARTS = 3, 2
CONFIGS = {
    "row": QuantConfig(2),
    "searched scales": QuantConfig(2, group_size=8, scale_init="activation"),
    "learned inputs": QuantConfig(4, "affine", act_bits=8, act_scheme="lsq+"),
}
#: Options of DDP, and whether gradients of two parts are accumulated.
WAYS = {
    "calibrated": ({}, False),
    "static graph": ({"static_graph": True}, False),
    "no_sync": ({}, True),
    "static graph, no_sync": ({"static_graph": True}, True),
}


class Model(nn.Module):
    """A layer is called twice, and recomputed in the backward."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(11, 16)
        self.up, self.down, self.head = nn.Linear(16, 24), nn.Linear(24, 16), nn.Linear(16, 11, bias=False)

    def block(self, x):
        return x + self.down(nn.functional.gelu(self.up(x)))

    def forward(self, tokens):
        x = self.embedding(tokens)
        for _ in range(2):
            x = checkpoint(self.block, x, use_reentrant=False)
        return self.head(x)


def make(name):
    torch.manual_seed(0)
    return qk.quantize_model(Model(), CONFIGS[name], embeddings=name == "row", exclude=())


def tokens(step):
    """Return tokens and targets of the two processes."""
    return torch.randint(11, (2, 2, 4 * PARTS, 6), generator=torch.Generator().manual_seed(step))


def trained(model, step_loss):
    optimizer = torch.optim.AdamW(qk.param_groups(model, lr=1e-3))
    losses, grads = [], {}
    for step in range(STEPS):
        optimizer.zero_grad()
        losses.append(step_loss(step))
        grads = grads or {n: p.grad.clone() for n, p in model.named_parameters()}
        optimizer.step()
    return losses, grads, {n: p.detach() for n, p in model.named_parameters()}


def loss_of(model, given):
    x, wanted = given
    return nn.functional.cross_entropy(model(x).flatten(0, 1), wanted.flatten())


def of_two(rank, name, way):
    options, accumulates = WAYS[way]
    model = make(name)
    if rank == 0:
        calibrate(model, tokens(100).flatten(0, 2))
    wrapped = nn.parallel.DistributedDataParallel(model, **options)
    scales = {n: t.clone() for n, t in model.state_dict().items() if "scale" in n or "initialized" in n}

    def step_loss(step):
        # With a static graph torch fails if the first backward does not reduce gradients.
        count = PARTS if accumulates and (step or not options) else 1
        parts, total = tokens(step)[rank].chunk(count, 1), 0.0
        for i, part in enumerate(parts):
            with contextlib.nullcontext() if i == len(parts) - 1 else wrapped.no_sync():
                loss = loss_of(wrapped, part) / len(parts)
                loss.backward()
            total += loss.detach()
        return total

    results = trained(model, step_loss)
    notes = [note for layer in qk.check(model, tokens(0)[rank, 0]).layers for note in layer.notes]
    return *results, scales, notes


def of_one(name):
    model = make(name)
    calibrate(model, tokens(100).flatten(0, 2))
    scales = {n: t.clone() for n, t in model.state_dict().items() if "scale" in n or "initialized" in n}

    def step_loss(step):
        losses = [loss_of(model, given) for given in tokens(step)]
        (sum(losses) / 2).backward()
        return [loss.detach() for loss in losses]

    return *trained(model, step_loss), scales


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", CONFIGS)
def test_two_processes_are_one(pair, name, way):
    losses, grads, parameters, scales = of_one(name)
    found = pair.run(of_two, name, way)
    for rank, (own_losses, own_grads, own_parameters, own_scales, notes) in enumerate(found):
        assert own_scales.keys() == scales.keys()
        for key, value in scales.items():
            assert_same_bits(own_scales[key], value)
        torch.testing.assert_close(own_losses, [of_step[rank] for of_step in losses])
        for wanted, tensors in ((grads, own_grads), (parameters, own_parameters)):
            for key, value in wanted.items():
                torch.testing.assert_close(tensors[key], value, msg=lambda text, key=key: f"{key}: {text}")
        assert not [note for note in notes if "calibrate" in note]
    for key, value in found[0][2].items():
        assert_same_bits(found[1][2][key], value)
