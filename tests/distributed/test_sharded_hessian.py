"""Hessian-vector products, spectra and sharpness of models that FSDP2 has sharded are those of one process."""

import contextlib
import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.utils.parametrizations import weight_norm
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import qatkernels as qk
from qatkernels.hessian import HessianOperator, eigs, hvp, sharpness, spectrum, trace
from qatkernels.hessian._spectrum import probe
from qatkernels.hessian._trace import signs
from qatkernels.nn import QuantConfig, gather_codes, gather_model
from qatkernels.testing.compare import assert_same_bits
from tests import sharded
from tests.sharded import BATCHES, CONFIGS, loss_of, make, shard, trained

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo")


def operator(model, batches, every=True, **options):
    params = trained(model) if every else None
    return HessianOperator(model, loss_of, batches, params, dtype=torch.float64, **options)


def whole(op, vector, params):
    """Return a vector as a whole, from this process's elements: those of its shards, flattened in order."""
    from torch.distributed.tensor import DTensor

    locals_ = [p.to_local() for p in params]
    parts = vector.split([p.numel() for p in locals_])
    return torch.cat([
        DTensor.from_local(
            part.view(local.shape), p.device_mesh, p.placements, run_check=False, shape=p.shape, stride=p.stride()
        ).full_tensor().flatten()
        for part, local, p in zip(parts, locals_, params, strict=True)
    ])  # fmt: skip


def density(op):
    found = spectrum(op, probes=2, steps=3, block=2)
    return {"n": torch.tensor(op.n), "ritz": torch.stack(found.ritz), "weights": torch.stack(found.weights)}


def close(found, wanted):
    # Scales, and derivatives with respect to them, are float32 in a float64 model.
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-7)


def close64(found, wanted):
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)


def on_shards(rank, name, scales, every):
    model = shard(make(name), scales)
    if scales:
        model(BATCHES[0])  # the root's parameters stay gathered after this
    batches = BATCHES[rank::2]
    op = operator(model, batches, every, weights=[1.0, 2.0][: len(batches)], retain=True)
    params = trained(model) if every else list(qk.nn.quantized_weights(model))
    v = probe(op, 3, 0)
    assert v.shape == (op.vectors.length,) != (op.n,)
    vectors = {"v": v, "product": op.products([v])[0], "gradient": op.gradient()}
    assert all(p.grad is None for p in model.parameters())
    if scales:
        model(BATCHES[0]).float().sum().backward()  # the sharded model still trains
        assert all(p.grad is not None for p in params)
    return {key: whole(op, t, params) for key, t in vectors.items()}, density(op)


