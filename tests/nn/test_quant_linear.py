import copy
import io
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, hessian
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from qatkernels.nn import QuantConfig, QuantLinear
from qatkernels.ops import dequantize, fake_quantize_dynamic, normal
from qatkernels.testing.compare import assert_same_bits


def grads(module):
    return {name: p.grad for name, p in module.named_parameters()}


def backward(module, x, seed=0):
    """Run forward and backward with a gradient that is not all ones; return the output."""
    torch.manual_seed(seed)
    y = module(x)
    (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)).sum().backward()
    return y


# The formulas of docs/algorithms.md, one by one and not through the library: r -> (y / s, pass mask, d y / d s).
def _binary(r):
    q = torch.where(r < 0, -1.0, 1.0)
    return q, r.abs() <= 1, q


def _ternary(r):
    q = torch.round(r.clamp(-0.99, 0.99) * 1.5) / 1.5
    inside = r.abs() <= 0.99
    return q, inside, torch.where(inside, q - r, r.sign())


def _seq2(r):
    q = (torch.round(r.clamp(-0.99, 0.99) * 2 - 0.5) + 0.5) / 2
    inside = r.abs() <= 0.99
    return q, inside, torch.where(inside, q - r, 0.75 * r.sign())


def _lsq(bits):
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1

    def rule(r):
        inside = (r >= low) & (r <= high)
        return r.clamp(low, high).round(), inside, torch.where(inside, r.round() - r, r.clamp(low, high))

    return rule


RULES = {1: (_binary, 1), 1.58: (_ternary, 1), 2: (_seq2, 1), 3: (_lsq(3), 3), 4: (_lsq(4), 7)}


class TestGradients:
    @pytest.mark.parametrize("bits", RULES)
    @pytest.mark.parametrize(
        "granularity", [{}, {"group_size": 8}, {"per_tensor": True}], ids=["row", "group", "tensor"]
    )
    def test_equal_the_formula(self, bits, granularity):
        layer = QuantLinear(16, 12, config=QuantConfig(bits, **granularity))
        with torch.no_grad():
            layer.scale.mul_(0.6)  # so that some weights saturate
        x = torch.randn(5, 16, requires_grad=True)
        y = backward(layer, x)

        rule, qmax = RULES[bits]
        w, s = layer.weight.detach(), layer.scale.detach()
        blocks = w.view(s.numel(), -1)
        q, inside, slope = rule(blocks / s.view(-1, 1))
        weight = (q * s.view(-1, 1)).view_as(w)
        torch.testing.assert_close(y, x @ weight.T + layer.bias)

        g = torch.linspace(-1, 1, y.numel()).view(y.shape)
        upstream = g.T @ x
        torch.testing.assert_close(layer.weight.grad, torch.where(inside.view_as(w), upstream, 0.0))
        ds = (upstream.view_as(blocks) * slope).sum(1) / (w.numel() * qmax) ** 0.5
        torch.testing.assert_close(layer.scale.grad, ds.view_as(s).detach())
        torch.testing.assert_close(layer.bias.grad, g.sum(0))
        torch.testing.assert_close(x.grad, g @ weight)
        assert not inside.all()
        assert inside.any()

    def test_of_the_zero_point(self):
        layer = QuantLinear(16, 12, config=QuantConfig(3, "affine"))
        with torch.no_grad():
            layer.scale.mul_(0.6)
        x = torch.randn(5, 16)
        y = backward(layer, x)
        w, s, z = layer.weight.detach(), layer.scale.detach().view(-1, 1), layer.zero_point.detach().view(-1, 1)
        r = w / s
        outside = (r < -z) | (r > 7 - z)
        upstream = torch.linspace(-1, 1, y.numel()).view(y.shape).T @ x
        dz = (upstream * torch.where(outside, -s, 0.0)).sum(1) / (w.numel() * 7) ** 0.5
        assert outside.any()
        torch.testing.assert_close(layer.zero_point.grad, dz)

    def test_hessian(self):
        layer = QuantLinear(4, 3, bias=False, config=QuantConfig(2))
        with torch.no_grad():
            layer.scale.mul_(0.6)
        x = torch.randn(6, 4)

        def loss(weight):
            return functional_call(layer, {"weight": weight}, (x,)).square().sum() / 2

        mask = (layer.weight / layer.scale.view(-1, 1)).abs().le(0.99).float().detach()
        expected = torch.einsum("ab,ij,ai,bj->aibj", torch.eye(3), x.T @ x, mask, mask)
        assert 0 < mask.sum() < mask.numel()
        torch.testing.assert_close(hessian(loss)(layer.weight.detach()), expected)

    def test_pass_through_a_saturated_model_without_nan(self, config):
        layer = QuantLinear(16, 12, config=config)
        with torch.no_grad():
            layer.weight.zero_()
        layer.reset_scale()
        assert backward(layer, torch.randn(3, 16)).isfinite().all()
        assert all(g.isfinite().all() for g in grads(layer).values())


