"""Packed layers: outputs within the bound of docs/packing.md, and what torch users expect of a module."""

import copy
import pickle
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import qatkernels as qk
from qatkernels import grids
from qatkernels.dtypes import dtype_name
from qatkernels.nn import LearnedActivation, QuantConfig, QuantLinear, calibrate
from qatkernels.ops.packing import SCALES
from qatkernels.testing.compare import assert_same_bits, assert_within
from qatkernels.testing.products import by_expert, quantized_activation, rounded_bound, sum_error, wide_weight

pytestmark = pytest.mark.filterwarnings("ignore:the cast to torch")  # what is compared is cast before

ACTS = {
    "none": {}, "dynamic": {"act_bits": 8}, "dynamic4": {"act_bits": 4},
    "lsq": {"act_bits": 8, "act_scheme": "lsq"}, "lsq+": {"act_bits": 4, "act_scheme": "lsq+"},
}  # fmt: skip
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def bounds(x, packed, dtype, offsets=None):
    """Return y in float64 and how far the packed and the quantized layer may be from it.

    In 16 bits the quantized layer rounds the weight, the bias, a dynamic activation, and perhaps the product before the
    bias is added; the packed layer rounds its output alone.
    """
    w, magnitude = wide_weight(packed.weight)
    dynamic = packed.act_bits is not None
    values = quantized_activation(x, packed.act_bits)
    y, size = by_expert(values, w, offsets), by_expert(values.abs(), magnitude, offsets)
    terms = by_expert(values.abs(), w.abs(), offsets)
    if packed.bias is not None and offsets is None:
        b = packed.bias.detach().double()
        y, size, terms = y + b, size + b.abs(), terms + b.abs()
    error = sum_error(packed.in_features, dtype) * size
    roundings = (2 + dynamic) * torch.finfo(dtype).eps / 2 * (1 + 2**-6) if dtype.itemsize == 2 else 0.0
    return y, rounded_bound(y, error, dtype), rounded_bound(y, error + roundings * terms, dtype)


def check_pair(layer, packed, x, dtype):
    """Compare both layers with float64, and so with each other."""
    wanted, mine = layer(x), packed(x)
    assert mine.dtype == wanted.dtype == dtype
    values = x if packed.act is None else packed.act(x)
    values = values if packed.act_bits is not None else values.to(dtype)
    y, bound, quantized_bound = bounds(values.detach(), packed, dtype)
    assert_within(mine, y, bound, "packed")
    assert_within(wanted, y, quantized_bound, "quantized")


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_outputs_are_the_quantized_layers(config, act, dtype):
    config = QuantConfig(**{**config.to_dict(), **ACTS[act]})
    for bias in (True, False):
        layer = QuantLinear(48, 20, bias, config=config).to(dtype)
        x = torch.randn(3, 5, 48).to(dtype)
        calibrate(layer, x)
        layer.eval()
        check_pair(layer, qk.PackedLinear.from_quantized(layer), x, dtype)


@pytest.mark.parametrize("act", ACTS)
def test_autocast(config, act):
    layer = QuantLinear(48, 20, config=QuantConfig(**{**config.to_dict(), **ACTS[act]}))
    x = torch.randn(6, 48)
    calibrate(layer, x)
    layer.eval()
    with torch.autocast("cpu", torch.bfloat16):
        check_pair(layer, qk.PackedLinear.from_quantized(layer), x, torch.bfloat16)


@pytest.mark.parametrize("scale_dtype", SCALES, ids=dtype_name)
def test_scale_dtypes(config, scale_dtype):
    layer = QuantLinear(16, 12, config=config)
    packed = qk.PackedLinear.from_quantized(layer, scale_dtype=scale_dtype)
    assert packed.weight.scale.dtype == scale_dtype
    assert_same_bits(packed.weight.codes(), layer.codes())
    x = torch.randn(3, 16)
    y, bound, _ = bounds(x, packed, torch.float32)
    assert_within(packed(x), y, bound)