@pytest.mark.parametrize("every", [False, True], ids=["weights", "all"])
@pytest.mark.parametrize("scales", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", CONFIGS)
def test_products(pair, name, scales, every):
    model = make(name)
    op = operator(model, [BATCHES[i] for i in (0, 2, 1)], every, weights=[1.0, 2.0, 1.0])
    v = probe(op, 3, 0)
    vectors = {"v": v, "product": op.products([v])[0], "gradient": op.gradient()}
    check = close if every else close64
    first, second = pair.run(on_shards, name, scales, every)
    for of_vectors, of_operator in (first, second):
        assert_same_bits(of_vectors["v"], v)
        for key, wanted in vectors.items():
            check(of_vectors[key], wanted)
        for key, wanted in density(op).items():
            check(of_operator[key], wanted)
    for key in first[1]:
        assert_same_bits(first[1][key], second[1][key])


def quantities(op):
    pairs = eigs(op, 1, basis=20, tol=1e-9)
    return pairs.vectors, {
        "eigenvalues": pairs.values, "residuals": pairs.residuals.clamp_min(1e-9),
        "trace": torch.tensor(trace(op, 6).value), "hutch++": torch.tensor(trace(op, 7, "hutch++").value),
    }  # fmt: skip


def other_quantities(rank):
    model = shard(make())
    op = operator(model, BATCHES[rank : rank + 1], every=False)
    vectors, found = quantities(op)
    weights = list(qk.nn.quantized_weights(model))
    return [whole(op, v, weights) for v in vectors], found


def test_eigenpairs_and_traces(pair):
    vectors, wanted = quantities(operator(make(), BATCHES[:2], every=False))
    for found_vectors, found in pair.run(other_quantities):
        for key, value in wanted.items():
            torch.testing.assert_close(found[key], value, rtol=1e-8, atol=1e-8, msg=key)
        for a, b in zip(found_vectors, vectors, strict=True):
            assert float((a @ b).abs()) == pytest.approx(1, abs=1e-8)


def with_everything_else(rank):
    """Modes of the operator that must not change a product."""
    model, batches = shard(make()), BATCHES[rank::2]
    op = operator(model, batches, every=False)
    v = probe(op, 0, 0)
    wanted = op.products([v])[0]
    for options in ({"retain": True}, {"checkpoint": True}, {"checkpoint": [model.blocks[1]], "retain": True}):
        other = operator(model, batches, every=False, **options)
        for product in other.products([v, v]) + other.products([v]):
            close64(product, wanted)
    in_float32, copied = (HessianOperator(m, loss_of, batches) for m in (model, gather_model(model)))
    assert in_float32.dtype == torch.float32
    product = whole(in_float32, in_float32.products([v.float()])[0], list(qk.nn.quantized_weights(model)))
    torch.testing.assert_close(product, copied.products([probe(copied, 0, 0)])[0], rtol=1e-4, atol=1e-5)
    return float(wanted.square().sum())


def test_ways_to_compute_a_product(pair):
    op = operator(make(), [BATCHES[i] for i in (0, 2, 1)], every=False)
    wanted = op.products([probe(op, 0, 0)])[0]
    assert sum(pair.run(with_everything_else)) == pytest.approx(float(wanted.square().sum()), rel=1e-10)


def training_mode(rank):
    torch.manual_seed(rank)
    model = shard(make()).train()
    op = operator(model, BATCHES[rank::2], every=False)
    u, v = probe(op, 0, 0), probe(op, 0, 1)
    of_u, of_v, again = *op.products([u, v]), op.products([v])[0]
    assert_same_bits(again, of_v)
    sums = torch.stack([of_u @ v, of_v @ u])
    dist.all_reduce(sums)
    close64(sums[0], sums[1])
    state = torch.get_rng_state()
    op.products([v])
    assert_same_bits(torch.get_rng_state(), state)
    return float(of_v.square().sum())


def test_dropout_is_one_draw(pair):
    pair.run(training_mode)


def follows(rank):
    model = shard(make(), scales=True)
    op = operator(model, BATCHES[rank::2], every=False)
    v = probe(op, 0, 0)
    before = op.products([v])[0]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(BATCHES[0]).float().square().mean().backward()
    grads = [p.grad for p in model.parameters()]
    assert_same_bits(op.products([v])[0], before)
    assert all(p.grad is g for p, g in zip(model.parameters(), grads, strict=True))
    optimizer.step()
    after = op.products([v])[0]
    assert not torch.equal(after, before)
    assert_same_bits(operator(model, BATCHES[rank::2], every=False).products([v])[0], after)
    copied = operator(gather_model(model), BATCHES[rank::2], every=False)
    close64(whole(op, after, list(qk.nn.quantized_weights(model))), copied.products([probe(copied, 0, 0)])[0])


def test_it_follows_the_model(pair):
    pair.run(follows)


def replicated(rank, ways, columns):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Shard

    model, mesh = make(), init_device_mesh("cpu", ways, mesh_dim_names=("replicate", "shard"))
    by_columns = (lambda p: Shard(1) if p.ndim == 2 and not p.shape[1] % 2 else None) if columns else None
    for block in model.blocks:
        fully_shard(block, mesh=mesh, shard_placement_fn=by_columns)
    fully_shard(model, mesh=mesh, ignored_params={model.shift, model.norm.weight}, shard_placement_fn=by_columns)
    op = operator(model, BATCHES[rank::2], retain=True)
    v = probe(op, 3, 0)
    h = op.products([v])[0]
    return (
        float(v @ v),
        float(v @ h),
        float(h @ h),
        op.gradient().square().sum().item(),
        *density(op)["ritz"][0].tolist(),
    )


@pytest.mark.parametrize(
    ("ways", "columns"), [((2, 1), False), ((1, 2), False), ((1, 2), True)], ids=["replicas", "shards", "columns"]
)
def test_parameters_of_which_processes_have_copies(pair, ways, columns):
    op = operator(make(), [BATCHES[i] for i in (0, 2, 1)])
    v = probe(op, 3, 0)
    h = op.products([v])[0]
    sums = float(v @ v), float(v @ h), float(h @ h), op.gradient().square().sum().item()
    first, second = pair.run(replicated, ways, columns)
    assert [a + b for a, b in zip(first[:4], second[:4], strict=True)] == pytest.approx(sums, rel=1e-6)
    assert first[4:] == second[4:] == pytest.approx(density(op)["ritz"][0].tolist(), rel=1e-6)


class Alive(TorchDispatchMode):
    """Counts the tensors of one size that live at the same time."""

    def __init__(self, numel):
        super().__init__()
        self.numel, self.most, self.alive = numel, 0, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.count(out)
        return out

    def count(self, out):
        for t in out if isinstance(out, (tuple, list)) else [out]:
            if type(t) is torch.Tensor and t.untyped_storage().nbytes() == self.numel * t.element_size():
                storage = StorageWeakRef(t.untyped_storage())
                if storage not in self.alive:
                    self.alive.append(storage)
        self.alive = [storage for storage in self.alive if not storage.expired()]
        self.most = max(self.most, len(self.alive))

    @contextlib.contextmanager
    def running(self):
        """Count also what torch gathers, of which a mode sees only parts."""
        from torch.distributed.tensor import DTensor

        gather = DTensor.full_tensor

        def counted(tensor, **kwargs):
            full = gather(tensor, **kwargs)
            self.count(full)
            return full

        DTensor.full_tensor = counted
        try:
            with self:
                yield self
        finally:
            DTensor.full_tensor = gather


def most_alive(rank, depth, retain):
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(24, 24, bias=False) for _ in range(depth)))
    for layer in qk.quantize_model(model, QuantConfig(4), exclude=()):
        fully_shard(layer)
    fully_shard(model)
    op = HessianOperator(model, lambda model, x: model(x).square().mean(), [torch.ones(3, 24)], retain=retain)
    v = probe(op, 0, 0)
    with Alive(24 * 24).running() as alive:
        op.products([v, v])
        op.products([v])
        op.gradient()
    left = len([storage for storage in alive.alive if not storage.expired()])
    return alive.most, left