class TestForward:
    def test_quantizes_the_weight(self, layer):
        x = torch.randn(2, 3, 16)
        assert_same_bits(layer(x), F.linear(x, layer.quantized_weight(), layer.bias))
        levels = layer.grid.levels
        rows = layer.quantized_weight().detach().view(layer.scale.numel(), -1)
        assert all(len(row.unique()) <= levels for row in rows)

    def test_codes_give_the_weight_back(self, layer):
        codes = layer.codes()
        assert codes.min() >= layer.grid.code_min
        assert codes.max() <= layer.grid.code_max
        again = dequantize(codes, layer.scale, layer.grid, group_size=layer.group_size, zero_point=layer.zero_point)
        assert_same_bits(again, layer.quantized_weight())

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
    def test_dtypes(self, layer, dtype):
        layer.to(dtype)
        assert layer(torch.randn(2, 16, dtype=dtype)).dtype == dtype
        backward(layer, torch.randn(2, 16, dtype=dtype))
        assert layer.weight.grad.dtype == dtype
        assert layer.scale.grad.dtype == torch.float32

    def test_shapes_of_scales(self):
        shapes = {"row": {}, "group": {"group_size": 4}, "tensor": {"per_tensor": True}}
        got = {k: tuple(QuantLinear(16, 12, config=QuantConfig(2, **v)).scale.shape) for k, v in shapes.items()}
        assert got == {"row": (12,), "group": (12, 4), "tensor": (1,)}

    def test_scales_are_float32_for_a_float64_weight(self, config):
        assert QuantLinear(16, 4, config=config, dtype=torch.float64).scale.dtype == torch.float32

    def test_reset_parameters_sets_the_scales(self, layer):
        before = layer.scale.clone()
        layer.reset_parameters()
        fresh = QuantLinear.from_linear(layer.to_linear(), layer.config)
        fresh.weight = layer.weight
        fresh.reset_scale()
        assert not torch.equal(layer.scale, before)
        assert_same_bits(layer.scale, fresh.scale)

    def test_repr(self):
        text = repr(QuantLinear(16, 12, bias=False, config=QuantConfig(4, group_size=8, act_bits=8)))
        assert "in_features=16, out_features=12, bias=False, bits=4, scheme=lsq, group_size=8" in text
        assert "DynamicActivation(bits=8)" in text


class CountCasts(TorchDispatchMode):
    """Counts casts of tensors of one shape."""

    def __init__(self, shape):
        super().__init__()
        self.shape, self.casts = shape, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.casts += func is torch.ops.aten._to_copy.default and args[0].shape == self.shape
        return func(*args, **(kwargs or {}))


class TestAutocast:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_rounds_the_quantized_weight_once(self, layer, dtype):
        layer.bias = None
        with torch.autocast("cpu", dtype):
            y = layer(torch.eye(16, dtype=dtype))
        assert y.dtype == dtype
        assert_same_bits(y, layer.quantized_weight().to(dtype).T)

    def test_has_no_cast_of_its_own(self, layer):
        with torch.autocast("cpu", torch.bfloat16), CountCasts(layer.weight.shape) as count:
            layer(torch.randn(3, 16, dtype=torch.bfloat16))
        assert count.casts == 0

    def test_gradients_are_float32(self, layer):
        with torch.autocast("cpu", torch.bfloat16):
            y = layer(torch.randn(3, 16))
        y.float().square().sum().backward()
        assert {g.dtype for g in grads(layer).values()} == {torch.float32}
        assert layer.scale.grad.abs().sum() > 0

    def test_leaves_other_dtypes_alone(self, layer):
        layer.double()
        with torch.autocast("cpu", torch.bfloat16):
            assert layer(torch.randn(3, 16, dtype=torch.float64)).dtype == torch.float64


