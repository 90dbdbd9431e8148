"""Two processes, FSDP2 and DDP: resets, statistics, SQuAT and accumulation give what one process gives."""

import contextlib
import copy
import os
import socket
import sys

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from qatkernels import QuantConfig, quantize_model, quantized_modules
from qatkernels.methods import GridStats, SQuAT, WinQ
from qatkernels.trainer.parallel import leave

pytestmark = pytest.mark.skipif(sys.platform != "linux" or not dist.is_gloo_available(), reason="needs gloo")

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
    torch.manual_seed(5)
    x = torch.randn(6, 8)

    def closure():
        loss = model(x).square().mean()
        loss.backward()
        return loss

    for norm in ("l2", "asam"):
        squat = SQuAT(model, torch.optim.SGD(model.parameters(), lr=0.1), rho=0.5, target="latent", norm=norm)
        squat.step(closure)
        numbers += squat.log().values()
    return numbers


def _joined(rank, run, port, folder):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=2)
    run(rank, folder)
    dist.barrier()
    leave(0)


def run_two(run, folder):
    """Call ``run(rank, folder)`` in two processes of a group."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(_joined, (run, port, folder), nprocs=2)


def work(rank, folder):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2,))
    results = {}
    for name, config in CONFIGS.items():
        model = make_model(config)
        fully_shard(model, mesh=mesh)
        numbers = use(model)
        results[name] = numbers, {n: p.full_tensor() for n, p in model.named_parameters()}
    quantized = SQuAT(model)
    with pytest.raises(ValueError, match="must be 'latent' under FSDP2"):
        quantized.gradient(lambda: model(torch.randn(2, 8)).sum().backward())
    if rank == 0:
        torch.save(results, folder / "results.pt")


def test_two_processes(tmp_path):
    run_two(work, tmp_path)
    results = torch.load(tmp_path / "results.pt")
    for name, config in CONFIGS.items():
        model = make_model(config)
        numbers = use(model)
        sharded_numbers, parameters = results[name]
        assert sharded_numbers == pytest.approx(numbers, rel=1e-4, abs=1e-6), name
        for key, value in model.named_parameters():
            torch.testing.assert_close(parameters[key], value.detach(), rtol=1e-4, atol=1e-6, msg=f"{name} {key}")


WAYS = {
    "squat": lambda model: SQuAT(model, rho=0.5, target="latent"),
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


def accumulate(rank, folder):
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
    torch.save(results, folder / f"{rank}.pt")


def test_micro_batches_within_no_sync(tmp_path):
    """As transformers' Trainer accumulates: the gradients of every process are those of the whole batch in one."""
    run_two(accumulate, tmp_path)
    x = torch.randn(3, 4, 8, generator=torch.Generator().manual_seed(5))
    for rank in range(2):
        for (mode, way), grads in torch.load(tmp_path / f"{rank}.pt").items():
            wanted = accumulated(make_model(CONFIGS["row"]), way, x, contextlib.nullcontext)
            for grad, other in zip(grads, wanted, strict=True):
                torch.testing.assert_close(grad, other, rtol=1e-4, atol=1e-6, msg=f"{mode} {way} {rank}")


def statistics(rank, folder):
    model = nn.Sequential(nn.Linear(8, 13), nn.BatchNorm1d(13), nn.Linear(13, 4))
    plain, results = nn.parallel.DistributedDataParallel(copy.deepcopy(model)), []
    model = nn.parallel.DistributedDataParallel(quantize_model(model, QuantConfig(bits=8)))
    squat = SQuAT(model, rho=5.0)
    for step in range(3):
        x = torch.randn(6, 8, generator=torch.Generator().manual_seed(10 * step + rank))
        squat.gradient(lambda x=x: model(x).square().mean().backward())
        plain(x).square().mean().backward()
        results.append([{n: b.clone() for n, b in m.module.named_buffers()} for m in (model, plain)])
    torch.save(results, folder / f"{rank}.pt")


def test_running_statistics_of_replicas(tmp_path):
    """DDP broadcasts buffers in every forward, also in SQuAT's second pass: they are as after one pass all the same."""
    run_two(statistics, tmp_path)
    for rank in range(2):
        for step, (found, wanted) in enumerate(torch.load(tmp_path / f"{rank}.pt"), 1):
            assert found["1.num_batches_tracked"] == step
            for name in wanted:
                torch.testing.assert_close(found[name], wanted[name], rtol=0.05, atol=0.02, msg=f"{name} {rank}")


def test_rows_in_pieces_are_refused():
    from torch.distributed.tensor import DTensor, Shard, init_device_mesh

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{free.getsockname()[1]}"
    dist.init_process_group("gloo", init_method=address, rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        model = make_model(CONFIGS["row"])
        winq = WinQ(model, reset_every=1, reset_weight=0.4, noise_std=0.0)
        for module in quantized_modules(model).values():
            module.weight = nn.Parameter(DTensor.from_local(module.weight.detach(), mesh, [Shard(1)]))
        with pytest.raises(ValueError, match=r"0 has a weight sharded as .*rows \(or groups\) must be whole"):
            winq.reset()
    finally:
        dist.destroy_process_group()