def test_gradients_are_the_quantized_layers(config):
    layer = QuantLinear(16, 12, config=config).double()
    packed = qk.PackedLinear.from_quantized(layer)
    x, g = torch.randn(5, 16, dtype=torch.float64, requires_grad=True), torch.randn(5, 12, dtype=torch.float64)
    wanted = torch.autograd.grad(layer(x), (x, layer.bias), g)
    for mine, theirs in zip(torch.autograd.grad(packed(x), (x, packed.bias), g), wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


def test_adapter_over_a_packed_base():
    """Fine-tuning: gradients pass through, and the base does not change."""
    base = qk.PackedLinear.from_quantized(QuantLinear(16, 16, bias=False, config=QuantConfig(2)))
    before = copy.deepcopy(base.state_dict())
    down, up = nn.Linear(16, 4), nn.Linear(4, 16)
    model = nn.Sequential(nn.Sequential(down, up), base)
    x, target = torch.randn(32, 16), torch.randn(32, 16)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(30):
        loss = (model(x) - target).square().mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.9 * losses[0]
    for name, tensor in base.state_dict().items():
        assert_same_bits(tensor, before[name])


@pytest.fixture
def packed(config):
    layer = QuantLinear(16, 12, config=config)
    return qk.PackedLinear.from_quantized(layer, scale_dtype=torch.bfloat16 if config.bits == 4 else torch.float32)


@pytest.mark.parametrize(
    "cast",
    [
        lambda m: m.bfloat16(), lambda m: m.half(), lambda m: m.double(), lambda m: m.float(),
        lambda m: m.to(torch.float16), lambda m: m.type(torch.float32), lambda m: nn.Sequential(m).bfloat16()[0],
        lambda m: m.to("cpu", torch.bfloat16), lambda m: copy.deepcopy(m), lambda m: pickle.loads(pickle.dumps(m)),
        lambda m: m.to_empty(device="cpu") and None,
    ],
)  # fmt: skip
def test_no_cast_touches_codes_and_scales(packed, cast):
    before = copy.deepcopy(packed.weight.state_dict())
    x = torch.randn(3, 16)
    y = packed(x)
    after = cast(packed)
    if after is None:
        assert {n: (t.dtype, t.shape) for n, t in packed.weight.state_dict().items()} == {
            n: (t.dtype, t.shape) for n, t in before.items()
        }
        return
    for name, tensor in after.weight.state_dict().items():
        assert_same_bits(tensor, before[name])
    assert after(x.to(after.bias.dtype)).dtype == after.bias.dtype
    if after.bias.dtype == torch.float32:
        assert_same_bits(after(x), y)


def test_it_moves_to_another_device(packed):
    moved = packed.to("meta")
    assert all(t.device.type == "meta" for t in (*moved.parameters(), *moved.buffers()))
    assert moved.weight.packed.dtype == torch.uint8
    assert moved(torch.empty(3, 16, device="meta")).shape == (3, 12)


def test_what_trains_and_what_is_saved(packed):
    assert [name for name, _ in packed.named_parameters()] == ["bias"]
    names = ["bias", "weight._extra_state", "weight.packed", "weight.scale"]
    assert sorted(packed.state_dict()) == sorted(
        [*names, *(["weight.zero_point"] if packed.weight.zero_point is not None else [])]
    )
    other = copy.deepcopy(packed)
    for tensor in other.state_dict().values():
        tensor.zero_()
    other.load_state_dict(packed.state_dict())
    x = torch.randn(2, 16)
    assert_same_bits(other(x), packed(x))


def layer_of(grid, cols=64, **kwargs):
    w = torch.randn(8, cols)
    return qk.PackedLinear(qk.PackedWeight.from_float(w, grid.init_scale(w), grid, **kwargs))


def test_a_state_of_another_layout_is_not_loaded():
    """Its tensors may have the same shapes and would be other numbers."""
    for mine, other, message in (
        (
            layer_of(grids.seq(2)), layer_of(grids.seq(2), 63),
            "seq, 2 bits, 63 columns, must be seq, 2 bits, 64 columns",
        ),
        (layer_of(grids.ternary()), layer_of(grids.seq(2)), "seq, 2 bits, 64 columns, must be ternary, 1.58 bits"),
        (layer_of(grids.seq(4)), layer_of(grids.lsq(4)), "lsq, 4 bits, 64 columns, must be seq, 4 bits"),
        (layer_of(grids.lsq(4), scale_dtype=torch.bfloat16), layer_of(grids.lsq(4)),
         r"weight\.scale is torch.float32, must be torch.bfloat16"),
    ):  # fmt: skip
        before = copy.deepcopy(mine.state_dict())
        for assign in (False, True):
            with pytest.raises(RuntimeError, match=message):
                nn.Sequential(mine).load_state_dict(nn.Sequential(other).state_dict(), assign=assign)
        for name, tensor in mine.state_dict().items():
            assert_same_bits(tensor, before[name])


def test_a_state_that_is_no_packed_weight():
    layer = layer_of(grids.lsq(4))
    for name, value, message in (
        ("weight.packed", layer.weight.packed + 0.5, r"weight\.packed is torch.float32, must be torch.uint8"),
        ("weight.packed", layer.weight.packed.to(torch.int8), r"weight\.packed is torch.int8, must be torch.uint8"),
        ("weight.packed", layer.weight.packed[:, :-1], r"size mismatch for weight\.packed"),
        ("weight._extra_state", None, r"Missing key.*weight\._extra_state"),
        ("weight._extra_state", {"cols": 64}, "the codes of weight.packed are unknown .*, must be lsq, 4 bits"),
        ("weight._extra_state", torch.zeros(3), "the codes of weight.packed are unknown .*, must be lsq, 4 bits"),
    ):
        state = layer.state_dict()
        state[name] = value
        if value is None:
            del state[name]
        with pytest.raises(RuntimeError, match=message):
            layer.load_state_dict(state)
    state = layer.state_dict()
    del state["weight._extra_state"]
    assert layer.load_state_dict(state, strict=False).missing_keys == ["weight._extra_state"]


def test_bias_hooks_and_mode_come_along():
    layer = QuantLinear(16, 12, config=QuantConfig(4)).eval()
    layer.bias.requires_grad_(False)
    handle = layer.register_forward_hook(lambda module, args, y: y + 1)
    seen = []
    layer.register_full_backward_hook(lambda module, gx, gy: seen.append(type(module)))
    packed = qk.PackedLinear.from_quantized(layer)
    assert packed.bias is layer.bias
    assert not packed.training
    x = torch.randn(2, 16, requires_grad=True)
    y = packed(x)
    y.sum().backward()
    assert seen == [qk.PackedLinear]
    handle.remove()
    torch.testing.assert_close(packed(x), y - 1)


def test_learned_activation_stays_a_module():
    layer = QuantLinear(16, 12, config=QuantConfig(4, act_bits=8, act_scheme="lsq+"))
    layer(torch.randn(4, 16))
    packed = qk.PackedLinear.from_quantized(layer)
    assert packed.act is layer.act
    assert isinstance(packed.act, LearnedActivation)
    assert packed.act_bits is None
    dynamic = qk.PackedLinear.from_quantized(QuantLinear(16, 12, config=QuantConfig(4, act_bits=6)))
    assert (dynamic.act, dynamic.act_bits) == (None, 6)


def test_repr_says_the_size():
    layer = QuantLinear(64, 10, config=QuantConfig(3, group_size=32, act_bits=8))
    text = repr(qk.PackedLinear.from_quantized(layer, scale_dtype=torch.bfloat16))
    assert "in_features=64, out_features=10, bias=True, act_bits=8" in text
    assert f"10x64, bits=3, scheme=lsq, bfloat16 scale per 32, {10 * 24 + 10 * 2 * 2} bytes" in text
    assert "float32 scale per row" in repr(qk.PackedLinear.from_quantized(QuantLinear(8, 8, config=QuantConfig(1))))


@pytest.mark.parametrize("act", ["none", "dynamic", "lsq", "bias is a buffer"])
def test_compile(act):
    layer = QuantLinear(16, 12, config=QuantConfig(2, **ACTS.get(act, {})))
    x = torch.randn(4, 16)
    calibrate(layer, x)
    packed = qk.PackedLinear.from_quantized(layer.eval())
    if act not in ACTS:
        packed = qk.PackedLinear(packed.weight, packed.bias.detach().clone())
        assert "bias" in dict(packed.named_buffers())
    torch._dynamo.reset()
    compiled = torch.compile(packed, fullgraph=True, backend="aot_eager")
    assert_same_bits(compiled(x), packed(x))
    with torch.autocast("cpu", torch.bfloat16):
        assert_same_bits(compiled(x), packed(x))


def test_a_wrong_weight_is_named():
    with pytest.raises(TypeError, match=r"weight is a tensor, torch.float32 of shape \(4, 8\), must be a PackedWeight"):
        qk.PackedLinear(torch.randn(4, 8))


def test_one_weight_serves_layers_and_functions():
    """The layer passes its weight to the op as it is, without a copy."""
    weight = layer_of(grids.lsq(4)).weight
    first, second = qk.PackedLinear(weight), qk.PackedLinear(weight, torch.ones(8))
    assert first.weight is second.weight is weight
    x = torch.randn(3, 64)
    assert_same_bits(second(x), qk.lowbit_linear(x, weight, second.bias))
    stack = qk.PackedWeight(weight.packed[None], weight.scale[None], None, weight.grid, weight.cols)
    ends = torch.tensor([2], dtype=torch.int32)
    y = qk.GroupedPackedLinear(stack)(x, ends)
    assert_same_bits(y, qk.lowbit_linear(x, stack, offsets=ends))
    assert_same_bits(y, qk.grouped_lowbit_linear(x, stack, ends))


def test_to_leaves_the_weight_itself_and_a_model_moves_it():
    layer = layer_of(grids.lsq(4))
    moved = layer.weight.to("meta", torch.bfloat16)
    assert (moved.device.type, moved.dtype, moved.packed.dtype) == ("meta", torch.bfloat16, torch.uint8)
    assert (layer.weight.device.type, layer.weight.dtype) == ("cpu", torch.float32)
    weight = layer.weight
    assert layer.to("meta").weight is weight
    assert weight.device.type == "meta"


def test_it_is_a_linear_layer_that_is_not_quantized_again():
    model = nn.Sequential(layer_of(grids.lsq(4)), nn.Linear(8, 8))
    assert isinstance(model[0], nn.Linear)
    assert (model[0].in_features, model[0].out_features) == (64, 8)
    packed = model[0]
    qk.quantize_model(model, QuantConfig(2))
    assert model[0] is packed
    assert isinstance(model[1], QuantLinear)
    with pytest.raises((TypeError, AttributeError), match="the weight of this layer is packed codes"):
        packed.reset_parameters()


def test_the_former_name_of_the_weight_still_works():
    weight = layer_of(grids.lsq(4)).weight
    with pytest.warns(DeprecationWarning, match=r"layer\.weight\.value is now layer\.weight"):
        assert weight.value is weight


def test_bad_arguments():
    weight = qk.PackedLinear.from_quantized(QuantLinear(16, 12, config=QuantConfig(4))).weight
    stack = qk.PackedWeight.from_float(torch.randn(2, 4, 8), torch.ones(2, 4), grids.lsq(4))
    for message, call in {
        "weight has shape .12, 16., must have 3": lambda: qk.GroupedPackedLinear(weight),
        "weight has shape .2, 4, 8., must have 2": lambda: qk.PackedLinear(stack),
        "bias has shape .11,., must be .12,.": lambda: qk.PackedLinear(weight, torch.zeros(11)),
        "act_bits is 9": lambda: qk.PackedLinear(weight, act_bits=9),
    }.items():
        with pytest.raises(ValueError, match=message):
            call()


def experts(count, rows, cols, grid, *, bias, group_size=None, act=None):
    """A grouped layer by its attributes, those of QuantLinear."""
    w = torch.randn(count, rows, cols) * 0.1
    scale = grid.init_scale(w, group_size)
    zero = grid.init_zero_point(w, scale, group_size) if grid.has_zero_point else None
    return SimpleNamespace(
        weight=nn.Parameter(w), scale=nn.Parameter(scale), zero_point=zero, grid=grid, group_size=group_size, act=act,
        bias=nn.Parameter(torch.randn(count, rows)) if bias else None, training=False,
    )  # fmt: skip


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_name)
@pytest.mark.parametrize("group_size", [None, 8])
@pytest.mark.parametrize("grid", [grids.seq(2), grids.affine(4)], ids=lambda g: g.scheme)
def test_grouped(grid, group_size, dtype, bias):
    layer = experts(4, 6, 16, grid, bias=bias, group_size=group_size)
    packed = qk.GroupedPackedLinear.from_quantized(layer)
    ends = [0, 3, 3, 8]
    x = torch.randn(10, 16).to(dtype).requires_grad_()
    y = packed(x, torch.tensor(ends, dtype=torch.int32))
    assert y.dtype == dtype
    w = qk.fake_quantize(layer.weight, layer.scale, grid, group_size=group_size, zero_point=layer.zero_point)
    _, bound, _ = bounds(x.detach(), packed, dtype, torch.tensor(ends))
    start, wanted = 0, torch.zeros(10, 6, dtype=torch.float64)
    for e, end in enumerate(ends):
        wanted[start:end] = x[start:end].double() @ w[e].double().T
        if bias:  # rounded once more, in the dtype, and so is the sum
            wanted[start:end] += layer.bias[e].double()
            bound[start:end] += torch.finfo(dtype).eps * (wanted[start:end].abs() + layer.bias[e].double().abs())
        start = end
    assert_within(y, wanted, bound)
    assert_same_bits(y[8:], torch.zeros(2, 6, dtype=dtype))
    y.sum().backward()
    assert x.grad[:8].abs().sum(-1).all()
    assert not x.grad[8:].any()
    if bias:
        assert_same_bits(layer.bias.grad, torch.tensor([[0.0], [3], [0], [5]]).expand(4, 6).contiguous())