class TestNoise:
    def test_is_what_was_asked_for_and_only_in_training(self):
        layer = QuantLinear(16, 12, bias=False, config=QuantConfig(2))
        layer.quantizer.set_noise(0.3, 0.05)
        eye = torch.eye(16)
        torch.manual_seed(5)
        noisy = layer(eye).T
        torch.manual_seed(5)
        seed = torch.randint(2**63 - 1, (), dtype=torch.int64)
        w = layer.weight + 0.3 * normal(seed, layer.weight.numel()).view_as(layer.weight)
        s = (layer.scale + 0.05 * normal(seed, 12, stream=1)).clamp_min(1e-5).view(-1, 1)
        torch.testing.assert_close(noisy, _seq2(w / s)[0] * s)
        assert not torch.equal(noisy, layer(eye).T)
        assert_same_bits(layer.eval()(eye).T, layer.quantized_weight())

    @pytest.mark.parametrize("reentrant", [False, True])
    def test_is_drawn_again_by_checkpointing(self, mlp, reentrant):
        model = nn.Sequential(*(QuantLinear.from_linear(m, QuantConfig(2)) for m in (mlp[0], mlp[2])))
        for module in model:
            module.quantizer.set_noise(0.1, 0.1)
        x = torch.randn(5, 16, requires_grad=True)
        y = backward(model, x)
        expected = [x.grad, *grads(model).values()]
        model.zero_grad()
        x.grad = None
        other = backward(lambda t: checkpoint(model, t, use_reentrant=reentrant), x)
        assert_same_bits(other, y)
        for actual, wanted in zip([x.grad, *grads(model).values()], expected, strict=True):
            assert_same_bits(actual, wanted)

    def test_is_not_saved(self, layer):
        assert set(layer.state_dict()) <= {"weight", "bias", "scale", "zero_point", "_extra_state"}


class TestCasts:
    def cast(self, layer, how):
        layer.scale.grad = torch.rand_like(layer.scale)
        kept = {n: p.clone() for n, p in layer.named_parameters() if n in ("scale", "zero_point")}
        how(layer)
        for name, value in kept.items():
            assert_same_bits(getattr(layer, name), value, name)
        return layer

    @pytest.mark.parametrize("name", ["bfloat16", "half", "double", "float"])
    def test_keep_the_bits_of_scales(self, layer, name):
        grad = self.cast(layer, lambda m: getattr(m, name)()).scale.grad
        assert grad.dtype == torch.float32
        assert layer.weight.dtype == {"bfloat16": torch.bfloat16, "half": torch.float16, "double": torch.float64}.get(
            name, torch.float32
        )

    def test_in_one_go_with_the_device(self, layer):
        layer.to("meta", torch.bfloat16)
        assert (layer.scale.device.type, layer.scale.dtype) == ("meta", torch.float32)
        assert (layer.weight.device.type, layer.weight.dtype) == ("meta", torch.bfloat16)

    def test_of_a_whole_model_and_with_swapped_tensors(self, layer):
        torch.__future__.set_swap_module_params_on_conversion(True)
        try:
            self.cast(layer, lambda m: nn.Sequential(m).bfloat16())
        finally:
            torch.__future__.set_swap_module_params_on_conversion(False)


