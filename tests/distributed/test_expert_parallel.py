"""Experts that are split over processes, by experts, rows or columns: two processes compute what one computes."""

import functools

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import qatkernels as qk
from qatkernels.methods import WinQ
from qatkernels.nn import GroupedQuantLinear, calibrate, gather_model, pack_model, shard_scales
from qatkernels.testing.compare import assert_same_bits
from tests.distributed.test_tensor_parallel import CONFIGS
from tests.pair import device_of, on_cpu

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo")

EXPERTS, TOKENS = 4, 14
X = torch.randn(TOKENS, 16, generator=torch.Generator().manual_seed(3))
#: Of each process, where they have tokens of their own.
OWN = (slice(0, 5), slice(5, TOKENS))


class Experts(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.up = GroupedQuantLinear(EXPERTS, 16, 48, bias=True, config=config)
        self.gate = GroupedQuantLinear(EXPERTS, 16, 48, config=config)
        self.down = GroupedQuantLinear(EXPERTS, 48, 16, bias=True, config=config)

    def forward(self, x, offsets):
        return self.down(F.silu(self.gate(x, offsets)) * self.up(x, offsets), offsets) + 0.1


class Mixture(nn.Module):
    """The last expert gets no token, and tokens that the router is not sure of go to none."""

    def __init__(self, config):
        super().__init__()
        self.router, self.experts = nn.Linear(16, EXPERTS), Experts(config)

    def forward(self, x):
        weight, expert = self.router(x)[:, :-1].softmax(-1).max(-1)
        expert = expert.where(weight > 0.392, EXPERTS)
        order = expert.argsort(stable=True)
        offsets = F.one_hot(expert, EXPERTS + 1).sum(0).cumsum(0)[:EXPERTS].int()
        y = self.experts(x[order], offsets)
        y = y.where((torch.arange(len(x), device=x.device) < offsets[-1])[:, None], 0)
        return torch.empty_like(y).index_copy(0, order, y) * weight[:, None]


def make(name):
    torch.manual_seed(0)
    model = Mixture(CONFIGS[name])
    calibrate(model, X)
    return model.to(device_of(2))


def parallel(model, mesh, how):
    from torch.distributed.tensor import Shard
    from torch.distributed.tensor.parallel import parallelize_module

    from qatkernels.nn.expert_parallel import ExpertParallel
    from qatkernels.nn.tensor_parallel import ColwiseParallel, RowwiseParallel

    plans = {
        "all tokens": {"experts": ExpertParallel()},
        "own tokens": {"experts": ExpertParallel(input_layouts=Shard(0))},
        "tensor": {
            "experts.up": ColwiseParallel(),
            "experts.gate": ColwiseParallel(),
            "experts.down": RowwiseParallel(),
        },
    }
    return parallelize_module(model, mesh, plans[how])


def use(model, x, own=False):
    """Train three steps; return losses, first gradients, parameters, codes before, and an output in eval mode."""
    # torch's foreach optimizers refuse DTensors beside plain tensors.
    optimizer, losses, grads = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, foreach=False), [], {}
    codes = on_cpu({n: m.codes() for n, m in qk.quantized_modules(model).items()})
    for _ in range(3):
        optimizer.zero_grad()
        loss = (model(x) - 0.3).square().sum() / TOKENS
        loss.backward()
        if own:  # as DDP does for what is not split
            for tensor in (*(p.grad for p in model.router.parameters()), loss := loss.detach()):
                dist.all_reduce(tensor)
        grads = grads or on_cpu({n: p.grad.clone() for n, p in model.named_parameters()})
        optimizer.step()
        losses.append(loss)
    return on_cpu((losses, grads, dict(model.named_parameters()), codes)), on_cpu(model.eval()(x))


def use_packed(model, x):
    """Return the output of a packed model and the gradients of its input and the experts' biases."""
    x = x.clone().requires_grad_()
    y = model(x)
    y.square().sum().backward()
    return on_cpu((y, x.grad)), on_cpu({n: p.grad for n, p in model.experts.named_parameters()})


def both(rank, name, how):
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh(device_of(2), (2,))
    x = X.to(mesh.device_type)[OWN[rank] if how == "own tokens" else slice(None)]
    model = parallel(make(name), mesh, how)
    shapes = [tuple(m.weight.to_local().shape) for m in (model.experts.up, model.experts.down)]
    assert shapes == ([(4, 24, 16), (4, 16, 24)] if how == "tensor" else [(2, 48, 16), (2, 16, 48)])
    trained = use(model, x, own=how == "own tokens")
    for parameter in model.experts.parameters():
        assert parameter.grad.placements == parameter.placements
    wholes = on_cpu([copy(X.to(mesh.device_type)) for copy in (gather_model(model), pack_model(model))])
    if (name, how) == ("split groups", "tensor"):  # a packed layer refuses these
        return trained, wholes, None
    packed = parallel(pack_model(make(name).eval()), mesh, how)
    codes = packed.experts.up.weight.packed
    assert codes.to_local().numel() * 2 == codes.numel()
    return trained, wholes, use_packed(packed, x)


