"""Sharded models are packed, gathered and exported: the result is that of the model before it was sharded."""

import copy
import weakref

import pytest
import torch
import torch.distributed as dist
from torch import nn

import qatkernels as qk
from qatkernels.formats import export, load_packed, save_packed
from qatkernels.hessian import HessianOperator, eigs, hvp, spectrum
from qatkernels.nn import GroupedQuantLinear, QuantConfig, calibrate, gather_model, pack_model, shard_scales
from qatkernels.testing.compare import assert_same_bits
from tests import sharded

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo")

CONFIGS = {
    "row": QuantConfig(2),
    "affine": QuantConfig(4, "affine", group_size=4),
    "int zero points": QuantConfig(4, "affine", zero_point_domain="int"),
    "tensor": QuantConfig(3, per_tensor=True),
    "float16 scales": QuantConfig(4, scale_dtype="float16"),
    "inputs and outputs": QuantConfig(4, act_bits=8, act_scheme="lsq+", out_bits=8),
}


class Model(nn.Module):
    """Layers of every kind: tied, frozen, experts, and some that are not quantized."""

    def __init__(self, config):
        super().__init__()
        self.embedding, self.head = nn.Embedding(11, 16), nn.Linear(16, 11, bias=False)
        self.head.weight = self.embedding.weight
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(16, 13), nn.Tanh(), nn.Linear(13, 16)) for _ in range(2))
        self.norm = nn.LayerNorm(16)
        self.register_buffer("shift", torch.ones(16))
        self.experts = GroupedQuantLinear(3, 16, 16, bias=True, config=config)
        self.blocks[1][0].weight.requires_grad_(False)
        whole = ["embedding", "head"] if config.act_bits is None else []  # which a config with activations does not fit
        include = [*whole, "blocks.*.0"]
        qk.quantize_model(self, config, embeddings=bool(whole), include=include, exclude=())

    def forward(self, tokens):
        x = self.embedding(tokens)
        for block in self.blocks:
            x = x + block(x)
        offsets = torch.tensor([len(x) // 2, len(x) - 1, len(x)], dtype=torch.int32)
        return self.head(self.norm(self.experts(x, offsets) + self.shift.to(x.dtype)))


TOKENS = torch.arange(33) % 11


def make(name):
    torch.manual_seed(0)
    model = Model(CONFIGS[name])
    calibrate(model, TOKENS)
    with torch.no_grad():
        for layer in qk.quantized_modules(model).values():
            if layer.zero_point is not None:
                layer.zero_point.add_(0.3)  # off the integers, as training moves them
    return model.eval()


def shard(model, scales, **options):
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    if scales:
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        options |= {"ignored_params": shard_scales(model), "mp_policy": policy}
    for block in model.blocks:
        fully_shard(block, **options)
    fully_shard(model.experts, **options)
    fully_shard(model, **options)
    return model


def packed(rank, name, scales):
    model = shard(make(name), scales)
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    model(TOKENS)  # the root's parameters stay gathered after this, in bfloat16
    whole = pack_model(model)
    assert type(whole) is Model
    y = whole(TOKENS).detach()
    assert len(calls) == 2  # hooks of users come along
    assert not any("fsdp" in str(hook) for m in whole.modules() for hook in m._forward_pre_hooks.values())
    frozen = [n for n, p in whole.named_parameters() if not p.requires_grad]
    state = {n: t.clone() for n, t in whole.state_dict().items()}
    model.train()
    model(TOKENS).float().sum().backward()  # the sharded one is as it was
    return y, state, frozen, sum(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("scales", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", CONFIGS)
def test_packing(pair, name, scales):
    wanted = pack_model(make(name))
    for y, state, frozen, trained in pair.run(packed, name, scales):
        assert_same_bits(y, wanted(TOKENS).detach())
        assert list(state) == list(wanted.state_dict())
        for key, tensor in wanted.state_dict().items():
            assert_same_bits(state[key], tensor)
        assert frozen == [n for n, p in wanted.named_parameters() if not p.requires_grad]
        assert trained > 5


def one_at_a_time(rank):
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    model = qk.quantize_model(nn.Sequential(*(nn.Linear(64, 64, bias=False) for _ in range(5))), QuantConfig(2))
    fully_shard(model)
    alive, most = weakref.WeakSet(), 0
    gather = DTensor.full_tensor

    def counted(tensor, **kwargs):
        nonlocal most
        full = gather(tensor, **kwargs)
        if full.ndim == 2:
            alive.add(full)
        most = max(most, len(alive))
        return full

    DTensor.full_tensor = counted
    try:
        pack_model(model)
    finally:
        DTensor.full_tensor = gather
    return most, len(alive)


def test_one_weight_at_a_time(pair):
    assert pair.run(one_at_a_time) == [(1, 0)] * 2


def one_layer(rank):
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    layer = qk.quantize_model(nn.Linear(16, 8), QuantConfig(4))
    x = torch.ones(2, 16)
    wanted = pack_model(copy.deepcopy(layer))(x)
    fully_shard(layer)
    whole = pack_model(layer)
    assert type(whole) is qk.PackedLinear
    assert_same_bits(whole(x), wanted)


def test_a_layer_that_is_the_model(pair):
    pair.run(one_layer)


def saved(rank, folder):
    model = shard(make("row"), False)
    with pytest.raises(ValueError, match=r"the model is sharded: call qatkernels.pack_model\(model\) in every process"):
        export(model, folder / "x", "gguf")
    whole = pack_model(model)
    if rank == 0:
        save_packed(whole, folder / "model.safetensors")
        export(whole, folder / "export.safetensors", "safetensors")


def test_files(pair, tmp_path):
    pair.run(saved, tmp_path)
    wanted = pack_model(make("row"))(TOKENS)
    for name in ("model", "export"):
        loaded = load_packed(tmp_path / f"{name}.safetensors", lambda config: Model(CONFIGS["row"]))
        assert_same_bits(loaded(TOKENS), wanted)


X = torch.linspace(-1, 1, 48).view(6, 8)


def small():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 2))
    return qk.quantize_model(model, QuantConfig(4))


def curvature(operator):
    return eigs(operator, 2).values, spectrum(operator, probes=2, steps=4).trace.value


def loss(model, x):
    return model(x).square().mean()


def whole_hessian(rank):
    from torch.distributed.fsdp import fully_shard

    model = small()
    fully_shard(model)
    weights = list(model.parameters())
    with pytest.raises(ValueError, match=r"parameters are sharded.*gather_model\(model\), a whole copy"):
        hvp(lambda: loss(model, X), weights, weights)
    operator = HessianOperator(gather_model(model), loss, [X[rank::2]])
    with pytest.raises(ValueError, match="not sharded: it is whole already"):
        gather_model(small())
    return curvature(operator)


def test_hessian_of_a_whole_copy(pair):
    values, trace = curvature(HessianOperator(small(), loss, [X]))
    for found, found_trace in pair.run(whole_hessian):
        torch.testing.assert_close(found, values)
        assert found_trace == pytest.approx(trace, rel=1e-4)


def llama(rank):
    from torch.distributed.fsdp import fully_shard

    model = sharded.llama(32)
    tokens = torch.tensor([[1, 2, 3, 4]])
    wanted = pack_model(copy.deepcopy(model))
    for block in model.model.layers:
        fully_shard(block)
    fully_shard(model)
    whole = pack_model(model)
    assert_same_bits(whole(tokens).logits, wanted(tokens).logits)
    assert whole.config.quantization_config == wanted.config.quantization_config
    assert model.config.quantization_config["recipe"][0]["packed"] is None
    assert whole.generate(tokens, max_new_tokens=2, do_sample=False).shape == (1, 6)


def test_a_model_of_transformers(pair):
    pytest.importorskip("transformers")
    pair.run(llama)


def packed_codes(rank, folder):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import parallelize_module

    from qatkernels.nn.tensor_parallel import ColwiseParallel

    torch.manual_seed(0)
    model = pack_model(qk.quantize_model(nn.Sequential(nn.Linear(16, 8, bias=False)), QuantConfig(4), exclude=()))
    x = torch.ones(2, 16)
    wanted = model(x)
    parallelize_module(model, init_device_mesh("cpu", (2,)), {"0": ColwiseParallel()})
    for refused in (
        lambda: save_packed(model, folder / "model"),
        lambda: export(model, folder / "model", "safetensors"),
        lambda: model[0].weight.dequantize(),
        lambda: model[0].weight.codes(),
    ):
        with pytest.raises(ValueError, match=r"sharded: call qatkernels.nn.gather_model\(model\)"):
            refused()
    with pytest.raises(ValueError, match="requires_grad is True, must be False: codes do not train"):
        model[0].weight.requires_grad = True
    assert_same_bits(gather_model(model)(x), wanted)


def test_a_packed_model_of_which_only_codes_are_sharded(pair, tmp_path):
    pair.run(packed_codes, tmp_path)


def sharded_scales(rank):
    model = qk.quantize_model(nn.Sequential(nn.Linear(16, 8)), QuantConfig(4), exclude=())
    with pytest.raises(TypeError, match="mesh is 'cpu', must be a DeviceMesh"):
        shard_scales(model, "cpu")
    shard_scales(model)
    for what, refused in (
        ("set scales", model[0].reset_scale),
        ("requantize", lambda: model[0].requantize(QuantConfig(2))),
        ("set scales", lambda: qk.load_weights(model, {"0.weight": torch.ones(8, 16), "0.bias": torch.ones(8)})),
    ):
        with pytest.raises(ValueError, match=f"the scales are sharded and the weight is not: {what} before"):
            refused()
    assert len(qk.check(model, torch.ones(2, 16)).layers) == 1


def test_scales_that_are_sharded_cannot_be_set(pair):
    pair.run(sharded_scales)