@pytest.mark.parametrize("retain", [False, True])
def test_a_layer_is_whole_at_a_time(pair, retain):
    # Of one layer: its weight, the quantized weight, and derivatives of theirs. All nine layers would be 18 and more.
    for depth in (4, 9):
        for most, left in pair.run(most_alive, depth, retain):
            assert 2 <= most <= 6
            assert left == 0


def long_vectors(rank):
    from torch.distributed.fsdp import fully_shard

    model = qk.quantize_model(nn.Sequential(nn.Linear(1024, 1025), nn.Linear(1025, 1027)), QuantConfig(4), exclude=())
    fully_shard(model)
    op = HessianOperator(model, lambda model, x: model(x).square().mean(), [torch.ones(1, 1024)])
    weights = list(qk.nn.quantized_weights(model))
    drawn = probe(op, 7, 2), signs(op, 7, 2)
    wanted = torch.Generator().manual_seed(7 * 1_000_003 + 2)
    assert_same_bits(whole(op, drawn[0], weights), torch.randn(op.n, generator=wanted))
    wanted.manual_seed(7 * 1_000_003 + 2)
    ones = 2 * torch.randint(0, 2, (op.n,), generator=wanted, dtype=torch.int8) - 1
    assert_same_bits(whole(op, drawn[1], weights), ones.float())


def test_random_vectors_are_those_of_one_process(pair):
    pair.run(long_vectors)