@functools.cache
def in_one_process(name):
    model = make(name)
    x = X.to(device_of(2))
    trained = use(model, x)
    return trained, on_cpu([model(x), pack_model(model)(x)]), use_packed(pack_model(make(name).eval()), x)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("how", ["all tokens", "own tokens", "tensor"])
def test_training_and_packed(pair, name, how):
    (results, y), wholes, (packed, packed_grads) = in_one_process(name)
    for rank, (found, found_wholes, found_packed) in enumerate(pair.run(both, name, how)):
        here = OWN[rank] if how == "own tokens" else slice(None)
        for key, codes in results[3].items():
            assert_same_bits(found[0][3][key], codes)
        torch.testing.assert_close(found, (results, y[here]))
        torch.testing.assert_close(found_wholes, wholes)
        if found_packed is not None and how != "own tokens":
            torch.testing.assert_close(found_packed, (packed, packed_grads))
        elif found_packed is not None:
            torch.testing.assert_close(found_packed, (tuple(t[here] for t in packed), packed_grads))


def test_the_mixture_of_the_tests():
    """Tokens that go nowhere, and an expert without tokens."""
    offsets = []
    model = make("row")
    model.experts.up.register_forward_pre_hook(lambda module, inputs: offsets.append(inputs[1].tolist()))
    model(X.to(device_of(2)))
    assert 0 < offsets[0][0] < offsets[0][1] < offsets[0][2] == offsets[0][3] < TOKENS


def losses_with_noise(model):
    winq = WinQ(model, reset_every=None, reset_weight=0.0, noise_std=0.05, two_sided=True)
    torch.manual_seed(1)

    def closure():
        loss = model(X.to(device_of(2))).square().mean()
        loss.backward()
        return loss

    return winq.gradient(closure).item()


def noisy(rank, how):
    from torch.distributed.device_mesh import init_device_mesh

    return losses_with_noise(parallel(make("group"), init_device_mesh(device_of(2), (2,)), how))


@pytest.mark.parametrize("how", ["all tokens", "tensor"])
def test_noise_is_that_of_one_process(pair, how):
    for found in pair.run(noisy, how):
        assert found == pytest.approx(losses_with_noise(make("group")), rel=1e-5)


def under_fsdp2(rank, name, mixed):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(device_of(4), (2, 2), mesh_dim_names=("dp", "ep"))
    model, options = parallel(make(name).to(mesh.device_type), mesh["ep"], "all tokens"), {}
    if mixed:
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        options = {"ignored_params": shard_scales(model, mesh["dp"]), "mp_policy": policy}
    fully_shard(model.experts, mesh=mesh["dp"], **options)
    fully_shard(model, mesh=mesh["dp"], **options)
    x = X.chunk(2)[mesh.get_local_rank("dp")].to(mesh.device_type)
    (model(x).float() - 0.3).square().mean().backward()
    return on_cpu({n: p.grad for n, p in model.named_parameters()})


@pytest.mark.parametrize("name", ["row", "learned inputs"])
@pytest.mark.parametrize("mixed", [False, True])
def test_under_fsdp2(four, name, mixed):
    model = make(name).cpu()
    (model(X) - 0.3).square().mean().backward()
    # Weights, activations and gradients of activations are rounded to bfloat16, by 1/256 each.
    bound = {"rtol": 4 / 256, "atol": 2 / 256} if mixed else {}
    for found in four.run(under_fsdp2, name, mixed):
        torch.testing.assert_close(found, {n: p.grad for n, p in model.named_parameters()}, **bound)


SMALL = {
    "vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
}  # fmt: skip
TEXT = torch.randint(32, (2, 6), generator=torch.Generator().manual_seed(1))


def of_transformers(family):
    """Return a quantized mixture; of gpt-oss, of which stacks have biases, one of two stacks is quantized."""
    import transformers

    torch.manual_seed(0)
    if family == "mixtral":
        config = transformers.MixtralConfig(**SMALL, intermediate_size=32, num_local_experts=4)
        model = transformers.MixtralForCausalLM(config)
    elif family == "qwen3":
        config = transformers.Qwen3MoeConfig(**SMALL, moe_intermediate_size=32, num_experts=4, num_experts_per_tok=2)
        model = transformers.Qwen3MoeForCausalLM(config)
    else:
        config = transformers.GptOssConfig(
            **SMALL, intermediate_size=32, num_local_experts=4, head_dim=8, pad_token_id=0
        )
        model = transformers.GptOssForCausalLM(config)
    stacks = ["*.gate_up_proj"] if family == "gpt-oss" else ["*.experts.*"]
    return qk.quantize_model(model, CONFIGS["group"], include=stacks).to(device_of(2))


