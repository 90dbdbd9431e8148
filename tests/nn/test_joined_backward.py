"""The gradient of a large weight: its product and the backward of its quantization are one op."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import qatkernels as qk
from qatkernels.nn import QuantConfig, QuantLinear
from qatkernels.ops.quant_linear import LEAST
from qatkernels.testing import make
from qatkernels.testing.compare import check_linear_backward
from tests.implementations import implementations
from tests.isas import TILED, using


@pytest.mark.backends
@pytest.mark.parametrize("granularity", ["row", "tensor", 16, 32, 128, 1024, 96])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_rule(granularity, dtype):
    """Rows and columns beyond one unit of the kernel, and groups that divide units, are divided by them, or neither."""
    for _, impl, device in implementations("quant_linear_backward"):
        for tokens, shape in ((1, (33, 3072)), (70, (300, 3072)), (270, (16, 1152))):
            if isinstance(granularity, int) and shape[1] % granularity:
                continue
            for grid in (qk.grids.affine(4), qk.grids.binary()):
                sample = make(grid, shape, dtype, granularity=granularity, device=device)
                check_linear_backward(impl, sample, tokens)


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
        assert type(y.grad_fn.next_functions[0][0]).__name__ == "QuantLinearBackward"
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
