"""Tensor parallelism: two processes compute what one computes, to the order of sums, from the same codes."""

import copy

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import qatkernels as qk
from qatkernels.methods import GridStats, SQuAT, WinQ
from qatkernels.nn import QuantConfig, calibrate, gather_model, pack_model
from qatkernels.testing.compare import assert_same_bits

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo")

CONFIGS = {
    "row": QuantConfig(2),
    "group": QuantConfig(4, group_size=8),
    "split groups": QuantConfig(4, group_size=16),  # three in a row of `down`
    "tensor": QuantConfig(3, per_tensor=True),
    "affine": QuantConfig(4, "affine", group_size=8),
    "int zero points": QuantConfig(4, "affine", group_size=8, zero_point_domain="int"),
    "dynamic inputs": QuantConfig(4, act_bits=8),
    "learned inputs": QuantConfig(4, act_bits=8, act_scheme="lsq+"),
    "learned outputs": QuantConfig(4, out_bits=8),
}


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.gate, self.down = nn.Linear(16, 48), nn.Linear(16, 48, bias=False), nn.Linear(48, 16)

    def forward(self, x):
        return self.down(F.silu(self.gate(x)) * self.up(x))


X = torch.linspace(-1, 1, 5 * 16).view(5, 16).sin()


def make(name):
    torch.manual_seed(0)
    block = qk.quantize_model(Block(), CONFIGS[name])
    calibrate(block, X)
    with torch.no_grad():
        for layer in qk.quantized_modules(block).values():
            if layer.zero_point is not None:
                layer.zero_point.add_(0.3)  # off the integers, as training moves them
    return block


def parallel(block, mesh, styles=None):
    from torch.distributed.tensor.parallel import parallelize_module

    from qatkernels.nn import tensor_parallel

    styles = styles or tensor_parallel
    colwise, rowwise = styles.ColwiseParallel, styles.RowwiseParallel
    return parallelize_module(block, mesh, {"up": colwise(), "gate": colwise(), "down": rowwise()})


def use(block):
    """Train three steps; return losses, first gradients, parameters, codes and an output in eval mode."""
    optimizer, losses, grads = torch.optim.SGD(block.parameters(), lr=0.05, momentum=0.9), [], {}
    codes = {n: m.codes() for n, m in qk.quantized_modules(block).items()}
    for _ in range(3):
        loss = (block(X) - 0.3).square().mean()
        optimizer.zero_grad()
        loss.backward()
        grads = grads or {n: whole(p.grad) for n, p in block.named_parameters()}
        optimizer.step()
        losses.append(loss.detach())
    weights = {n: whole(m.quantized_weight().detach()) for n, m in qk.quantized_modules(block).items()}
    parameters = {n: whole(p.detach()) for n, p in block.named_parameters()}
    return losses, grads, parameters, {n: whole(c) for n, c in codes.items()}, weights, block.eval()(X).detach()


def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def trained(rank, name, of_torch):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import parallel as of_torchs

    mesh = init_device_mesh("cpu", (2,))
    block = parallel(make(name), mesh, of_torchs if of_torch else None)
    assert block.up.weight.to_local().shape == (24, 16)
    assert block.down.weight.to_local().shape == (16, 24)
    results = use(block)
    for parameter in block.parameters():
        assert parameter.grad.placements == parameter.placements
    packed = pack_model(block)  # a whole copy
    return results, packed(X).detach()


def compare(found, wanted):
    losses, grads, parameters, codes, weights, y = found
    torch.testing.assert_close(losses, wanted[0])
    for key, codes_of_one in wanted[3].items():
        assert_same_bits(codes[key], codes_of_one)
    for one, two in ((wanted[1], grads), (wanted[2], parameters), (wanted[4], weights)):
        assert list(one) == list(two)
        for key, value in one.items():
            torch.testing.assert_close(two[key], value, msg=lambda text, key=key: f"{key}: {text}")
    torch.testing.assert_close(y, wanted[5])


@pytest.mark.parametrize("name", CONFIGS)
def test_training(pair, name):
    block = make(name)
    wanted = use(block)
    packed = pack_model(block)(X)
    for found, y in pair.run(trained, name, False):
        compare(found, wanted)
        torch.testing.assert_close(y, packed)


