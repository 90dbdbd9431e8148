"""Bad input: the exception names the argument, what it was and what is allowed. Odd but good input works."""

import pytest
import torch

import qatkernels as qk
from qatkernels.backends import IMPLS
from qatkernels.testing.compare import assert_same_bits

W, S = torch.randn(4, 12), torch.rand(4) + 0.1


def fq(w=W, scale=S, grid=None, **kw):
    return qk.fake_quantize(w, scale, grid or qk.grids.lsq(4), **kw)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: fq(group_size=5), ValueError, r"group_size is 5.*divisor.*12"),
        (lambda: fq(group_size=0), ValueError, r"group_size is 0"),
        (lambda: fq(group_size=-4), ValueError, r"group_size is -4"),
        (lambda: fq(group_size=4), ValueError, r"scale has shape \(4,\), must be \(4, 3\)"),
        (lambda: fq(scale=torch.ones(3)), ValueError, r"scale has shape \(3,\)"),
        (lambda: fq(scale=torch.ones(12)), ValueError, r"scale has shape \(12,\)"),
        (lambda: fq(scale=torch.ones(4, 3)), ValueError, r"give group_size"),
        (lambda: fq(scale=S.bfloat16()), RuntimeError, r"scale is torch.bfloat16, must be torch.float32"),
        (lambda: fq(w=torch.ones(4, 12, dtype=torch.int32)), RuntimeError, r"w is torch.int32"),
        (lambda: fq(zero_point=S), ValueError, r"zero_point is given.*'lsq'"),
        (lambda: fq(grid=qk.grids.affine(4), zero_point=torch.zeros(3)), ValueError, r"zero_point has shape \(3,\)"),
        (lambda: fq(noise_std=float("inf")), ValueError, r"noise_std is inf"),
        (lambda: fq(noise_std=float("nan")), ValueError, r"noise_std is nan"),
        (lambda: fq(noise_std=0.1, seed=torch.tensor(1.0)), ValueError, r"seed is torch.float32"),
        (lambda: fq(noise_std=0.1, seed=torch.tensor([1, 2])), ValueError, r"seed.*shape \(2,\)"),
        (lambda: fq(dtype=torch.int8), RuntimeError, r"dtype is"),
        (lambda: fq(w=W.bfloat16(), dtype=torch.float32), RuntimeError, r"dtype is"),
        (lambda: fq(out=torch.empty(4, 11)), ValueError, r"out is.*\(4, 11\).*\(4, 12\)"),
        (lambda: fq(out=torch.empty(4, 12, dtype=torch.half)), ValueError, r"out is torch.float16"),
        (lambda: fq(out=torch.empty(12, 4).t()), ValueError, r"out has strides.*contiguous"),
        (lambda: fq(w=W.clone().requires_grad_(), out=torch.empty(4, 12)), RuntimeError, r"out=.*no_grad"),
        (lambda: fq(w=torch.tensor(1.0), scale=torch.tensor(1.0), group_size=1), ValueError, r"group_size"),
        (lambda: qk.quantize(W, torch.ones(5), qk.grids.lsq(4)), ValueError, r"scale has shape"),
        (lambda: qk.dequantize(W, S, qk.grids.lsq(4)), RuntimeError, r"codes is"),
        (lambda: qk.fake_quantize_dynamic(W, 1), RuntimeError, r"bits is 1"),
        (lambda: qk.fake_quantize_dynamic(W, 9), RuntimeError, r"bits is 9"),
        (lambda: qk.fake_quantize_dynamic(torch.tensor(1.0)), RuntimeError, r"x has shape \(\), must be \(..., K\)"),
        (lambda: qk.fake_quantize_dynamic(W.int()), RuntimeError, r"x is|dtype is"),
    ],
)
def test_errors(call, error, words):
    with pytest.raises(error, match=words):
        call()


def test_the_same_errors_on_meta_tensors():
    with pytest.raises(RuntimeError, match=r"scale is torch\.float16"):
        fq(w=W.to("meta"), scale=S.half().to("meta"))


def test_out_is_written_and_returned():
    out = torch.full((4, 12), torch.nan)
    assert fq(out=out) is out
    assert_same_bits(out, fq())
    with torch.no_grad():
        assert_same_bits(fq(w=W.clone().requires_grad_(), out=torch.empty(4, 12)), out)
    aliased = W.clone()
    assert_same_bits(fq(w=aliased, out=aliased), out)


@pytest.mark.parametrize("shape", [(0, 12), (4, 0), (0,), (0, 0)])
@pytest.mark.parametrize("grid", [qk.grids.seq(2), qk.grids.affine(4)], ids=["seq", "affine"])
def test_empty(shape, grid):
    w = torch.empty(shape, requires_grad=True)
    scale = torch.ones(shape[:-1]).requires_grad_()
    zero = torch.zeros_like(scale, requires_grad=True) if grid.has_zero_point else None
    y = qk.fake_quantize(w, scale, grid, zero_point=zero)
    assert y.shape == shape
    y.sum().backward()
    assert w.grad.shape == shape
    assert torch.equal(scale.grad, torch.zeros_like(scale))
    assert qk.quantize(w, scale, grid, zero_point=zero).shape == shape


@pytest.mark.parametrize("scale", [torch.tensor(0.3), torch.tensor([0.3]), torch.tensor([[0.3]])])
def test_one_scale_in_any_shape(scale):
    assert_same_bits(fq(scale=scale), fq(scale=torch.tensor(0.3)))
    assert_same_bits(fq(w=torch.tensor(1.0), scale=torch.tensor(0.3)), torch.tensor(0.3) * 3)


def test_rows_are_leading_dimensions():
    conv = torch.randn(4, 3, 2, 2)
    by_row = fq(w=conv.reshape(4, 12))
    for scale in (S, S.view(4, 1), S.view(4, 1, 1, 1)):
        assert_same_bits(fq(w=conv, scale=scale), by_row.view_as(conv))
    experts = torch.randn(2, 4, 12)
    scales = torch.rand(2, 4) + 0.1
    stacked = torch.stack([fq(w=experts[e], scale=scales[e]) for e in range(2)])
    assert_same_bits(fq(w=experts, scale=scales), stacked)
    assert_same_bits(fq(w=experts, scale=scales[..., None]), stacked)


@pytest.mark.skipif("cpp" not in IMPLS["fake_quantize"], reason="needs the compiled kernels to be quick enough")
def test_more_than_two_to_the_31_elements():
    """Index arithmetic in 64 bits: elements on both sides of 2^31 are quantized where they are."""
    n = 2**31 + 80
    w = torch.full((n,), 0.5, dtype=torch.bfloat16)
    w[-1], w[-2], w[2**31 - 1] = -4.0, 0.25, 7.0
    scale = torch.tensor(0.5)
    y = qk.fake_quantize(w, scale, qk.grids.lsq(4), out=w)
    assert y[:3].tolist() == [0.5] * 3
    assert y[-3:].tolist() == [0.5, 0.0, -4.0]
    assert y[2**31 - 1].item() == 3.5
    ends = torch.tensor([0, 2**31 - 2, 2**31, n - 4])
    assert y[ends].tolist() == [0.5] * 4
    codes = qk.quantize(w, scale, qk.grids.lsq(4))
    assert codes[-3:].tolist() == [1, 0, -8]
    assert codes[2**31 - 1].item() == 7
