"""Forward mode through QuantLinear: value and tangent come from one call if no backward follows."""

import copy

import pytest
import torch
import torch.autograd.forward_ad as fwad
import torch.nn.functional as F
from torch.func import functional_call, grad, hessian, jvp, vmap
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode

import qatkernels as qk
from qatkernels.nn import QuantConfig, QuantLinear
from qatkernels.ops import quant_linear_dual
from qatkernels.testing.compare import assert_same_bits, check_linear_dual
from qatkernels.testing.samples import make
from tests.implementations import implementations, samples_on

CONFIGS = {
    "row": QuantConfig(2),
    "group": QuantConfig(4, group_size=8),
    "tensor": QuantConfig(3, per_tensor=True),
    "affine": QuantConfig(4, "affine", group_size=4),
}


def unfused(layer):
    """The layer, computed from separate ops."""

    class Plain(QuantLinear):
        def forward(self, x):
            noise = (self.quantizer.noise_std, self.quantizer.scale_noise_std) if self.training else (0.0, 0.0)
            return F.linear(x, self.quantizer.plain(self.weight, self.scale, self.zero_point, None, noise), self.bias)

    other = copy.deepcopy(layer)
    other.__class__ = Plain
    return other


def make_layer(name, dtype=torch.float64):
    torch.manual_seed(0)
    layer = QuantLinear(16, 12, config=CONFIGS[name], dtype=dtype)
    with torch.no_grad():
        layer.scale.mul_(0.6)
    return layer


def push(layer, x, which, function=None):
    """Tangents along the named parameters and, if named, the input; returns (y, dy)."""
    parameters = {k: p.detach() for k, p in layer.named_parameters()}
    torch.manual_seed(1)
    along = {k: torch.randn_like(p) if k in which else torch.zeros_like(p) for k, p in parameters.items()}
    tangent = torch.randn_like(x) if "x" in which else torch.zeros_like(x)
    torch.manual_seed(2)
    call = function or (lambda p, x: functional_call(layer, p, (x,)))
    return jvp(call, (parameters, x), (along, tangent))


