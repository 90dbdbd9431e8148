"""A quantized model in two stages of torch's pipelines computes the bits of one process."""

import pytest
import torch
import torch.distributed as dist
from torch import nn

import qatkernels as qk
from qatkernels.nn import QuantConfig, calibrate, pack_model
from qatkernels.testing.compare import assert_same_bits

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo")

PARTS, STEPS = 4, 2
CONFIGS = {
    "row": QuantConfig(2),
    "affine": QuantConfig(4, "affine", group_size=8),
    "learned inputs": QuantConfig(4, act_bits=8, act_scheme="lsq+"),
}


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(16), nn.Linear(16, 24), nn.Linear(24, 16)

    def forward(self, x):
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


def make(name):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(11, 16), *(Block() for _ in range(3)), nn.Linear(16, 11))
    qk.quantize_model(model, CONFIGS[name], embeddings=name == "row", exclude=())
    calibrate(model, tokens(0))
    return model


def tokens(step):
    return torch.randint(11, (8, 6), generator=torch.Generator().manual_seed(step))


def loss_of(logits, wanted):
    return nn.functional.cross_entropy(logits.flatten(0, 1), wanted.flatten())


def trained(model, take_step):
    """Train; return the losses of the parts, the first gradients, and the parameters."""
    optimizer, losses, grads = torch.optim.SGD(qk.param_groups(model, lr=0.05, scale_lr=0.005)), [], {}
    for step in range(STEPS):
        optimizer.zero_grad()
        losses += take_step(tokens(step), tokens(step + 10))
        grads = grads or {n: p.grad.clone() for n, p in model.named_parameters()}
        optimizer.step()
    return losses, grads, {n: p.detach() for n, p in model.named_parameters()}


def alone(model):
    """Train in the order of the schedules, part after part, so that the bits are the same."""

    def take_step(given, wanted):
        losses = []
        for x, y in zip(given.chunk(PARTS), wanted.chunk(PARTS), strict=True):
            loss = loss_of(model(x), y)
            loss.backward()
            losses.append(loss.detach())
        for parameter in model.parameters():
            parameter.grad /= PARTS
        return losses

    return trained(model, take_step)


def whole(rank, name):
    """Train the whole model in a process like those of the stages, with as many threads."""
    model = make(name)
    return *alone(model), pack_model(model.eval()).state_dict()


def in_stages(rank, name, kind):
    from torch.distributed import pipelining

    model = make(name)
    first = nn.Sequential(*list(model)[:2])
    own = first if rank == 0 else nn.Sequential(*list(model)[2:])
    stage = pipelining.PipelineStage(own, rank, 2, torch.device("cpu"))
    schedule = getattr(pipelining, kind)(stage, PARTS, loss_fn=loss_of)

    def take_step(given, wanted):
        if rank == 0:
            schedule.step(given)
            return []
        losses = []
        schedule.step(target=wanted, losses=losses)
        return [loss.detach() for loss in losses]

    return *trained(own, take_step), pack_model(own.eval()).state_dict()


def joined(parts):
    """Return the tensors of two stages by their names in the whole model."""
    first, second = parts
    return first | {f"{int(n.split('.')[0]) + 2}.{n.split('.', 1)[1]}": t for n, t in second.items()}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("kind", ["ScheduleGPipe", "Schedule1F1B"])
def test_two_stages_are_one_model(pair, kind, name):
    losses, grads, parameters, packed = pair.run(whole, name)[0]
    found = pair.run(in_stages, name, kind)
    assert found[0][0] == []
    assert found[1][0] == losses
    for wanted, parts in ((grads, 1), (parameters, 2)):
        tensors = joined([stage[parts] for stage in found])
        assert tensors.keys() == wanted.keys()
        for key, value in wanted.items():
            assert_same_bits(tensors[key], value)
    codes = joined([stage[3] for stage in found])
    assert codes.keys() == packed.keys()
    for key, tensor in packed.items():
        if key.endswith("packed"):
            assert_same_bits(codes[key], tensor)