class TestWarningOfCasts:
    def count(self, layer, dtype):
        with torch.no_grad():
            rounded = copy.deepcopy(layer)
            rounded.weight.copy_(layer.weight.to(dtype))
        return (rounded.codes() != layer.codes()).sum().item(), layer.weight.numel()

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
    def test_counts_the_codes_that_change(self, dtype):
        layer = QuantLinear(128, 64, config=QuantConfig(4))
        changed, total = self.count(layer, dtype)
        assert changed > 0
        with pytest.warns(UserWarning, match=f"the cast to {dtype} changed {changed} of the {total} codes"):
            layer.to(dtype)

    def test_once_for_a_model_and_again_for_the_next(self):
        for _ in range(2):
            model = nn.Sequential(*(QuantLinear(128, 128, config=QuantConfig(4)) for _ in range(3)))
            with pytest.warns(UserWarning, match="use torch.autocast, or pack_model first") as said:
                model.bfloat16()
            assert len(said) == 1

    def test_not_where_no_code_changes(self, layer):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for cast in ("double", "float", "cpu"):
                getattr(layer, cast)()
            layer.to("meta").bfloat16()
            exact = QuantLinear(16, 12, config=QuantConfig(2))
            with torch.no_grad():
                exact.weight.copy_(exact.weight.bfloat16())
            exact.bfloat16().float()
            QuantLinear(128, 64, config=QuantConfig(1)).bfloat16()  # the sign of a weight stays


class TestSaving:
    @pytest.fixture(
        params=[QuantConfig(3), QuantConfig(4, "affine", act_bits=4, act_scheme="lsq+", out_bits=8)], ids=["w3", "w4a4"]
    )
    def trained(self, request):
        layer = QuantLinear(16, 12, config=request.param)
        backward(layer, torch.randn(5, 16))
        with torch.no_grad():
            for p in layer.parameters():
                p.add_(0.01 * torch.rand_like(p))
        return layer

    def same(self, a, b):
        assert a.state_dict().keys() == b.state_dict().keys()
        for name, value in a.state_dict().items():
            assert_same_bits(b.state_dict()[name], value, name)
        x = torch.randn(3, 16)
        assert_same_bits(a.eval()(x), b.eval()(x))

    def test_state_dict(self, trained):
        buffer = io.BytesIO()
        torch.save(trained.state_dict(), buffer)
        buffer.seek(0)
        other = QuantLinear(16, 12, config=trained.config)
        other.load_state_dict(torch.load(buffer, weights_only=True))
        self.same(trained, other)

    def test_into_a_meta_model_by_assignment(self, trained):
        with torch.device("meta"):
            other = QuantLinear(16, 12, config=trained.config)
        assert all(t.is_meta for t in other.state_dict().values())
        other.load_state_dict(trained.state_dict(), assign=True)
        self.same(trained, other)

    def test_into_an_emptied_meta_model(self, trained):
        other = QuantLinear(16, 12, config=trained.config, device="meta").to_empty(device="cpu")
        other.load_state_dict(trained.state_dict())
        self.same(trained, other)

    @pytest.mark.parametrize(
        "how", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"]
    )
    def test_copies(self, trained, how):
        other = how(trained)
        assert other.weight.data_ptr() != trained.weight.data_ptr()
        assert other.config == trained.config
        self.same(trained, other)

    def test_meta_initialization_by_reset_parameters(self):
        config = QuantConfig(4, act_bits=4, act_scheme="lsq")
        layer = QuantLinear(16, 12, config=config, device="meta").to_empty(device="cpu")
        for module in layer.modules():
            module.reset_parameters()
        assert not layer.act.initialized
        assert backward(layer, torch.randn(3, 16)).isfinite().all()


class TestCompile:
    @pytest.mark.parametrize("noise", [0.0, 0.1])
    def test_without_graph_breaks_equals_eager(self, layer, noise):
        layer.quantizer.set_noise(noise, 0.0)
        self.compare(layer, torch.randn(5, 16))

    @pytest.mark.parametrize(
        "config",
        [
            QuantConfig(4, act_bits=8),
            QuantConfig(4, act_bits=4, act_scheme="lsq"),
            QuantConfig(4, act_bits=4, act_scheme="lsq+"),
            QuantConfig(4, act_bits=4, act_scheme="lsq", out_bits=4),
        ],
        ids=["dynamic", "lsq", "lsq+", "outputs"],
    )
    def test_with_activations_also_in_the_first_batch(self, config):
        self.compare(QuantLinear(16, 12, config=config), torch.randn(5, 16))

    def test_under_autocast(self):
        with torch.autocast("cpu", torch.bfloat16):
            y = self.compare(QuantLinear(16, 12, config=QuantConfig(2)), torch.randn(5, 16))
        assert y.dtype == torch.bfloat16

    def compare(self, layer, x):
        torch._dynamo.reset()
        other = copy.deepcopy(layer)
        compiled = torch.compile(other, fullgraph=True, backend="aot_eager")
        for _ in range(2):
            x = x.detach().clone().requires_grad_()
            twin = x.detach().clone().requires_grad_()
            y = backward(layer, x)
            assert_same_bits(backward(compiled, twin), y)
            assert_same_bits(twin.grad, x.grad)
            for name, grad in grads(layer).items():
                assert_same_bits(grads(other)[name], grad, name)
        return y


