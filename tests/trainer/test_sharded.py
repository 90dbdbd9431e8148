"""Two processes, FSDP2 and DDP: resets, statistics, SQuAT and accumulation give what one process gives."""

import contextlib
import copy
import itertools

import pytest
import torch
from torch import nn

from qatkernels import QuantConfig, quantize_model, quantized_modules
from qatkernels.methods import GridStats, SQuAT, WinQ

CONFIGS = {"row": {"bits": 2}, "group": {"bits": 4, "group_size": 4}, "tensor": {"bits": 3, "per_tensor": True}}


def make_model(config):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 13), nn.GELU(), nn.Linear(13, 4, bias=False))  # 13 rows do not divide by two
    return quantize_model(model, QuantConfig(**config), include="0" if "group_size" in config else None)


def use(model):
    """Run everything that works on shards; return the numbers that come out."""
    winq = WinQ(model, reset_every=1, reset_weight=0.4, noise_std=0.0)
    stats = GridStats(model)
    numbers = [stats.flips(), stats.distance()]
    winq.after_step()
    numbers += [stats.flips(), stats.distance()]
    for counts in stats.histograms().values():
        numbers += counts
    torch.manual_seed(5)
    x = torch.randn(6, 8)

    def closure():
        loss = model(x).square().mean()
        loss.backward()
        return loss

    for norm, target in itertools.product(("l2", "asam"), ("latent", "quantized")):
        squat = SQuAT(model, torch.optim.SGD(model.parameters(), lr=0.1), rho=0.5, target=target, norm=norm)
        squat.step(closure)
        numbers += squat.log().values()
    return numbers


def work(rank):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2,))
    results = {}
    for name, config in CONFIGS.items():
        model = make_model(config)
        fully_shard(model, mesh=mesh)
        numbers = use(model)
        results[name] = numbers, {n: p.full_tensor() for n, p in model.named_parameters()}
    return results


def test_two_processes(pair):
    results, _ = pair.run(work)
    for name, config in CONFIGS.items():
        model = make_model(config)
        numbers = use(model)
        sharded_numbers, parameters = results[name]
        assert sharded_numbers == pytest.approx(numbers, rel=1e-4, abs=1e-6), name
        for key, value in model.named_parameters():
            torch.testing.assert_close(parameters[key], value.detach(), rtol=1e-4, atol=1e-6, msg=f"{name} {key}")


WAYS = {
    "squat": lambda model: SQuAT(model, rho=0.5, target="latent"),
    "squat on quantized weights": lambda model: SQuAT(model, rho=0.5),
    "winq": lambda model: WinQ(model, reset_every=None, reset_weight=0.0, noise_std=0.0, samples=2),
}


def accumulated(model, way, x, not_yet):
    """Return the gradients over micro-batches ``x`` ``[count, rows, features]``; ``not_yet`` is around all but one."""
    method = WAYS[way](model)
    for i, part in enumerate(x):

        def closure(part=part):
            loss = model(part).square().mean() / len(x)
            loss.backward()
            return loss

        with contextlib.nullcontext() if i == len(x) - 1 else not_yet():
            method.gradient(closure, accumulate=True)
    return [p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad for p in model.parameters()]


def accumulate(rank):
    from torch.distributed.fsdp import fully_shard

    x = torch.randn(3, 4, 8, generator=torch.Generator().manual_seed(5))[:, rank::2]
    results = {}
    for way in WAYS:
        model = nn.parallel.DistributedDataParallel(make_model(CONFIGS["row"]))
        results["ddp", way] = accumulated(model, way, x, model.no_sync)
        model = make_model(CONFIGS["row"])
        fully_shard(model)

        @contextlib.contextmanager
        def unreduced(model=model):
            model.set_requires_gradient_sync(False)
            yield
            model.set_requires_gradient_sync(True)

        results["fsdp", way] = accumulated(model, way, x, unreduced)
    return results


def test_micro_batches_within_no_sync(pair):
    """As transformers' Trainer accumulates: the gradients of every process are those of the whole batch in one."""
    x = torch.randn(3, 4, 8, generator=torch.Generator().manual_seed(5))
    for rank, results in enumerate(pair.run(accumulate)):
        for (mode, way), grads in results.items():
            wanted = accumulated(make_model(CONFIGS["row"]), way, x, contextlib.nullcontext)
            for grad, other in zip(grads, wanted, strict=True):
                torch.testing.assert_close(grad, other, rtol=1e-4, atol=1e-6, msg=f"{mode} {way} {rank}")


def statistics(rank):
    model = nn.Sequential(nn.Linear(8, 13), nn.BatchNorm1d(13), nn.Linear(13, 4))
    plain, results = nn.parallel.DistributedDataParallel(copy.deepcopy(model)), []
    model = nn.parallel.DistributedDataParallel(quantize_model(model, QuantConfig(bits=8)))
    squat = SQuAT(model, rho=5.0)
    for step in range(3):
        x = torch.randn(6, 8, generator=torch.Generator().manual_seed(10 * step + rank))
        squat.gradient(lambda x=x: model(x).square().mean().backward())
        plain(x).square().mean().backward()
        results.append([{n: b.clone() for n, b in m.module.named_buffers()} for m in (model, plain)])
    return results


def test_running_statistics_of_replicas(pair):
    """DDP broadcasts buffers in every forward, also in SQuAT's second pass: they are as after one pass all the same."""
    for rank, results in enumerate(pair.run(statistics)):
        for step, (found, wanted) in enumerate(results, 1):
            assert found["1.num_batches_tracked"] == step
            for name in wanted:
                torch.testing.assert_close(found[name], wanted[name], rtol=0.05, atol=0.02, msg=f"{name} {rank}")


def reset_beside_a_plain_scale(rank):
    from torch.distributed.tensor import DTensor, Shard, init_device_mesh

    mesh = init_device_mesh("cpu", (2,))
    model = make_model(CONFIGS["row"])
    winq = WinQ(model, reset_every=1, reset_weight=0.4, noise_std=0.0)
    for module in quantized_modules(model).values():
        half = module.weight.detach().chunk(2, dim=1)[rank].contiguous()
        module.weight = nn.Parameter(DTensor.from_local(half, mesh, [Shard(1)]))
    with pytest.raises(ValueError, match=r"0 has a weight sharded as .*a scale that is not sharded, must have both"):
        winq.reset()


def test_a_plain_scale_beside_a_sharded_weight_is_refused(pair):
    pair.run(reset_beside_a_plain_scale)
