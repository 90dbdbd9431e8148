"""The gradient of a large weight: its product and the backward of its quantization are one op."""

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import nn

import qatkernels as qk
from qatkernels.backends import IMPLS
from qatkernels.nn import QuantConfig, QuantLinear
from qatkernels.ops.quant_linear import LEAST, joins
from qatkernels.testing import make
from qatkernels.testing.compare import check_linear_backward
from tests.implementations import implementations
from tests.isas import TILED, using

#: Rows and columns beyond one unit of the kernel, and not whole tiles.
CALLS = [(1, (33, 3072)), (70, (300, 2055)), (33, (45, 2048)), (270, (16, 1152)), (3, (17, 1031))]
#: Groups that divide units, are divided by them, or neither.
GRANULARITIES = ["row", "tensor", 16, 32, 128, 1024, 96]
DTYPES = [(torch.float32, None), (torch.float32, torch.bfloat16), (torch.bfloat16, None), (torch.float64, None)]


def samples_of(granularity, dtype, out_dtype, device):
    for tokens, shape in CALLS:
        if isinstance(granularity, str) or shape[1] % granularity == 0:
            for grid in (qk.grids.affine(4), qk.grids.binary()):
                yield make(grid, shape, dtype, granularity=granularity, device=device, out_dtype=out_dtype), tokens


@pytest.mark.backends
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize(("dtype", "out_dtype"), DTYPES)
def test_the_rule(granularity, dtype, out_dtype):
    for _, impl, device in implementations("quant_linear_backward"):
        for sample, tokens in samples_of(granularity, dtype, out_dtype, device):
            check_linear_backward(impl, sample, tokens)


@pytest.mark.parametrize("name", TILED)
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize(("dtype", "out_dtype"), DTYPES[1:3])
def test_the_rule_by_tiles(granularity, dtype, out_dtype, name):
    with using(name):
        for sample, tokens in samples_of(granularity, dtype, out_dtype, "cpu"):
            check_linear_backward(IMPLS["quant_linear_backward_out"]["cpp"], sample, tokens)


@pytest.mark.parametrize("name", TILED)
def test_an_infinite_gradient_stays_infinite(name):
    """Also where a tile is wider than the weight."""
    sample = make(qk.grids.lsq(4), (5, 20), torch.float32)
    g, x = torch.ones(3, 5).bfloat16(), torch.ones(3, 20).bfloat16()
    g[1] = torch.inf
    with using(name.partition("+")[0]):
        _, expected, _ = torch.ops.qatkernels.quant_linear_backward(g, x, *sample.point)
    with using(name):
        _, ds, _ = torch.ops.qatkernels.quant_linear_backward(g, x, *sample.point)
    assert torch.equal(ds.isnan(), expected.isnan())
    assert torch.equal(ds.isinf(), expected.isinf())


@pytest.mark.parametrize("name", TILED)
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_tiles_give_the_same_bits_for_any_number_of_threads(name, threads):
    sample = make(qk.grids.lsq(3), (1100, 1120), torch.bfloat16)
    g, x = torch.randn(40, 1100).bfloat16(), torch.randn(40, 1120).bfloat16()
    before = torch.get_num_threads()
    with using(name):
        found = torch.ops.qatkernels.quant_linear_backward(g, x, *sample.point)
        try:
            torch.set_num_threads(threads)
            again = torch.ops.qatkernels.quant_linear_backward(g, x, *sample.point)
        finally:
            torch.set_num_threads(before)
    for first, second in zip(found, again, strict=True):
        assert torch.equal(first, second)


def layers(bias=True, dtype=torch.float32, **config):
    """Return two equal layers that are large enough."""
    torch.manual_seed(0)
    linear = nn.Linear(640, LEAST // 640 + 8, bias=bias, dtype=dtype)
    return [QuantLinear.from_linear(linear, QuantConfig(**{"bits": 3, **config})) for _ in range(2)]


def apart(layer, x):
    """Return the output from two nodes of the graph, as small layers compute it."""
    dtype = torch.bfloat16 if torch.is_autocast_enabled("cpu") and layer.weight.dtype == torch.float32 else None
    return F.linear(x, layer._forward_weight(dtype), layer.bias)


def gradients(y, layer, x):
    g = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype)
    leaves = [x, *layer.parameters()]
    return torch.autograd.grad(y, leaves, g)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("config", [{}, {"bits": 4, "scheme": "affine", "group_size": 32}, {"bits": 1}], ids=str)