class Fused(TorchDispatchMode):
    """Counts the calls of the fused op."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.qatkernels.quant_linear_dual.default
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "which", [{"weight"}, {"x"}, {"weight", "x"}, {"scale"}, {"weight", "scale", "zero_point", "bias", "x"}]
)
@pytest.mark.parametrize("noise", [0.0, 0.05])
@pytest.mark.parametrize("name", CONFIGS)
def test_equals_the_parts(name, noise, which):
    layer = make_layer(name)
    layer.quantizer.set_noise(noise, noise)
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    with Fused() as fused:
        found = push(layer, x, which)
    torch.testing.assert_close(found, push(unfused(layer), x, which))
    assert fused.count


def test_in_eager_forward_mode():
    layer = make_layer("affine")
    x, v, u = (torch.randn(s, dtype=torch.float64) for s in ((5, 16), (12, 16), (5, 16)))

    def run(layer):
        with torch.no_grad(), fwad.dual_level():
            weight = fwad.make_dual(layer.weight.detach(), v)
            return fwad.unpack_dual(functional_call(layer, {"weight": weight}, (fwad.make_dual(x, u),)))

    with Fused() as fused:
        found = run(layer)
    for a, e in zip(found, run(unfused(layer)), strict=True):
        torch.testing.assert_close(a, e)
    assert fused.count


def test_a_layer_without_tangents_is_a_layer():
    layer, x = make_layer("row"), torch.randn(3, 16, dtype=torch.float64)
    with torch.no_grad(), fwad.dual_level():
        with Fused() as fused:
            y = layer(x)
        assert_same_bits(y, unfused(layer)(x))
    assert not fused.count


@pytest.mark.parametrize("name", CONFIGS)
def test_derivatives_around_and_inside(name):
    """Under grad, in grad, in a second jvp and in vmap: the results of the other levels are right."""
    layer = make_layer(name)
    x = torch.randn(3, 16, dtype=torch.float64)
    w = layer.weight.detach()
    v, many = torch.randn_like(w), torch.randn(3, *w.shape, dtype=torch.float64)

    def results(layer):
        def loss(w):
            return functional_call(layer, {"weight": w}, (x,)).square().sum().log()

        def along(w):
            return jvp(loss, (w,), (v,))[1]

        leaf = w.clone().requires_grad_()
        with fwad.dual_level():
            (g,) = torch.autograd.grad(loss(fwad.make_dual(leaf, v)), leaf)
            eager = fwad.unpack_dual(g).tangent
        return {
            "forward over reverse": jvp(grad(loss), (w,), (v,))[1],
            "eager forward over reverse": eager,
            "reverse over forward": grad(along)(w),
            "forward over forward": jvp(along, (w,), (v,))[1],
            "vmap": vmap(lambda v: jvp(loss, (w,), (v,))[1])(many),
            "hessian": hessian(loss)(w),
        }

    ours, parts = results(layer), results(unfused(layer))
    for key, value in ours.items():
        torch.testing.assert_close(value, parts[key], msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.backends
@pytest.mark.parametrize("transposed", [False, True])
def test_backends(transposed):
    for _, impl, device in implementations("quant_linear_dual"):
        for sample in samples_on(device):
            if sample.w.ndim == 2:
                check_linear_dual(impl, sample, 3, transposed)


@pytest.mark.backends
@pytest.mark.parametrize("granularity", ["row", "tensor", 32])
def test_weights_of_many_blocks(granularity):
    """More rows than a block holds: kernels start in the middle of the weight, of its scales and of its noise."""
    for shape in ((4400, 1056), (40, 20_000)):
        for _, impl, device in implementations("quant_linear_dual"):
            sample = make(qk.grids.affine(4), shape, granularity=granularity, device=device, noise=True)
            check_linear_dual(impl, sample, 2, False)


def test_opcheck():
    sample = make(qk.grids.affine(4), (6, 16), granularity=8)
    for transposed in (False, True):
        x = torch.randn(3, 6 if transposed else 16)
        args = (x, torch.randn_like(x), *sample.tangents(), *sample.point, transposed)
        args = [
            a.clone().requires_grad_() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in args
        ]
        opcheck(torch.ops.qatkernels.quant_linear_dual.default, tuple(args))


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({0: torch.randn(3, 15)}, r"x has shape \(3, 15\)|x has shape \[3, 15\]"),
        ({0: torch.randn(3, 16).double()}, r"is torch.float64|must be"),
        ({1: torch.randn(2, 16)}, r"tangent_x has shape \(2, 16\), must be \(3, 16\)"),
        ({2: torch.randn(6, 15)}, r"tangent_w has shape \(6, 15\), must be \(6, 16\)"),
    ],
)
def test_errors(changed, words):
    sample = make(qk.grids.lsq(4), (6, 16))
    args = [torch.randn(3, 16), None, sample.tangents()[0], None, None, *sample.point, False]
    for i, value in changed.items():
        args[i] = value
    for device in ("cpu", "meta"):
        moved = [a.to(device) if isinstance(a, torch.Tensor) else a for a in args]
        with pytest.raises(RuntimeError, match=words):
            torch.ops.qatkernels.quant_linear_dual(*moved)


def test_double_backward_is_the_dual():
    """Cotangents (u, U) of the gradients of x and w: the gradient of g is the tangent along (u, U)."""
    sample = make(qk.grids.lsq(4), (6, 16), torch.float64)
    x, u = torch.randn(2, 3, 16, dtype=torch.float64)
    g, v = torch.randn(3, 6, dtype=torch.float64), sample.tangents()[0]
    leaves = [t.clone().requires_grad_() for t in (x, sample.w, g)]
    y = leaves[0] @ qk.fake_quantize(leaves[1], sample.scale, sample.grid).t()
    first = torch.autograd.grad(y, leaves[:2], leaves[2], create_graph=True)
    of_x, of_g = torch.autograd.grad(first, (leaves[0], leaves[2]), (u, v))
    layer = (sample.w, sample.scale, sample.grid)
    torch.testing.assert_close(of_g, quant_linear_dual(x, *layer, tangent_x=u, tangent_w=v)[1])
    torch.testing.assert_close(of_x, quant_linear_dual(g, *layer, tangent_w=v, transposed=True)[1])