@pytest.mark.parametrize("name", ["row", "group", "tensor"])
def test_torchs_own_styles(pair, name):
    wanted = use(make(name))
    for found, _ in pair.run(trained, name, True):
        compare(found, wanted)


def packed_parts(rank, name):
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (2,))
    whole_block = pack_model(make(name).eval())
    block = parallel(copy.deepcopy(whole_block), mesh)
    for layer, same in ((block.up, whole_block.up), (block.down, whole_block.down)):
        assert layer.weight.packed.to_local().nbytes * 2 == same.weight.packed.nbytes
        assert layer.weight.shape == same.weight.shape
        assert_same_bits(layer.weight.packed.full_tensor(), same.weight.packed)
    x = X.clone().requires_grad_()
    y = block(x)
    y.square().sum().backward()
    return y.detach(), x.grad, whole(block.down.bias.grad), whole(block.up.bias.grad)


@pytest.mark.parametrize("name", [n for n in CONFIGS if n != "split groups"])
def test_packed(pair, name):
    block, x = pack_model(make(name).eval()), X.clone().requires_grad_()
    y = block(x)
    y.square().sum().backward()
    wanted = y.detach(), x.grad, block.down.bias.grad, block.up.bias.grad
    for found in pair.run(packed_parts, name):
        torch.testing.assert_close(found, wanted)


def refused(rank):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import parallelize_module

    from qatkernels.nn.tensor_parallel import ColwiseParallel, RowwiseParallel

    mesh = init_device_mesh("cpu", (2,))
    with pytest.raises(AttributeError, match=r"If torch's RowwiseParallel asked, use the one of qatkernels.nn.tenso"):
        parallelize_module(pack_model(make("row")), mesh, {"down": RowwiseParallel.__mro__[1]()})
    odd = pack_model(qk.quantize_model(nn.Linear(6, 4), QuantConfig(2)))
    with pytest.raises(ValueError, match="has 6 columns of 2 bits and 1 scales a row: 2 processes would split a byte"):
        parallelize_module(odd, mesh, RowwiseParallel())
    thirds = pack_model(qk.quantize_model(nn.Linear(24, 4), QuantConfig(2, group_size=8)))
    with pytest.raises(ValueError, match="3 scales a row: 2 processes would split a byte or a group"):
        parallelize_module(thirds, mesh, RowwiseParallel())
    embedding = qk.quantize_model(nn.Sequential(nn.Embedding(8, 16)), QuantConfig(4), embeddings=True)
    with pytest.raises(ValueError, match=r"QuantEmbedding cannot be split by columns.*use RowwiseParallel"):
        parallelize_module(embedding[0], mesh, ColwiseParallel())
    with pytest.raises(ValueError, match="PackedEmbedding cannot be sharded: leave it out of the plan"):
        parallelize_module(pack_model(embedding)[0], mesh, RowwiseParallel())


def test_what_is_refused(pair):
    pair.run(refused)


def embedded(rank):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.parallel import parallelize_module

    from qatkernels.nn.tensor_parallel import RowwiseParallel

    model, tokens = embedding(), torch.tensor([[1, 5, 6], [1, 0, 2]])
    parallelize_module(model[0], init_device_mesh("cpu", (2,)), RowwiseParallel(input_layouts=Replicate()))
    y = model(tokens)
    y.square().sum().backward()
    return y.detach(), whole(model[0].weight.grad), whole(model[0].scale.grad)


def embedding():
    torch.manual_seed(0)
    return qk.quantize_model(nn.Sequential(nn.Embedding(8, 16)), QuantConfig(4), embeddings=True)


def test_embedding(pair):
    model = embedding()
    y = model(torch.tensor([[1, 5, 6], [1, 0, 2]]))
    y.square().sum().backward()
    for found in pair.run(embedded):
        torch.testing.assert_close(found, (y.detach(), model[0].weight.grad, model[0].scale.grad))


def noisy(rank):
    from torch.distributed.device_mesh import init_device_mesh

    block = parallel(make("group"), init_device_mesh("cpu", (2,)))
    return losses_with_noise(block), None