def test_a_layer_has_the_gradients_of_its_parts(config, dtype, autocast):
    first, second = layers(dtype=dtype, **config)
    x = torch.randn(2, 9, 640, dtype=dtype).requires_grad_()
    with torch.autocast("cpu", enabled=autocast):
        y, expected = first(x), apart(second, x)
    if dtype != torch.float64:  # which autocast leaves alone
        assert type(y.grad_fn.next_functions[0][0]).__name__ == "JoinedLinearBackward"
    torch.testing.assert_close(y, expected)
    # Tiles do not round the product to bfloat16 in between.
    tolerance = {"rtol": 1e-2, "atol": 1e-2} if y.dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-5}
    for a, b in zip(gradients(y, first, x), gradients(expected, second, x), strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, **tolerance, msg=lambda m, a=a: f"{tuple(a.shape)}: {m}")


def test_noise_is_that_of_its_seed():
    first, second = layers()
    for layer in (first, second):
        layer.quantizer.set_noise(0.01, 0.001)
    x = torch.randn(5, 640).requires_grad_()
    torch.manual_seed(3)
    y = first(x)
    torch.manual_seed(3)
    expected = apart(second, x)
    torch.testing.assert_close(y, expected)
    for a, b in zip(gradients(y, first, x), gradients(expected, second, x), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_second_derivatives():
    first, second = layers(bias=False, dtype=torch.float64)
    x = torch.randn(3, 640, dtype=torch.float64).requires_grad_()
    found = []
    for layer, forward in ((first, QuantLinear.forward), (second, apart)):
        grads = torch.autograd.grad(forward(layer, x).square().sum(), [x, layer.weight, layer.scale], create_graph=True)
        found.append(torch.autograd.grad(sum(g.square().sum() for g in grads), [x, layer.weight, layer.scale]))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_only_what_is_asked_for():
    layer, _ = layers()
    layer.weight.requires_grad_(False)
    layer.scale.requires_grad_(False)
    assert layer(torch.randn(2, 640)).grad_fn is not None  # the bias is trained
    layer, _ = layers()
    layer(torch.randn(2, 640)).sum().backward()  # x needs no gradient
    assert layer.weight.grad is not None
    assert layer.bias.grad is not None


def test_flops_are_counted():
    from torch.utils.flop_counter import FlopCounterMode

    layer, _ = layers(bias=False)
    with FlopCounterMode(display=False) as counted:
        layer(torch.randn(4, 640).requires_grad_()).sum().backward()
    assert counted.get_total_flops() == 3 * 2 * 4 * layer.weight.numel()


@pytest.mark.parametrize("needs_x", [False, True])
def test_the_quantized_weight_is_kept_for_the_gradient_of_x_only(needs_x):
    layer, _ = layers(bias=False)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        layer(torch.randn(4, 640).requires_grad_(needs_x))
    assert kept.count(layer.weight.shape) == 1 + needs_x


def takes(x, layer=None, **changes):
    layer = layer or layers()[0]
    given = {"x": x, "bias": layer.bias, "w": layer.weight, "dtype": None, **changes}
    return joins(*given.values())


def test_other_calls_are_left_to_linear():
    layer, _ = layers()
    x = torch.randn(4, 640)
    assert takes(x)
    assert takes(x, bias=None)
    nested = torch.nested.nested_tensor([x, x])
    for other in (x.to_sparse(), nested, torch.randn(640)[0], x.bfloat16(), x.to("meta")):
        assert not takes(other), other.layout
    assert not takes(x, bias=layer.bias.bfloat16())
    assert not takes(x, w=layer.weight.data)
    with torch.no_grad():
        assert not takes(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert takes(x, dtype=torch.bfloat16)
        assert not takes(x, dtype=torch.bfloat16, bias=layer.bias.double())
    with torch.autograd.forward_ad.dual_level():
        assert not takes(x)
    assert torch.func.vmap(lambda t: t.sum() * takes(t, layer))(x[None]).item() == 0


def test_sparse_inputs_are_those_of_linear():
    layer, other = layers()
    x = torch.randn(4, 640)
    torch.testing.assert_close(layer(x.to_sparse()), apart(other, x))


def test_checkpoint_and_functional_call():
    first, second = layers()
    x = torch.randn(3, 640).requires_grad_()
    expected = gradients(apart(second, x), second, x)
    checkpointed = torch.utils.checkpoint.checkpoint(first, x, use_reentrant=False)
    called = torch.func.functional_call(first, dict(first.named_parameters()), (x,))
    for y in (checkpointed, called):
        for a, b in zip(gradients(y, first, x), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_a_weight_that_was_changed_is_refused():
    layer, _ = layers()
    y = layer(torch.randn(3, 640))
    with torch.no_grad():
        layer.weight.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
