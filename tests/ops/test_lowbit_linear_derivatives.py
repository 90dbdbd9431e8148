"""Derivatives of products with packed weights, and torch's transforms of them."""

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.func import jvp, vjp, vmap
from torch.library import opcheck

import qatkernels as qk
from qatkernels.dtypes import dtype_name
from qatkernels.ops._lowbit_linear import LowbitLinear
from qatkernels.ops._op import OPS
from qatkernels.ops.contract import FLOATS
from qatkernels.testing.compare import assert_same_bits, assert_within
from qatkernels.testing.products import (
    Case,
    activations,
    expected_linear,
    expected_transposed,
    replaced,
    scaled_weight,
)
from tests.compiled import torch_compile_blamed

GRADIENT_GRIDS = [qk.grids.binary(), qk.grids.ternary(), qk.grids.seq(2), qk.grids.lsq(4), qk.grids.affine(3)]


def _linear(grid, cols=12, shape=(4,)):
    return scaled_weight(grid, (*shape, cols), 4, zero="any" if grid.has_zero_point else None)


@pytest.mark.parametrize("shape", [(3, 12), (12,), (2, 2, 12)], ids=str)
@pytest.mark.parametrize("grid", GRADIENT_GRIDS, ids=lambda g: g.scheme)
def test_gradcheck(grid, shape):
    weight = _linear(grid)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(4, dtype=torch.float64, requires_grad=True)

    def call(x, bias):
        return qk.lowbit_linear(x, weight, bias)

    assert gradcheck(call, (x, bias), check_forward_ad=True, check_batched_forward_grad=True, check_batched_grad=True)
    # Linear itself, so something curved after it.
    assert gradgradcheck(lambda x, b: call(x, b).tanh(), (x, bias), check_fwd_over_rev=True, check_rev_over_rev=True)


def test_gradcheck_grouped():
    weight, offsets = _linear(qk.grids.seq(2), shape=(4, 3)), torch.tensor([2, 2, 5, 5], dtype=torch.int32)
    x = torch.randn(6, 12, dtype=torch.float64, requires_grad=True)

    def call(x):
        return qk.grouped_lowbit_linear(x, weight, offsets)

    assert gradcheck(call, (x,), check_forward_ad=True)
    assert gradgradcheck(lambda x: call(x).tanh(), (x,), check_fwd_over_rev=True)
    (dx,) = torch.autograd.grad(call(x).sum(), x)
    assert (dx[5] == 0).all(), "a token of nobody"
    assert dx[:5].abs().sum(-1).all()


@pytest.mark.parametrize("dtype", FLOATS, ids=dtype_name)
@pytest.mark.parametrize("act_bits", [None, 8])
def test_backward_and_forward_mode_in_every_dtype(dtype, act_bits):
    """With act_bits the derivative is that of the product without: the straight-through rule."""
    weight = scaled_weight(qk.grids.seq(2), (24, 40), 8)
    x, g = activations((5, 40), dtype), activations((5, 24), dtype, seed=4)
    bias = activations((24,), torch.float32, seed=5)

    def call(x, bias):
        return qk.lowbit_linear(x, weight, bias, act_bits=act_bits)

    y, pull = vjp(call, x, bias)
    dx, db = pull(g)
    assert (y.dtype, dx.dtype, db.dtype) == (dtype, dtype, torch.float32)
    assert_within(dx, *expected_transposed(g, weight))
    torch.testing.assert_close(db, g.float().sum(0))
    tangent, bias_tangent = activations((5, 40), dtype, seed=6), activations((24,), torch.float32, seed=7)
    _, dy = jvp(call, (x, bias), (tangent, bias_tangent))
    expected, bound = expected_linear(tangent, weight)
    info = torch.finfo(dtype)
    moved = expected + bias_tangent
    assert dy.dtype == dtype
    # The bias is rounded to the dtype, and so is the sum.
    assert_within(dy, moved, bound + info.eps * (moved.abs() + bias_tangent.abs()))
    only_bias = jvp(lambda b: call(x, b), (bias,), (bias_tangent,))[1]
    assert only_bias.dtype == dtype
    assert_same_bits(only_bias, bias_tangent.to(dtype).expand(5, 24).contiguous())


def test_gradients_of_the_ops_called_directly():
    case = Case("", _linear(qk.grids.lsq(4)), torch.randn(3, 12, dtype=torch.float64))
    for op in ("lowbit_linear", "lowbit_linear_transposed"):
        args, *_ = case.call(op)
        first = args[0].double().requires_grad_()
        assert gradcheck(lambda t, op=op, rest=args[1:]: getattr(torch.ops.qatkernels, op)(t, *rest), (first,))


