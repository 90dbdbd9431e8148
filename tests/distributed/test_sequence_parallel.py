"""Sequence parallel: torch's plan, in which each process has some of the tokens between its layers."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn

import qatkernels as qk
from qatkernels.nn import PackedEmbedding, QuantConfig, calibrate, gather_model, pack_model, shard_scales
from qatkernels.nn.activation import scales_of
from qatkernels.testing.compare import assert_same_bits
from tests.distributed.test_tensor_parallel import CONFIGS, Block
from tests.pair import device_of, on_cpu

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo")

TOKENS = torch.arange(32).view(4, 8).remainder(7)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.norm = nn.Embedding(8, 16), nn.LayerNorm(16)
        self.mlp, self.last_norm, self.head = Block(), nn.RMSNorm(16), nn.Linear(16, 8, bias=False)

    def forward(self, tokens):
        x = self.embed(tokens)
        x = x + self.mlp(self.norm(x))
        return self.head(self.last_norm(x))


def make(name):
    torch.manual_seed(0)
    model = qk.quantize_model(Model(), CONFIGS[name], include=["mlp.*", "head"])
    if name == "row":  # an embedding too
        qk.quantize_model(model, {"embed": QuantConfig(4)}, embeddings=True)
    calibrate(model, TOKENS)
    return model


def parallel(model, mesh):
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.parallel import (
        PrepareModuleInput,
        PrepareModuleOutput,
        SequenceParallel,
        parallelize_module,
    )

    from qatkernels.nn.tensor_parallel import ColwiseParallel, RowwiseParallel

    plan = {
        "embed": PrepareModuleOutput(output_layouts=Replicate(), desired_output_layouts=Shard(1))
        if isinstance(model.embed, PackedEmbedding)  # which stays whole
        else RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1)),
        "norm": SequenceParallel(),
        "mlp": PrepareModuleInput(input_layouts=(Shard(1),), desired_input_layouts=(Replicate(),)),
        "mlp.up": ColwiseParallel(),
        "mlp.gate": ColwiseParallel(),
        "mlp.down": RowwiseParallel(output_layouts=Shard(1)),
        "last_norm": SequenceParallel(),
        "head": ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate()),
    }
    return parallelize_module(model, mesh, plan)


def use(model, forward=None, tokens=None):
    """Train three steps; return losses, first gradients, parameters, codes before, and an output in eval mode."""
    tokens = TOKENS.to(next(model.parameters()).device) if tokens is None else tokens
    optimizer, losses, grads = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9), [], {}
    codes = on_cpu({n: m.codes() for n, m in qk.quantized_modules(model).items()})
    for _ in range(3):
        optimizer.zero_grad()
        loss = (forward or model)(tokens).float().square().mean()
        loss.backward()
        grads = grads or on_cpu({n: p.grad for n, p in model.named_parameters()})
        optimizer.step()
        losses.append(loss.detach())
    return on_cpu((losses, grads, dict(model.named_parameters()), codes))


def in_eval_mode(model):
    return on_cpu(model.eval()(TOKENS.to(next(model.parameters()).device)))


def both(rank, name):
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh(device_of(2), (2,))
    model = parallel(make(name).to(mesh.device_type), mesh)
    tokens_here = []
    model.mlp.down.register_forward_hook(lambda module, inputs, y: tokens_here.append(tuple(y.shape)))
    results = *use(model), in_eval_mode(model)
    assert set(tokens_here) == {(4, 4, 16)}
    if name == "split groups":  # a packed layer refuses these
        return results, None
    packed = parallel(pack_model(make(name).to(mesh.device_type).eval()), mesh)
    y = packed(TOKENS.to(mesh.device_type))
    y.square().mean().backward()
    return results, on_cpu((y, {n: p.grad for n, p in packed.named_parameters()}))


@pytest.mark.parametrize("name", CONFIGS)
def test_training_and_packed(pair, name):
    model = make(name).to(device_of(2))
    wanted = *use(model), in_eval_mode(model)
    packed = pack_model(make(name).to(device_of(2)).eval())
    y = packed(TOKENS.to(device_of(2)))
    y.square().mean().backward()
    wanted_packed = on_cpu((y, {n: p.grad for n, p in packed.named_parameters()}))
    for found, found_packed in pair.run(both, name):
        for key, codes in wanted[3].items():
            assert_same_bits(found[3][key], codes)
        torch.testing.assert_close(found, wanted)
        if found_packed is not None:
            torch.testing.assert_close(found_packed, wanted_packed)


def two_dimensions(rank, name, shape, mixed):
    """Train under FSDP2 and tensor parallel; each row of the mesh has tokens of its own."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(device_of(dist.get_world_size()), shape, mesh_dim_names=("dp", "tp"))
    model, options = parallel(make(name).to(mesh.device_type), mesh["tp"]), {}
    if mixed:
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        options = {"ignored_params": shard_scales(model, mesh["dp"]), "mp_policy": policy}
    fully_shard(model.mlp, mesh=mesh["dp"], **options)
    fully_shard(model, mesh=mesh["dp"], **options)
    tokens = TOKENS.chunk(shape[0])[mesh.get_local_rank("dp")].to(mesh.device_type)
    losses, *others = use(model, tokens=tokens)
    for layer in qk.quantized_modules(model).values():
        assert layer.scale.dtype == layer.scale.grad.dtype == torch.float32
        assert layer.scale.grad.placements == layer.scale.placements
        assert layer.scale.device_mesh == layer.weight.device_mesh  # as clipping and foreach optimizers need it
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    total = torch.stack(losses)
    dist.all_reduce(total)
    losses = list((total / dist.get_world_size()).unbind())
    after = {n: m.codes() for n, m in qk.quantized_modules(model).items()}
    whole = gather_model(model)
    for key, layer in qk.quantized_modules(whole).items():
        assert_same_bits(on_cpu(after[key]), on_cpu(layer.codes()))
    return losses, *others, in_eval_mode(whole), in_eval_mode(pack_model(model))