def test_grouped_under_autocast_and_compiled():
    packed = qk.GroupedPackedLinear.from_quantized(experts(3, 6, 16, grids.lsq(4), bias=True))
    x, offsets = torch.randn(7, 16), torch.tensor([2, 2, 7], dtype=torch.int32)
    with torch.autocast("cpu", torch.bfloat16):
        assert packed(x, offsets).dtype == torch.bfloat16
    torch._dynamo.reset()
    assert_same_bits(torch.compile(packed, fullgraph=True, backend="aot_eager")(x, offsets), packed(x, offsets))
    assert "3x6x16" in repr(packed)


class ReadsTheWeight(nn.Module):
    """A model that multiplies by a layer's weight itself, as some do."""

    def __init__(self, multiply):
        super().__init__()
        self.block = nn.ModuleDict({"proj": nn.Linear(16, 12)})
        self.multiply = multiply

    def forward(self, x):
        return self.multiply(x, self.block["proj"].weight)


READS = {
    "linear": lambda x, w: F.linear(x, w),
    "right": lambda x, w: x @ w,
    "left": lambda x, w: w @ x.T,
    "T": lambda x, w: x @ w.T,
    "data": lambda x, w: F.linear(x, w.data),
    "listed": lambda x, w: torch.cat([x, w]),
    "some rows": lambda x, w: F.linear(x, w[:4]),
    "twice": lambda x, w: F.linear(x, 2 * w),
    "half": lambda x, w: F.linear(x, w / 2),
    "less one": lambda x, w: w - 1,
    "minus": lambda x, w: -w,
    "signs": lambda x, w: w < 0,
    "magnitudes": lambda x, w: abs(w),
}