@pytest.mark.parametrize("act_bits", [None, 8])
def test_nothing_of_the_input_is_saved(act_bits):
    """Fine-tuning over a packed base keeps no activation for its sake."""
    weight, x = _linear(qk.grids.lsq(4)), torch.randn(3, 12, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        qk.lowbit_linear(x, weight, torch.zeros(4), act_bits=act_bits)
    assert {t.data_ptr() for t in saved} <= {t.data_ptr() for t in (weight.packed, weight.scale)}


def test_codes_and_scales_get_no_gradient():
    weight, x = _linear(qk.grids.lsq(4)), torch.randn(3, 12, requires_grad=True)
    scale = weight.scale.clone().requires_grad_()
    qk.lowbit_linear(x, replaced(weight, scale=scale)).sum().backward()
    assert x.grad is not None
    assert scale.grad is None


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("act_bits", [None, 8])
def test_vmap_equals_a_loop(act_bits, grouped):
    offsets = torch.tensor([1, 3], dtype=torch.int32) if grouped else None
    weight = scaled_weight(qk.grids.affine(4), (2, 6, 16) if grouped else (6, 16), 8, zero="any")

    def call(x):
        if offsets is not None:
            return qk.grouped_lowbit_linear(x, weight, offsets, act_bits=act_bits)
        return qk.lowbit_linear(x, weight, act_bits=act_bits)

    many, gs = torch.randn(4, 3, 16), torch.randn(4, 3, 6)
    assert_same_bits(vmap(call)(many), torch.stack([call(x) for x in many]))
    assert_same_bits(vmap(call, in_dims=1)(many.transpose(0, 1)), torch.stack([call(x) for x in many]))

    def pull(g):
        return vjp(call, many[0])[1](g)[0]

    assert_same_bits(vmap(pull)(gs), torch.stack([pull(g) for g in gs]))


def test_vmap_over_weights():
    weight, x = scaled_weight(qk.grids.seq(2), (3, 5, 16)), torch.randn(2, 16)
    grid = (list(weight.grid.constants), weight.grid.code_min, weight.bits, None)

    def call(packed, scale):
        return LowbitLinear.apply(x, packed, scale, None, None, None, *grid)

    stacked = torch.stack([call(p, s) for p, s in zip(weight.packed, weight.scale, strict=True)])
    assert_same_bits(vmap(call)(weight.packed, weight.scale), stacked)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("grouped", [False, True])
def test_compile(backend, grouped):
    """No graph break, and the same bits as eager, values and gradients."""
    offsets = torch.tensor([1, 1, 5], dtype=torch.int32)
    weight = scaled_weight(qk.grids.affine(4), (3, 24, 32) if grouped else (24, 32), 8, zero="any")

    def step(x, bias):
        if grouped:
            return qk.grouped_lowbit_linear(x, weight, offsets, act_bits=8)
        return qk.lowbit_linear(x, weight, bias)

    def run(function):
        x, bias = activations((6, 32), torch.float32).requires_grad_(), torch.ones(24, requires_grad=True)
        y = function(x, bias)
        y.backward(torch.ones_like(y))
        return y.detach(), x.grad, *([] if grouped else [bias.grad])

    torch._dynamo.reset()
    with torch_compile_blamed(backend):
        for a, b in zip(run(torch.compile(step, fullgraph=True, backend=backend)), run(step), strict=True):
            assert_same_bits(a, b)


@pytest.mark.parametrize("grouped", [False, True])
def test_opcheck(grouped):
    offsets = torch.tensor([1, 3], dtype=torch.int32) if grouped else None
    weight = scaled_weight(qk.grids.affine(3), (2, 6, 16) if grouped else (6, 16), 8, zero="any")
    bias = None if grouped else torch.randn(6)
    for op, act_bits in (("lowbit_linear", None), ("lowbit_linear", 8), ("lowbit_linear_transposed", None)):
        args, *_ = Case("", weight, torch.randn(4, 16), bias, offsets, act_bits).call(op)
        graded = [a.clone().requires_grad_() if a is args[0] or (a is bias and a is not None) else a for a in args]
        opcheck(getattr(torch.ops.qatkernels, op).default, tuple(graded))
        opcheck(getattr(torch.ops.qatkernels, f"{op}_out").default, (*args, OPS[op].meta(*args)))
