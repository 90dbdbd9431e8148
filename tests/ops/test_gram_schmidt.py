"""One pass of Gram-Schmidt on every backend, and what a Lanczos step makes of it."""

import pytest
import torch
from torch.library import opcheck

from qatkernels.backends import IMPLS
from qatkernels.ops import gram_schmidt
from qatkernels.testing.compare import assert_same_bits, check_gram_schmidt, run_out
from qatkernels.testing.samples import basis_calls
from tests.implementations import implementations, moved


@pytest.mark.backends
@pytest.mark.parametrize("call", list(basis_calls()), ids=lambda c: c[0])
def test_backends(call):
    name, op, args = call
    for backend, impl, device in implementations(op):
        check_gram_schmidt(impl, moved(args, device), f"{backend} {name}")


@pytest.mark.skipif("cpp" not in IMPLS["gram_schmidt"], reason="needs the compiled kernels")
def test_threads_change_no_bit():
    basis, w, h = torch.randn(9, 300_001), torch.randn(300_001), torch.randn(9).double()
    threads, results = torch.get_num_threads(), []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results.append(run_out("gram_schmidt", IMPLS["gram_schmidt_out"]["cpp"], (basis, w, h)))
    torch.set_num_threads(threads)
    for other in results[1:]:
        for a, e in zip(other, results[0], strict=True):
            assert_same_bits(a, e)


@pytest.mark.parametrize("update", [False, True])
def test_over_w_itself(update):
    basis, w = torch.randn(5, 3000), torch.randn(3000)
    h = torch.randn(5).double() if update else None
    expected = gram_schmidt(basis, w, h)
    dots, sq = torch.full((5,), torch.nan).double(), torch.tensor(torch.nan).double()
    torch.ops.qatkernels.gram_schmidt_out(basis, w, h, w, dots, sq)
    for a, e in zip((w, dots, sq), expected, strict=True):
        assert_same_bits(a, e)


def test_views_and_coefficients_of_other_dtypes():
    basis, w, h = torch.randn(3000, 5).t(), torch.randn(6000)[::2], torch.randn(5)
    for a, e in zip(
        gram_schmidt(basis, w, h), gram_schmidt(basis.contiguous(), w.contiguous(), h.double()), strict=True
    ):
        assert_same_bits(a, e)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_three_passes_orthogonalize_to_rounding(dtype):
    """A vector almost inside the span, where one orthogonalization is not enough."""
    n = 2000
    basis = torch.linalg.qr(torch.randn(n, 20, dtype=torch.float64))[0].t().to(dtype).contiguous()
    w = (torch.randn(20, dtype=torch.float64) @ basis.double() + 1e-5 * torch.randn(n).double() / n**0.5).to(dtype)
    _, dots, _ = gram_schmidt(basis, w)
    once, dots, _ = gram_schmidt(basis, w, dots)
    twice, left, sq = gram_schmidt(basis, once, dots)
    eps = torch.finfo(dtype).eps
    assert left.norm() < 20 * eps * sq.sqrt()
    torch.testing.assert_close(sq.sqrt(), twice.double().norm())


def test_opcheck():
    for h in (None, torch.randn(3).double()):
        opcheck(torch.ops.qatkernels.gram_schmidt.default, (torch.randn(3, 40), torch.randn(40), h))


B, W = torch.randn(3, 8), torch.randn(8)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ((B, W[:7]), r"w has shape \(7,\), must be \(8,\)"),
        ((B[0], W), r"basis has shape \(8,\), must be \(M, N\)"),
        ((B.half(), W), r"basis is torch.float16"),
        ((B, W.bfloat16()), r"w is torch.bfloat16"),
        ((B, W, torch.ones(2)), r"h (is|has)"),
        ((B, W, torch.ones(3, dtype=torch.int64)), r"h is"),
    ],
)
def test_errors(args, words):
    for tensors in (args, [a.to("meta") for a in args]):
        with pytest.raises(RuntimeError, match=words):
            gram_schmidt(*tensors)