def cast_as_fsdp2_does(model, tokens):
    scales = {id(scale) for scale in scales_of(model)}
    parameters = {n: p if id(p) in scales else p.bfloat16() for n, p in model.named_parameters()}
    return torch.func.functional_call(model, parameters, (tokens,))


def in_one_process(name, mixed):
    model = make(name)
    found = use(model, (lambda tokens: cast_as_fsdp2_does(model, tokens)) if mixed else None)
    return *found, in_eval_mode(copy.deepcopy(model)), in_eval_mode(pack_model(model))


def compare_two_dimensions(group, name, shape, mixed):
    wanted = in_one_process(name, mixed)
    # Activations are bfloat16 then: sums that are rounded between processes differ by their roundings, of 1/256 each.
    bound = {"rtol": 2 / 256, "atol": 2 / 256} if mixed else {}
    for found in group.run(two_dimensions, name, shape, mixed):
        torch.testing.assert_close(found, wanted, **bound)


@pytest.mark.parametrize("name", ["row", "group", "affine", "learned inputs"])
@pytest.mark.parametrize("shape", [(2, 1), (1, 2)])
@pytest.mark.parametrize("mixed", [False, True])
def test_under_fsdp2(pair, name, shape, mixed):
    compare_two_dimensions(pair, name, shape, mixed)


@pytest.mark.parametrize("name", ["row", "group", "learned inputs"])
@pytest.mark.parametrize("mixed", [False, True])
def test_under_fsdp2_of_four(four, name, mixed):
    compare_two_dimensions(four, name, (2, 2), mixed)


def scales_refused(rank):
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("dp", "tp"))
    model = parallel(make("row"), mesh["tp"])
    with pytest.raises(
        ValueError, match=r'sharded by tensor or expert parallel, must be the mesh.*such as mesh\["dp"\]'
    ):
        shard_scales(model)
    shard_scales(model, mesh["dp"])
    with pytest.raises(ValueError, match="sharded already"):
        shard_scales(model, mesh["dp"])


def test_scales_refused(pair):
    pair.run(scales_refused)
