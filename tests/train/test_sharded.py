"""Two processes and FSDP2: resets, statistics and SQuAT's latent target give what one process gives."""

import os
import socket
import sys

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from qatkernels import QuantConfig, quantize_model, quantized_modules
from qatkernels.train import GridStats, SQuAT, WinQ

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


def work(rank, port, folder):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=2)
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
    dist.destroy_process_group()


def test_two_processes(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(work, (port, tmp_path), nprocs=2)
    results = torch.load(tmp_path / "results.pt")
    for name, config in CONFIGS.items():
        model = make_model(config)
        numbers = use(model)
        sharded_numbers, parameters = results[name]
        assert sharded_numbers == pytest.approx(numbers, rel=1e-4, abs=1e-6), name
        for key, value in model.named_parameters():
            torch.testing.assert_close(parameters[key], value.detach(), rtol=1e-4, atol=1e-6, msg=f"{name} {key}")


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
