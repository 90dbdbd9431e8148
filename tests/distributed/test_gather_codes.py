"""FSDP2 that gathers codes: two processes compute what one computes, from an eighth of the bytes at 2 bits."""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import qatkernels as qk
from qatkernels.methods import StableQAT, WinQ
from qatkernels.nn import QuantConfig, calibrate, gather_codes, gather_model, pack_model, shard_scales
from qatkernels.testing.compare import assert_same_bits

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo")

STEPS = 3
CONFIGS = {
    "row": QuantConfig(2),
    "binary": QuantConfig(1, group_size=4),
    "ternary": QuantConfig(1.58),
    "affine": QuantConfig(4, "affine", group_size=8),
    "float16 scales": QuantConfig(3, scale_dtype="float16"),
    "int zero points": QuantConfig(4, "affine", group_size=8, zero_point_domain="int", scale_dtype="float16"),
    "outputs": QuantConfig(4, out_bits=6),
    "inputs": QuantConfig(8, act_bits=8, act_scheme="lsq+"),
}
#: Layers whose codes are gathered; `odd` has 13 rows, which two processes do not share evenly.
GATHERED = ["blocks.0", "blocks.2", "head"]


class Model(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.embedding, self.norm = nn.Embedding(11, 16), nn.LayerNorm(16)
        self.blocks = nn.ModuleList([nn.Linear(16, 16), nn.Linear(16, 13), nn.Linear(13, 16, bias=False)])
        self.head = nn.Linear(16, 4)
        # A group of 4 or 8 does not divide 13 columns.
        by_row = replace(config, group_size=None)
        qk.quantize_model(self, {"blocks.2": by_row, "*": config}, embeddings=False, exclude=())

    def forward(self, tokens):
        x = self.norm(self.embedding(tokens))
        for _ in range(2):  # each layer is called twice
            for block in self.blocks:
                x = F.gelu(block(x))
        return self.head(x)


def make(name):
    torch.manual_seed(0)
    model = Model(CONFIGS[name])
    calibrate(model, batches(0)[0])
    return model


def batches(step):
    """Return the tokens of the two processes."""
    return torch.randint(11, (2, 4, 3), generator=torch.Generator().manual_seed(step))


def shard(model, dtype, codes=True, mesh=None):
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    options = {
        "mp_policy": MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32),
        "ignored_params": shard_scales(model, mesh),
        "mesh": mesh,
    }
    for block in model.blocks:
        fully_shard(block, **options)
    fully_shard(model, **options)
    if codes:
        found = gather_codes(model)
        assert found == GATHERED, found
    return model


def loss_of(model, tokens):
    return model(tokens).float().square().mean()


def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def in_two_processes(rank, name, dtype):
    model = shard(make(name), dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    losses, grads = [], {}
    for step in range(STEPS):
        loss = loss_of(model, batches(step)[rank])
        optimizer.zero_grad()
        loss.backward()
        grads = grads or {n: whole(p.grad) for n, p in model.named_parameters()}
        optimizer.step()
        losses.append(loss.detach())
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())
    packed, parameters = pack_model(model).state_dict(), {n: whole(p).detach() for n, p in model.named_parameters()}
    y = model.eval()(batches(0)[0]).detach()
    assert_same_bits(model.head.quantized_weight().detach(), model.head.weight.detach())  # the root stays gathered
    return losses, grads, parameters, packed, y