@pytest.mark.parametrize("name", READS)
def test_a_model_that_reads_the_weight_itself_is_told_by_name(name, tmp_path):
    model = qk.pack_model(qk.quantize_model(ReadsTheWeight(READS[name]), QuantConfig(4)))
    qk.save_packed(model, tmp_path / "model.safetensors")
    loaded = qk.load_packed(tmp_path / "model.safetensors", lambda config: ReadsTheWeight(READS[name]))
    for each in (model, loaded, copy.deepcopy(model)):
        with pytest.raises(
            (TypeError, AttributeError), match=r"the weight of 'block\.proj' is packed codes.*Exclude 'block\.proj'"
        ):
            each(torch.randn(3, 16))


def test_what_the_weight_says_of_itself(tmp_path):
    model = qk.pack_model(qk.quantize_model(nn.Sequential(nn.Linear(16, 12)).bfloat16(), QuantConfig(4)))
    weight = model[0].weight
    assert (weight.dtype, weight.device.type, weight.shape) == (torch.bfloat16, "cpu", (12, 16))
    assert weight.numel() == 12 * 16
    qk.save_packed(model, tmp_path / "model.safetensors")
    loaded = qk.load_packed(tmp_path / "model.safetensors", lambda config: nn.Sequential(nn.Linear(16, 12)))
    assert loaded[0].weight.dtype == torch.bfloat16
    assert model.half()[0].weight.dtype == torch.float16
    assert model.to("meta", torch.float32)[0].weight.dtype == torch.float32
    assert weight.device.type == "meta"
    assert bool(weight), "a module is true"
    for name in ("T", "data", "is_quantized", "nothing"):  # libraries ask
        assert not hasattr(weight, name)