def losses_with_noise(block):
    winq = WinQ(block, reset_every=None, reset_weight=0.0, noise_std=0.05, two_sided=True)
    torch.manual_seed(1)
    return winq.gradient(lambda: _backward(block)).item()


def _backward(block):
    loss = block(X).square().mean()
    loss.backward()
    return loss


def test_noise_is_that_of_one_process(pair):
    wanted = losses_with_noise(make("group"))
    for found, _ in pair.run(noisy):
        assert found == pytest.approx(wanted, rel=1e-5)


def placed_like(parameter, tensor):
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not isinstance(parameter, DTensor):
        return tensor
    return distribute_tensor(tensor, parameter.device_mesh, parameter.placements)


def with_methods(block):
    """Train with SQuAT, reset, and return the weights, what SQuAT measures, and statistics of the codes."""
    squat = SQuAT(block, rho=0.1, target="latent")
    optimizer, stats = torch.optim.SGD(block.parameters(), lr=0.5), GridStats(block)
    codes = {name: whole(value) for name, value in stats.codes().items()}
    first_flips = stats.flips()
    squat.gradient(lambda: _backward(block))
    optimizer.step()
    first = torch.arange(block.down.scale.numel()).view(block.down.scale.shape).gt(0).float()
    with torch.no_grad():
        block.down.scale.mul_(placed_like(block.down.scale, first))
    WinQ(block, reset_every=None, noise_std=0.0, reset_weight=0.5).reset()
    measured = [first_flips, stats.flips(), stats.distance(), float(stats.at_floor())]
    return {n: whole(p.detach()) for n, p in block.named_parameters()}, codes, squat.log(), measured


def methods_of_two(rank, name):
    from torch.distributed.device_mesh import init_device_mesh

    return with_methods(parallel(make(name), init_device_mesh("cpu", (2,))))


@pytest.mark.parametrize("name", ["row", "group", "tensor", "affine"])
def test_methods(pair, name):
    """Resets, SQuAT and statistics, also of weights whose rows are split, which share the scales."""
    parameters, codes, log, measured = with_methods(make(name))
    for found, found_codes, found_log, found_measured in pair.run(methods_of_two, name):
        torch.testing.assert_close(found, parameters)
        for key, codes_of_one in codes.items():
            assert_same_bits(found_codes[key], codes_of_one)
        assert found_log == pytest.approx(log, rel=1e-4, abs=1e-6)
        assert found_measured == pytest.approx(measured, rel=1e-5)
    assert measured[-1] == 1


def methods_refused(rank):
    from torch.distributed.device_mesh import init_device_mesh

    mesh, settings = init_device_mesh("cpu", (2,)), {"reset_every": None, "reset_weight": 0.5, "noise_std": 0.0}
    with pytest.raises(ValueError, match=r"down has a weight.*which splits groups of 16 columns between processes"):
        WinQ(parallel(make("split groups"), mesh), **settings).reset()
    with pytest.raises(
        ValueError, match=r"down has a weight.*splits rows between processes, and a rotation needs them"
    ):
        WinQ(parallel(make("row"), mesh), **settings, rotation=lambda w: w.flip(-1)).reset()


def test_what_methods_refuse(pair):
    pair.run(methods_refused)


def two_steps(block):
    """Train two steps and return the losses."""
    optimizer, losses = torch.optim.SGD(block.parameters(), lr=0.05), []
    for _ in range(2):
        optimizer.zero_grad()
        loss = (block(X) - 0.3).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return losses


def two_dimensions(rank):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    found = []
    for shape in ((2, 1), (1, 2)):
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("dp", "tp"))
        block = parallel(make("group"), mesh["tp"])
        fully_shard(block, mesh=mesh["dp"])
        losses = two_steps(block)
        parameters = {n: whole(p.detach()) for n, p in block.named_parameters()}
        found.append((losses, parameters, gather_model(block)(X).detach(), pack_model(block)(X).detach()))
    return found


def test_with_fsdp2(pair):
    block = make("group")
    losses = two_steps(block)
    wanted = losses, {n: p.detach() for n, p in block.named_parameters()}, block(X).detach(), pack_model(block)(X)
    for meshes in pair.run(two_dimensions):
        for found in meshes:
            torch.testing.assert_close(found, wanted)