def in_one_process(name, dtype):
    """Compute the same: what is not a scale or a master is cast, and gradients are means in float32."""
    model, kept = make(name), set()
    for key in GATHERED:
        layer = model.get_submodule(key)
        kept |= {f"{key}.weight"}

        def forward(x, layer=layer):
            x = x if layer.act is None else layer.act(x)
            y = F.linear(x, layer.quantized_weight(dtype), layer.bias)
            return y if layer.out_act is None else layer.out_act(y)

        layer.forward = forward
    kept |= {n for n, _ in model.named_parameters() if n.endswith(("scale", "zero_point"))}

    def run(tokens):
        given = {n: p if n in kept else p.to(dtype) for n, p in model.named_parameters()}
        return torch.func.functional_call(model, given, (tokens,)).float()

    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    losses, grads = [], {}
    for step in range(STEPS):
        optimizer.zero_grad()
        for tokens in batches(step):
            loss = run(tokens).square().mean()
            (loss / 2).backward()
            losses.append(loss.detach())
        grads = grads or {n: p.grad.clone() for n, p in model.named_parameters()}
        optimizer.step()
    y = run(batches(0)[0]).detach()
    for key in GATHERED:
        del model.get_submodule(key).forward
    return (
        losses,
        grads,
        {n: p.detach().clone() for n, p in model.named_parameters()},
        pack_model(model).state_dict(),
        y,
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
@pytest.mark.parametrize("name", CONFIGS)
def test_two_processes_are_one(pair, name, dtype):
    losses, grads, parameters, packed, y = in_one_process(name, dtype)
    for rank, found in enumerate(pair.run(in_two_processes, name, dtype)):
        assert found[0][0] == losses[rank]
        torch.testing.assert_close(found[0], losses[rank::2])
        for wanted, tensors in ((grads, found[1]), (parameters, found[2])):
            assert wanted.keys() == tensors.keys()
            for key, value in wanted.items():
                torch.testing.assert_close(tensors[key], value, msg=lambda text, key=key: f"{key}: {text}")
        for key, tensor in packed.items():
            if key.endswith("packed"):
                assert_same_bits(found[3][key], tensor)
        torch.testing.assert_close(found[4].float(), y)


def accumulated(rank, reduces):
    """Return the gradients of two parts of a step, and of a second step, reduced after each part or once."""
    model, found = shard(make("affine"), torch.float32), []
    for step in range(2):
        model.zero_grad(set_to_none=step == 0)
        for part in range(2):
            model.set_requires_gradient_sync(reduces or part == 1)
            loss_of(model, batches(2 * step + part)[rank]).backward()
        found.append({n: whole(p.grad).clone() for n, p in model.named_parameters()})
    return found


@pytest.mark.parametrize("reduces", [True, False])
def test_gradients_are_accumulated(pair, reduces):
    model = make("affine")
    wanted = []
    for step in range(2):
        model.zero_grad()
        for part in range(2):
            for tokens in batches(2 * step + part):
                (loss_of(model, tokens) / 2).backward()
        wanted.append({n: p.grad.clone() for n, p in model.named_parameters()})
    for found in pair.run(accumulated, reduces):
        torch.testing.assert_close(found, wanted)


def in_two_dimensions(rank, folder):
    """Return the gradients where shards are replicated, and those of what a checkpoint holds."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh, found = init_device_mesh("cpu", (1, 2), mesh_dim_names=("replicate", "shard")), []
    model = shard(make("affine"), torch.float32, mesh=mesh)
    for again in (False, True):
        if again:
            dcp.save({"model": model.state_dict()}, checkpoint_id=folder)
            model = make("affine")
            nn.init.zeros_(model.head.weight)
            model = shard(model, torch.float32, mesh=mesh)
            state = model.state_dict()
            dcp.load({"model": state}, checkpoint_id=folder)
            model.load_state_dict(state)
        loss_of(model, batches(0)[rank]).backward()
        found.append({n: whole(p.grad).clone() for n, p in model.named_parameters()})
    one = nn.Sequential(nn.Linear(16, 8))
    qk.quantize_model(one, QuantConfig(4), exclude=())
    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicate", "shard"))
    fully_shard(one, mesh=mesh, ignored_params=shard_scales(one, mesh))
    with pytest.raises(ValueError, match="0 is in one shard, so that nothing is gathered"):
        gather_codes(one)
    return found


def test_replicated_shards_and_checkpoints(pair, tmp_path):
    wanted = gradients_of_one("affine")
    for found in pair.run(in_two_dimensions, tmp_path):
        for grads in found:
            torch.testing.assert_close(grads, wanted)


#: So many that kernels of the library would take memory from their cache, which FSDP2 cannot free.
ROWS = 1024


def moved(rank, codes):
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    from studies.traffic import Traffic

    torch.manual_seed(0)
    model = qk.quantize_model(nn.Sequential(nn.Linear(ROWS, ROWS, bias=False)), QuantConfig(2), exclude=())
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    fully_shard(model, mp_policy=policy, ignored_params=shard_scales(model))
    if codes:
        gather_codes(model)
    with Traffic() as traffic:
        model(torch.ones(2, ROWS)).sum().backward()
    return traffic.bytes


def test_an_eighth_of_the_bytes(pair):
    plain, codes = pair.run(moved, False)[0], pair.run(moved, True)[0]
    weights, scales = ROWS * ROWS, 4 * ROWS
    assert plain == {"all-gather": 2 * weights + scales, "reduce-scatter": 4 * weights + scales}
    assert codes == {"all-gather": 2 * weights // 8 + scales, "reduce-scatter": 4 * weights}


def frozen(rank):
    model = make("row")
    for parameter in model.head.parameters():
        parameter.requires_grad_(False)
    loss = loss_of(shard(model, torch.float32), batches(0)[rank])
    loss.backward()
    return loss.detach(), whole(model.embedding.weight.grad), model.head.scale.grad


def test_frozen_layers(pair):
    model = make("row")
    losses = [loss_of(model, tokens) for tokens in batches(0)]
    (sum(losses) / 2).backward()
    for rank, (loss, grad, of_scale) in enumerate(pair.run(frozen)):
        torch.testing.assert_close(loss, losses[rank].detach())
        torch.testing.assert_close(grad, model.embedding.weight.grad)
        assert of_scale is None


def clipped(rank):
    """Clip what a first backward gave, then accumulate a second one."""
    model = shard(make("affine"), torch.float32)
    for part in range(2):
        loss_of(model, batches(part)[rank]).backward()
        if part == 0:
            nn.utils.clip_grad_norm_(model.parameters(), 0.01)
    return {n: whole(p.grad) for n, p in model.named_parameters()}


def test_gradients_that_are_clipped_between(pair):
    model = make("affine")
    for part in range(2):
        for tokens in batches(part):
            (loss_of(model, tokens) / 2).backward()
        if part == 0:
            assert nn.utils.clip_grad_norm_(model.parameters(), 0.01) > 0.02
    wanted = {n: p.grad for n, p in model.named_parameters()}
    for found in pair.run(clipped):
        torch.testing.assert_close(found, wanted)


def gradients_of_one(name):
    """Return the gradients of a step in one process."""
    model = make(name)
    for tokens in batches(0):
        (loss_of(model, tokens) / 2).backward()
    return {n: p.grad for n, p in model.named_parameters()}


def unfrozen(rank):
    """Freeze a layer, gather codes, and train it after all."""
    model = make("row")
    model.head.requires_grad_(False)
    model = shard(model, torch.float32)
    model.head.requires_grad_(True)
    loss_of(model, batches(0)[rank]).backward()
    return {n: whole(p.grad) for n, p in model.named_parameters()}


def test_layers_that_train_later(pair):
    for found in pair.run(unfrozen):
        torch.testing.assert_close(found, gradients_of_one("row"))


def replaced(rank):
    """Move the model after gather_codes, which replaces its shards."""
    model = shard(make("row"), torch.float32)
    model.to(torch.device("cpu"))
    with pytest.warns(UserWarning, match="was moved or cast after gather_codes, so weights are gathered"):
        loss_of(model, batches(0)[rank]).backward()
    return {n: whole(p.grad) for n, p in model.named_parameters()}


def test_a_model_that_is_moved_gathers_weights(pair):
    for found in pair.run(replaced):
        torch.testing.assert_close(found, gradients_of_one("row"))


def refused_later(rank):
    model = shard(make("row"), torch.float32)
    with pytest.raises(ValueError, match="has its codes gathered already"):
        gather_codes(model)
    loss_of(model, batches(0)[rank]).backward()
    with pytest.raises(ValueError, match="has run a forward since fully_shard, must have run none"):
        gather_codes(model)
    model = shard(make("row"), torch.float32)
    StableQAT(model)
    with pytest.raises(ValueError, match="its gradient is StableQAT's"):
        model(batches(0)[rank])
    model = shard(make("row"), torch.float32)
    model.head.weight.requires_grad_(False)
    with pytest.raises(ValueError, match="a weight is frozen and its scales train"):
        model(batches(0)[rank])


def test_what_is_refused_later(pair):
    pair.run(refused_later)


def refused(rank):
    from torch.distributed.fsdp import fully_shard

    model = qk.quantize_model(nn.Sequential(nn.Linear(16, 8)), QuantConfig(4), exclude=())
    with pytest.raises(ValueError, match="0 is not sharded: call gather_codes after fully_shard"):
        gather_codes(model)
    fully_shard(model)
    with pytest.raises(ValueError, match="0 has scales that are not sharded by shard_scales: call it before fully_sha"):
        gather_codes(model)
    with pytest.raises(ValueError, match="can be gathered: it has no quantized layer"):
        gather_codes(nn.Linear(2, 2))
    for layer, config, reason in (
        (nn.Linear(16, 7), QuantConfig(4), "has 7 rows, which 2 processes do not share evenly"),
        (nn.Linear(16, 8), QuantConfig(4, per_tensor=True), "has one scale for the whole weight"),
    ):
        other = qk.quantize_model(nn.Sequential(layer), config, exclude=())
        fully_shard(other, ignored_params=shard_scales(other))
        with pytest.raises(ValueError, match=reason):
            gather_codes(other)
    frozen = make("row")
    frozen.head.weight.requires_grad_(False)
    assert gather_codes(shard(frozen, torch.bfloat16, codes=False)) == GATHERED[:2]  # its scales train
    model = shard(make("row"), torch.bfloat16)
    winq = WinQ(model, reset_every=1, reset_weight=0.5, noise_std=0.01)
    with pytest.raises(ValueError, match="noise_std=0"):
        model(batches(0)[rank])
    winq.remove()
    WinQ(model, reset_every=1, reset_weight=0.5, noise_std=0.0).after_step()
    loss_of(model, batches(0)[rank]).backward()
    copied = gather_model(model)
    assert_same_bits(copied.head.weight.detach(), model.head.weight.full_tensor().detach())
    assert not copied.head.holds_levels


def test_what_is_refused(pair):
    pair.run(refused)
