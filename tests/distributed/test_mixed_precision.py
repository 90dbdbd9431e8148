"""FSDP2 that computes in bfloat16: scales reach every layer in float32, and two processes compute what one computes."""

import pytest
import torch
import torch.distributed as dist
from torch import nn

import qatkernels as qk
from qatkernels.float32_scales import Float32Scales
from qatkernels.methods import WinQ
from qatkernels.nn import GroupedQuantLinear, QuantConfig, calibrate, scales_at_floor, shard_scales
from qatkernels.nn.activation import scales_of

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo")

STEPS = 3
CONFIGS = {
    "row": QuantConfig(2),
    "group": QuantConfig(4, group_size=4),
    "tensor": QuantConfig(3, per_tensor=True),
    "affine": QuantConfig(4, "affine", group_size=8),
    "int zero points": QuantConfig(4, "affine", zero_point_domain="int"),
    "inputs": QuantConfig(4, act_bits=8, act_scheme="lsq+"),
    "outputs": QuantConfig(4, out_bits=4),
}


class Model(nn.Module):
    """An embedding, linear layers with odd numbers of rows, one of them called twice, and experts."""

    def __init__(self, config):
        super().__init__()
        self.embedding = nn.Embedding(11, 16)
        self.first, self.second, self.head = nn.Linear(16, 13), nn.Linear(13, 16, bias=False), nn.Linear(16, 3)
        self.experts = GroupedQuantLinear(3, 16, 16, config=config)
        qk.quantize_model(self, config, embeddings=True, include=["embedding", "first", "head"], exclude=())

    def forward(self, tokens):
        x = self.embedding(tokens).flatten(0, 1)
        offsets = torch.tensor([len(x) // 2, len(x) - 1, len(x)], dtype=torch.int32)
        for _ in range(2):
            x = self.second(torch.nn.functional.gelu(self.first(x)))
        return self.head(self.experts(x, offsets))


def make(name):
    torch.manual_seed(0)
    model = Model(CONFIGS[name])
    calibrate(model, batches(0)[0])
    with torch.no_grad():
        for layer in qk.quantized_modules(model).values():
            if layer.zero_point is not None:
                layer.zero_point.add_(0.3)  # off the integers, as training moves them
    return model


def batches(step):
    """Return the tokens of the two processes."""
    return torch.randint(11, (2, 4, 3), generator=torch.Generator().manual_seed(step))


def in_two_processes(rank, name, reshard):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh, model = init_device_mesh("cpu", (2,)), make(name)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    ignored = shard_scales(model, mesh)
    assert ignored == set(scales_of(model))
    for layer in (model.first, model.experts):
        fully_shard(layer, mesh=mesh, mp_policy=policy, ignored_params=ignored, reshard_after_forward=reshard)
    fully_shard(model, mesh=mesh, mp_policy=policy, ignored_params=ignored)
    seen = []
    model.head.register_forward_hook(lambda layer, args, y: seen.append((args[0].dtype, layer.weight.dtype, y.dtype)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    losses, norms = [], []
    for step in range(STEPS):
        loss = model(batches(step)[rank]).float().square().mean()
        optimizer.zero_grad()
        loss.backward()
        norms.append(nn.utils.clip_grad_norm_(model.parameters(), 10.0).full_tensor())
        optimizer.step()
        losses.append(loss.detach())
    assert set(seen) == {(torch.bfloat16,) * 3}
    assert all(p.dtype == torch.float32 for p in model.parameters())
    assert not scales_at_floor(model)
    return losses, norms, {n: p.full_tensor().detach() for n, p in model.named_parameters()}


def in_one_process(name):
    """Compute the same: what is not a scale is cast to bfloat16, and gradients are means in float32."""
    model = make(name)
    kept = {id(p) for p in scales_of(model)}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    losses, norms = [], []
    for step in range(STEPS):
        optimizer.zero_grad()
        for tokens in batches(step):
            given = {n: p if id(p) in kept else p.bfloat16() for n, p in model.named_parameters()}
            loss = torch.func.functional_call(model, given, (tokens,)).float().square().mean()
            (loss / 2).backward()
            losses.append(loss.detach())
        norms.append(nn.utils.clip_grad_norm_(model.parameters(), 10.0))
        optimizer.step()
    return losses, norms, dict(model.named_parameters())


@pytest.mark.parametrize("name", CONFIGS)
def test_two_processes_are_one(pair, name):
    wanted, norms, parameters = in_one_process(name)
    for rank, found in enumerate(pair.run(in_two_processes, name, name != "group")):
        losses, found_norms, sharded = found
        # The order of sums of two numbers does not matter, of a norm it does.
        assert losses == wanted[rank::2]
        torch.testing.assert_close(found_norms, norms)
        for key, value in parameters.items():
            torch.testing.assert_close(sharded[key], value.detach(), rtol=1e-5, atol=1e-7, msg=key)


def rounded(rank):
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    model = qk.quantize_model(nn.Linear(8, 4), QuantConfig(4))
    fully_shard(model, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    with pytest.raises(RuntimeError, match=r"scale is torch.bfloat16.*shard_scales\(model\) first.*ignored_params"):
        model(torch.randn(2, 8))
    with pytest.raises(ValueError, match="sharded already: call shard_scales before fully_shard"):
        shard_scales(model)


def test_scales_in_bfloat16_are_refused(pair):
    pair.run(rounded)


def without_scales(rank):
    with pytest.raises(ValueError, match="no quantized layer: call quantize_model first"):
        shard_scales(nn.Linear(2, 2))


def test_a_plain_model_is_refused(pair):
    pair.run(without_scales)


def accumulated_and_reset(rank):
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    model = make("row")
    ignored = shard_scales(model)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    fully_shard(model, mp_policy=policy, ignored_params=ignored)
    for step in range(2):
        model.set_requires_gradient_sync(step == 1)
        model(batches(step)[rank]).float().square().mean().backward()
    grad = model.head.scale.grad.full_tensor()
    winq = WinQ(model, reset_every=1, reset_weight=0.5, noise_std=0.0)
    winq.after_step()
    return grad, winq.stats.distance(), model.head.weight.full_tensor()


def test_accumulation_and_resets(pair):
    model = make("row")
    wanted = 0
    for step in range(2):
        for tokens in batches(step):
            model.zero_grad()
            kept = {id(p) for p in scales_of(model)}
            given = {n: p if id(p) in kept else p.bfloat16() for n, p in model.named_parameters()}
            torch.func.functional_call(model, given, (tokens,)).float().square().mean().backward()
            wanted = wanted + model.head.scale.grad / 2
    winq = WinQ(model, reset_every=1, reset_weight=0.5, noise_std=0.0)
    winq.after_step()
    for grad, distance, weight in pair.run(accumulated_and_reset):
        torch.testing.assert_close(grad, wanted)
        assert distance == pytest.approx(winq.stats.distance(), rel=1e-5)
        assert torch.equal(weight, model.head.weight)


def shared(rank):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.head = nn.Embedding(10, 8), nn.Linear(8, 10, bias=False)
            self.head.weight = self.embedding.weight

    model = qk.quantize_model(Tied(), QuantConfig(4), embeddings=True, exclude=())
    ignored = shard_scales(model)
    assert model.embedding.scale is model.head.scale
    assert len(ignored) == 1
    assert all(isinstance(m.scale, nn.Parameter) for m in model.modules() if isinstance(m, Float32Scales))


def test_ties_stay(pair):
    pair.run(shared)