def parallel_experts(model, mesh, how):
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.parallel import parallelize_module

    from qatkernels.nn.expert_parallel import ExpertParallel
    from qatkernels.nn.tensor_parallel import ColwiseParallel, RowwiseParallel

    experts = "model.layers.*.mlp.experts"
    plans = {
        "all tokens": {experts: ExpertParallel()},
        "own tokens": {experts: ExpertParallel(input_layouts=Shard(0))},
        "tensor": {
            f"{experts}.gate_up_proj": ColwiseParallel(output_layouts=Replicate()),
            f"{experts}.down_proj": RowwiseParallel(input_layouts=Replicate()),
        },
    }
    return parallelize_module(model, mesh, plans[how])


def use_text(model, text):
    """Train two steps; return losses and logits, and the first gradients of the experts."""
    optimizer, losses, grads = torch.optim.SGD(model.parameters(), lr=0.1, foreach=False), [], {}
    for _ in range(2):
        optimizer.zero_grad()
        loss = model(text, labels=text).loss
        loss.backward()
        grads = grads or on_cpu({n: p.grad.clone() for n, p in model.named_parameters() if ".experts." in n})
        optimizer.step()
        losses.append(loss)
    return on_cpu((losses, model.eval()(text).logits)), grads


def text_in_two(rank, family, how):
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh(device_of(2), (2,))
    model, text = parallel_experts(of_transformers(family), mesh, how), TEXT.to(mesh.device_type)
    weight = model.model.layers[0].mlp.experts.gate_up_proj.weight
    assert weight.to_local().numel() * 2 == weight.numel()
    packed = parallel_experts(pack_model(of_transformers(family).eval()), mesh, how)
    if how == "own tokens":  # one text for each; gradients of the experts are sums
        text = text[rank : rank + 1]
        loss = model(text, labels=text).loss / 2
        loss.backward()
        dist.all_reduce(loss := loss.detach())
        grads = on_cpu({n: p.grad for n, p in model.named_parameters() if ".experts." in n})
        return on_cpu(loss), grads, on_cpu(packed(text).logits)
    trained = use_text(model, text)
    return trained, on_cpu([m(text).logits for m in (gather_model(model), pack_model(model), packed)])


@pytest.mark.parametrize("family", ["mixtral", "qwen3", "gpt-oss"])
@pytest.mark.parametrize("how", ["all tokens", "own tokens", "tensor"])
def test_mixtures_of_transformers(pair, family, how):
    if (family, how) == ("gpt-oss", "tensor"):
        pytest.skip("down_proj is no layer there")
    model, text = of_transformers(family), TEXT.to(device_of(2))
    packed = on_cpu(pack_model(of_transformers(family).eval())(text).logits)
    (losses, logits), grads = use_text(model, text)
    wholes = [logits, on_cpu(pack_model(model)(text).logits), packed]
    for rank, found in enumerate(pair.run(text_in_two, family, how)):
        if how == "own tokens":
            torch.testing.assert_close(found, (losses[0], grads, packed[rank : rank + 1]))
        else:
            torch.testing.assert_close(found, (((losses, logits), grads), wholes))


def refused(rank):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard
    from torch.distributed.tensor.parallel import parallelize_module

    from qatkernels.nn.expert_parallel import ExpertParallel

    mesh = init_device_mesh("cpu", (2,))
    with pytest.raises(ValueError, match=r"input_layouts is S\(1\), must be Replicate\(\) or Shard\(0\)"):
        ExpertParallel(input_layouts=Shard(1))
    with pytest.raises(ValueError, match=r"Linear has no stack of experts of this library.*quantize_model first"):
        parallelize_module(nn.Linear(2, 2), mesh, ExpertParallel())
    with pytest.raises(ValueError, match="has 3 experts, must have the same number in each of 2 processes"):
        parallelize_module(GroupedQuantLinear(3, 8, 8, config=CONFIGS["row"]), mesh, ExpertParallel())
    with pytest.raises(ValueError, match=r"belong to no stack of experts \(router.weight, router.bias\)"):
        parallelize_module(make("row").cpu(), mesh, ExpertParallel())
    layer = parallelize_module(GroupedQuantLinear(2, 16, 8, config=CONFIGS["row"]), mesh, ExpertParallel())
    with pytest.raises(
        ValueError, match=r"called with 1 positional arguments, must be called with 2 \(x, offsets\) or 3"
    ):
        layer(X, offsets=torch.tensor([3, 14], dtype=torch.int32))
    assert repr(ExpertParallel()) == "ExpertParallel(input_layouts=R)"


def test_what_is_refused(pair):
    pair.run(refused)