class TestFromAndToLinear:
    def test_keeps_the_parameters(self, config):
        linear = nn.Linear(16, 12).bfloat16().eval()
        linear.weight.requires_grad_(False)
        layer = QuantLinear.from_linear(linear, config)
        assert layer.weight is linear.weight
        assert layer.bias is linear.bias
        assert not layer.training
        assert not layer.scale.requires_grad
        assert isinstance(layer, nn.Linear)
        assert (layer.in_features, layer.out_features) == (16, 12)
        assert set(linear._parameters) == {"weight", "bias"}

    def test_without_bias(self, config):
        layer = QuantLinear.from_linear(nn.Linear(16, 12, bias=False), config)
        assert layer.bias is None
        assert layer.to_linear().bias is None

    def test_to_linear_computes_the_same(self, layer):
        linear, x = layer.to_linear(), torch.randn(3, 16)
        assert type(linear) is nn.Linear
        assert_same_bits(linear(x), layer(x))
        assert linear.weight.requires_grad
        assert linear.weight.is_leaf
        assert linear.bias is layer.bias

    def test_to_linear_refuses_activations(self):
        with pytest.raises(ValueError, match="act_bits is 8, must be None"):
            QuantLinear(16, 12, config=QuantConfig(2, act_bits=8)).to_linear()
        with pytest.raises(ValueError, match=r"out_bits is 8, must be None: .* does not quantize its output"):
            QuantLinear(16, 12, config=QuantConfig(2, out_bits=8)).to_linear()

    def test_errors(self):
        with pytest.raises(ValueError, match="config is 2, must be a QuantConfig"):
            QuantLinear(16, 12, config=2)
        with pytest.raises(
            ValueError, match=r"group_size is 5, must be a positive divisor of the input features \(16\)"
        ):
            QuantLinear(16, 12, config=QuantConfig(2, group_size=5))


def test_dynamic_activations():
    layer = QuantLinear(16, 12, config=QuantConfig(4, act_bits=8))
    x = torch.randn(2, 3, 16)
    assert_same_bits(layer(x), F.linear(fake_quantize_dynamic(x, 8), layer.quantized_weight(), layer.bias))


@pytest.mark.parametrize("name", ["noise_std", "scale_noise_std", "perturbation"])
def test_what_belongs_to_the_quantizer_cannot_be_assigned_to_the_layer(name):
    layer = QuantLinear(4, 4, config=QuantConfig(2))
    with pytest.raises(AttributeError, match=rf"{name} cannot be assigned to a layer: use layer\.quantizer\."):
        setattr(layer, name, 0.1)


class TestAssigned:
    """Values assigned to a layer are checked in the forward. The op alone would compute something else with them."""

    def test_scales_of_another_granularity(self):
        layer = QuantLinear(16, 12, config=QuantConfig(4, group_size=8))
        layer.scale = nn.Parameter(torch.ones(24))
        with pytest.raises(ValueError, match=r"scale has shape \(24,\), must be \(12, 2\) for group_size 8"):
            layer(torch.randn(2, 16))

    def test_a_zero_point_of_a_grid_without_one(self):
        layer = QuantLinear(16, 12, config=QuantConfig(4))
        layer.zero_point = nn.Parameter(torch.ones(12))
        with pytest.raises(ValueError, match="zero_point is given, but scheme 'lsq' has none"):
            layer(torch.randn(2, 16))

    def test_noise_that_is_not_finite(self):
        layer = QuantLinear(16, 12, config=QuantConfig(4))
        layer.quantizer.set_noise(float("inf"), 0.0)
        with pytest.raises(ValueError, match=r"noise_std is inf and scale_noise_std is 0\.0, must be finite"):
            layer(torch.randn(2, 16))
