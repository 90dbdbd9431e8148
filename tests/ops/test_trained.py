"""Ops with gradients in C++: the same bits as their autograd Functions, and the same behaviour."""

import pytest
import torch

import qatkernels as qk
from qatkernels.ops._op import OPS
from qatkernels.testing.compare import assert_same_bits
from qatkernels.testing.samples import make

OP = OPS["fake_quantize"]
pytestmark = pytest.mark.skipif(OP.trained is None, reason="needs the compiled extension")


def inputs(scheme="affine", noise=True, dtype=torch.float32):
    grid = {"affine": qk.grids.affine(4), "lsq": qk.grids.lsq(4), "binary": qk.grids.binary()}[scheme]
    args = list(make(grid, (6, 48), dtype, 16, noise=noise).args("fake_quantize"))
    for i in range(3):
        if args[i] is not None:
            args[i] = args[i].clone().requires_grad_()
    return args


def gradients(call, args, g, **options):
    leaves = [t for t in args[:3] if t is not None]
    return torch.autograd.grad(call(*args), leaves, g, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("noise", [False, True])
@pytest.mark.parametrize("scheme", ["affine", "lsq", "binary"])
def test_the_same_bits_as_the_function(scheme, noise, dtype):
    args = inputs(scheme, noise, dtype)
    assert_same_bits(OP.trained(*args), OP.function.apply(*args))
    g = torch.randn_like(args[0])
    for mine, right in zip(gradients(OP.trained, args, g), gradients(OP.function.apply, args, g), strict=True):
        assert_same_bits(mine, right)


def test_second_derivatives():
    args = inputs("affine", noise=False, dtype=torch.float64)
    v = torch.randn_like(args[0])
    found = []
    for call in (OP.trained, OP.function.apply):
        g = torch.ones_like(args[0]).requires_grad_()
        dw, ds, dz = gradients(call, args, g, create_graph=True)
        found.append(torch.autograd.grad((dw * v).sum() + (ds**2).sum() + (dz**2).sum(), [g])[0])
    assert_same_bits(*found)
    assert found[0].abs().sum() > 0


def test_tangents_of_a_backward_that_was_recorded_before():
    """Forward mode that begins after the forward: the tangent of the gradient is the gradient of the tangent."""
    args = inputs("affine", noise=False, dtype=torch.float64)
    g, t = torch.randn_like(args[0]), torch.randn_like(args[0])
    y = OP.trained(*args)

    def pull(g):
        return torch.autograd.grad(y, args[:3], g, retain_graph=True)

    with torch.autograd.forward_ad.dual_level():
        duals = pull(torch.autograd.forward_ad.make_dual(g, t))
        tangents = [torch.autograd.forward_ad.unpack_dual(dual).tangent for dual in duals]
    for tangent, expected in zip(tangents, gradients(OP.function.apply, args, t), strict=True):
        assert torch.equal(tangent, expected)
    with pytest.raises(NotImplementedError):  # torch.func cannot enter here; it must not drop the tangent
        torch.func.jvp(pull, (g,), (t,))


def test_a_batch_of_gradients():
    args = inputs("affine", noise=False, dtype=torch.float64)
    gs = torch.randn(3, *args[0].shape, dtype=torch.float64)
    batched = torch.autograd.grad(OP.trained(*args), args[:3], gs, is_grads_batched=True)
    for i, g in enumerate(gs):
        for together, alone in zip(batched, gradients(OP.function.apply, args, g), strict=True):
            assert_same_bits(together[i], alone)


def test_public_calls_use_it():
    args = inputs("lsq", noise=False)
    y = qk.fake_quantize(args[0], args[1].view(6, 3), qk.grids.lsq(4), group_size=16)
    assert type(y.grad_fn) is not type(OP.function.apply(*args).grad_fn)
    _, tangent = torch.func.jvp(lambda w: OP.call(w, *args[1:]), (args[0],), (torch.ones_like(args[0]),))
    assert tangent.shape == args[0].shape  # forward mode is Python's


def test_a_change_of_the_weight_before_the_backward_is_an_error():
    args = inputs("lsq", noise=False)
    y = OP.trained(*args)
    with torch.no_grad():
        args[0].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_a_second_backward_is_an_error():
    y = OP.trained(*inputs("lsq", noise=False)).sum()
    y.backward()
    with pytest.raises(RuntimeError, match="second time"):
        y.backward()


def test_saved_tensors_can_be_packed():
    """As checkpoints and offloading do."""
    args, seen = inputs("affine", noise=True), []
    g = torch.randn_like(args[0])
    with torch.autograd.graph.saved_tensors_hooks(lambda t: seen.append(t) or t.clone(), lambda t: t):
        y = OP.trained(*args)
    found = torch.autograd.grad(y, args[:3], g)
    for mine, right in zip(found, gradients(OP.function.apply, args, g), strict=True):
        assert_same_bits(mine, right)
    assert len(seen) == 4


def test_only_what_requires_gradients_gets_them():
    args = inputs("affine", noise=False)
    args[0] = args[0].detach()
    OP.trained(*args).sum().backward()
    assert args[0].grad is None
    assert args[1].grad is not None
    assert args[2].grad is not None


def test_activations():
    op = OPS["fake_quantize_dynamic"]
    x = torch.randn(3, 40, requires_grad=True)
    y, g = op.call(x, 4), torch.randn(3, 40)
    assert "Dynamic" in y.grad_fn.name()
    assert_same_bits(y.detach(), op.function.apply(x, 4).detach())
    y.backward(g)
    assert_same_bits(x.grad, g)
