"""torch.distributed.checkpoint: two processes save a sharded model and its optimizer, and one or four go on."""

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

import qatkernels as qk
from qatkernels.nn import GroupedQuantLinear, QuantConfig, calibrate, shard_scales
from qatkernels.testing.compare import assert_same_bits

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo")

CONFIGS = {
    "groups": QuantConfig(2, group_size=8),
    "tensor": QuantConfig(3, per_tensor=True),
    "int zero points": QuantConfig(4, "affine", zero_point_domain="int"),
    "inputs": QuantConfig(4, act_bits=8, act_scheme="lsq+"),
}


class Model(nn.Module):
    """An embedding with a tied head, layers with odd numbers of rows, and fewer experts than processes."""

    def __init__(self, config):
        super().__init__()
        self.embedding, self.head = nn.Embedding(11, 16), nn.Linear(16, 11, bias=False)
        self.head.weight = self.embedding.weight
        self.up, self.down = nn.Linear(16, 13), nn.Linear(13, 16)
        self.experts = GroupedQuantLinear(3, 16, 16, config=config)
        whole = config.act_bits is None and not config.group_size
        include = ["embedding", "head", "up"] if whole else ["up"]
        qk.quantize_model(self, config, embeddings=whole, include=include, exclude=())

    def forward(self, tokens):
        x = self.embedding(tokens)
        x = x + self.down(torch.tanh(self.up(x)))
        offsets = torch.tensor([len(x) // 2, len(x) - 1, len(x)], dtype=torch.int32)
        return self.head(self.experts(x, offsets))


def start(name, mixed, fresh):
    """Return a model, sharded where there are processes, and its optimizer.

    One that is not fresh will be loaded: it has other weights, and learned scales of inputs are not set.
    """
    torch.manual_seed(0 if fresh else 1)
    model = Model(CONFIGS[name])
    if fresh:
        calibrate(model, torch.arange(24) % 11)
    if dist.is_initialized():
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        options = {}
        if mixed:
            policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
            options = {"ignored_params": shard_scales(model), "mp_policy": policy}
        fully_shard(model.experts, **options)
        fully_shard(model, **options)
    return model, torch.optim.AdamW(qk.param_groups(model, lr=0.02, scale_lr=0.01))


def step(model, optimizer, number):
    """Train a step on tokens that are the same in every process; return the loss."""
    tokens = torch.randint(11, (24,), generator=torch.Generator().manual_seed(number))
    loss = nn.functional.cross_entropy(model(tokens).float(), tokens.roll(-1))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.detach()


def gathered(model, optimizer):
    """Return the whole state of a model and its optimizer."""
    states = get_state_dict(model, optimizer, options=StateDictOptions(full_state_dict=True))
    parameters, moments = states[0], states[1]["state"]
    flat = {f"{name} {key}": value for name, state in moments.items() for key, value in state.items()}
    return {name: value.clone() for name, value in (parameters | flat).items()}


def saved(rank, folder, name, mixed):
    model, optimizer = start(name, mixed, fresh=True)
    for number in range(3):
        step(model, optimizer, number)
    states = get_state_dict(model, optimizer)
    dcp.save(dict(zip(("model", "optimizer"), states, strict=True)), checkpoint_id=folder)
    state = gathered(model, optimizer)
    return state, step(model, optimizer, 3), gathered(model, optimizer)


def resumed(rank, folder, name, mixed):
    model, optimizer = start(name, mixed, fresh=False)
    states = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
    dcp.load(states, checkpoint_id=folder, no_dist=not dist.is_initialized())
    set_state_dict(model, optimizer, model_state_dict=states["model"], optim_state_dict=states["optimizer"])
    state = gathered(model, optimizer)
    return state, step(model, optimizer, 3), gathered(model, optimizer)


def assert_same_state(found, wanted):
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert_same_bits(found[name], value, name)


@pytest.mark.parametrize("name", CONFIGS)
def test_another_number_of_processes(pair, four, name, tmp_path):
    """All of the state comes back bit for bit, and the next step is the one that two processes make."""
    folder = tmp_path / "checkpoint"
    before, loss, after = pair.run(saved, folder, name, False)[0]
    assert not torch.equal(before["up.scale"], after["up.scale"])
    assert any("exp_avg_sq" in key for key in before)
    for state, its_loss, next_state in (resumed(0, folder, name, False), *four.run(resumed, folder, name, False)):
        assert_same_state(state, before)
        torch.testing.assert_close(its_loss, loss)
        for key, value in after.items():
            torch.testing.assert_close(next_state[key], value, msg=key)


def test_scales_that_fsdp_does_not_manage(pair, four, tmp_path):
    """As `shard_scales` makes them; one process takes them up as a plain model."""
    folder, name = tmp_path / "checkpoint", "int zero points"
    before, loss, _ = pair.run(saved, folder, name, True)[0]
    for state, its_loss, _ in four.run(resumed, folder, name, True):
        assert_same_state(state, before)
        torch.testing.assert_close(its_loss, loss)
    assert_same_state(resumed(0, folder, name, False)[0], before)