class Attention(nn.Module):
    """torch's attention, which reads the parameters of a module in it."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2)

    def forward(self, x):
        return self.attention(x, x, x)[0]


def two_layers():
    return qk.quantize_model(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 3)), QuantConfig(4), exclude=())


def other_models(rank):
    from torch.distributed.fsdp import fully_shard

    def check(build, loss, every=False):
        torch.manual_seed(0)
        plain = build()
        copied = copy.deepcopy(plain)
        for layer in copied.children():
            fully_shard(layer)
        fully_shard(copied)
        found, wanted = (
            HessianOperator(m, loss, [rank], trained(m) if every else None, dtype=torch.float64)
            for m in (copied, plain)
        )
        params = trained(copied) if every else list(qk.nn.quantized_weights(copied))
        same = close if every else close64
        same(whole(found, found.gradient(), params), wanted.gradient())
        products = found.products([probe(found, 0, 0)])[0], wanted.products([probe(wanted, 0, 0)])[0]
        same(whole(found, products[0], params), products[1])

    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(rank)).double()
    check(Attention, lambda m, _: m(x).square().mean(), every=True)
    # The loss multiplies with a weight itself, outside of its layer.
    # A process without any element of the vectors, and one without a row.
    check(lambda: nn.Sequential(nn.Linear(8, 1, bias=False)), lambda m, _: m(x).tanh().square().mean(), every=True)
    check(two_layers, lambda m, _: (m[0](x).tanh() @ m[1].weight.T).square().mean(), every=True)
    check(two_layers, lambda m, _: checkpoint(m, x, use_reentrant=False).tanh().square().mean())
    model = nn.Sequential(nn.Linear(8, 4), nn.Tanh(), weight_norm(nn.Linear(4, 2)))
    fully_shard(model)
    with pytest.raises(ValueError, match="a direction v of torch's weight_norm"):
        operator(model, [rank])


def test_other_models(pair):
    pair.run(other_models)


def codes(rank):
    model = make()
    model.blocks[1][0] = qk.quantize_model(nn.Linear(8, 6), QuantConfig(4))  # an even number of rows
    model.blocks[1][2] = nn.Linear(6, 8)
    shard(model, scales=True)
    assert gather_codes(model) == ["blocks.1.0"]
    op = operator(model, BATCHES[rank::2], every=False)
    product = op.products([probe(op, 0, 0)])[0]
    copied = operator(gather_model(model), BATCHES[rank::2], every=False)
    close64(whole(op, product, list(qk.nn.quantized_weights(model))), copied.products([probe(copied, 0, 0)])[0])
    with pytest.raises(ValueError, match=r"something is added to it.*leave gather_codes out"):
        sharpness(model, lambda: loss_of(model, BATCHES[0]), target="quantized")


def test_a_model_whose_codes_are_gathered(pair):
    pair.run(codes)


def llama(rank):
    from torch.distributed.fsdp import fully_shard

    model = sharded.llama(16)
    for block in model.model.layers:
        fully_shard(block)
    fully_shard(model)

    def loss(model, tokens):
        return model(tokens, labels=tokens).loss

    tokens = torch.tensor([[1, 2, 3, 4], [5, 6, 7, rank]])
    found, wanted = (HessianOperator(m, loss, [tokens], dtype=torch.float64) for m in (model, gather_model(model)))
    product = found.products([probe(found, 0, 0)])[0]
    expected = wanted.products([probe(wanted, 0, 0)])[0]
    # Its norms compute in float32 in any model, where derivatives of checkpointed layers are added in another order.
    torch.testing.assert_close(
        whole(found, product, list(qk.nn.quantized_weights(model))), expected, rtol=1e-5, atol=1e-6
    )


def test_a_model_of_transformers(pair):
    pytest.importorskip("transformers")
    pair.run(llama)


def refused(rank):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import parallelize_module

    from qatkernels.nn.tensor_parallel import ColwiseParallel

    model = shard(make())
    for options, message in (
        ({"engine": "forward"}, "engine is 'forward', must be 'reverse' for a model that is sharded.*gather_model"),
        ({"distributed": False}, "distributed is False, must be None or True for a model that is sharded"),
        ({"params": [torch.ones(2)]}, r"params\[0\] are not parameters of the model"),
    ):
        with pytest.raises(ValueError, match=message):
            HessianOperator(model, loss_of, BATCHES, **options)
    op = HessianOperator(model, loss_of, BATCHES)
    with pytest.raises(ValueError, match=rf"must be torch.float32 of shape \({op.vectors.length},\)"):
        op.products([torch.ones(op.n)])
    with pytest.raises(ValueError, match="the model is sharded, must be whole for scipy"):
        op.to_scipy()
    weights = list(qk.nn.quantized_weights(model))
    with pytest.raises(ValueError, match=r"HessianOperator\(model, loss_fn, batches\), which takes sharded models"):
        hvp(lambda: loss_of(model, BATCHES[0]), weights, weights)
    parallel = qk.quantize_model(nn.Sequential(nn.Linear(16, 8)), QuantConfig(4), exclude=())
    parallelize_module(parallel, init_device_mesh("cpu", (2,)), {"0": ColwiseParallel()})
    alone = shard_alone(make(), init_device_mesh("cpu", (2, 1), mesh_dim_names=("one", "other"))["other"])
    recurrent = nn.Sequential(nn.LSTM(4, 4))
    fully_shard(recurrent)
    for other, message in (
        (parallel, r"sharded by something else than fully_shard: give it qatkernels.nn.gather_model"),
        (alone, "shift is sharded over 1 of 2 processes, must be over all: give it .*gather_model"),
    ):
        with pytest.raises(ValueError, match=message):
            HessianOperator(other, loss_of, BATCHES)
        with pytest.raises(ValueError, match=message):
            sharpness(other, lambda: None)
    with pytest.raises(ValueError, match=r"0 keeps a list of its weights.*gather_model"):
        operator(recurrent, BATCHES)


def shard_alone(model, mesh):
    from torch.distributed.fsdp import fully_shard

    fully_shard(model, mesh=mesh)
    return model


def test_what_is_refused(pair):
    pair.run(refused)
