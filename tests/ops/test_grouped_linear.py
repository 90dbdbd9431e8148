"""Grouped products against a loop in float64, their derivatives of every order, and bad calls."""

import itertools

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.func import jvp, vmap
from torch.library import opcheck

from qatkernels.backends import IMPLS
from qatkernels.dtypes import dtype_name
from qatkernels.ops._grouped_linear import GroupedLinear, GroupedLinearTransposed, GroupedOuter, grouped_linear
from qatkernels.ops.contract import FLOATS
from qatkernels.testing.compare import assert_same_bits, check_grouped, run_out
from qatkernels.testing.compare import grouped_meaning as meaning
from tests.implementations import implementations, moved

OPS = ("grouped_linear", "grouped_linear_transposed", "grouped_outer")
FUNCTIONS = (GroupedLinear, GroupedLinearTransposed, GroupedOuter)
#: Where experts end, of 11 tokens: ragged, empty at either end and in the middle, one of several takes all, nobody any,
#: one expert alone with tokens and without, no expert.
ENDS = ((2, 2, 7, 11), (0, 0, 11), (11, 11), (0, 3, 3), (0,), (11,), (4, 9), (0, 11, 11, 11), ())


def draw(seed, *shape, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def operands(op, experts, n=5, k=7, tokens=11, dtype=torch.float64):
    x, g, w = draw(0, tokens, k, dtype=dtype), draw(1, tokens, n, dtype=dtype), draw(2, experts, n, k, dtype=dtype)
    return {"grouped_linear": (x, w), "grouped_linear_transposed": (g, w), "grouped_outer": (g, x)}[op]


def offsets_of(ends):
    return torch.tensor(ends, dtype=torch.int32)


def reference_out(op):
    return lambda *args: args[-1].copy_(IMPLS[op]["reference"](*args[:-1]))


def every(op):
    """Every `_out` implementation that runs here, the reference included, with its device."""
    return [("reference", reference_out(op), torch.device("cpu")), *implementations(op)]


@pytest.mark.backends
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", FLOATS, ids=dtype_name)
def test_every_division_of_tokens(op, dtype):
    for ends in ENDS:
        for backend, impl, device in every(op):
            check_grouped(op, impl, operands(op, len(ends), dtype=dtype), ends, device, backend)


@pytest.mark.backends
@pytest.mark.parametrize("op", OPS)
def test_no_tokens_no_features_no_experts(op):
    for tokens, n, k, ends in ((0, 5, 7, (0, 0)), (11, 0, 7, (2, 11)), (11, 5, 0, (2, 11)), (0, 5, 7, ())):
        a, b = operands(op, len(ends), n, k, tokens)
        for backend, impl, device in every(op):
            (actual,) = run_out(op, impl, moved((a, b, offsets_of(ends)), device))
            assert_same_bits(actual.cpu(), meaning(op, a, b, ends), f"{tokens} {n} {k} {ends} {backend}")


@pytest.mark.parametrize("op", OPS)
def test_any_strides(op):
    """Transposed, sliced and expanded operands, the stride 0 of a sum's gradient among them."""
    ends = (2, 2, 7, 10)
    for first, second in itertools.product(("transposed", "sliced", "expanded"), repeat=2):
        a, b = (strided(t, how) for t, how in zip(operands(op, 4), (first, second), strict=True))
        actual = getattr(torch.ops.qatkernels, op)(a, b, offsets_of(ends))
        torch.testing.assert_close(actual, meaning(op, a, b, ends))


def strided(t, how):
    if how == "transposed":
        return t.mT.contiguous().mT
    if how == "sliced":
        return t.repeat_interleave(2, -1)[..., ::2]
    return t[..., :1].expand(t.shape)


@pytest.mark.parametrize("op", OPS)
def test_derivatives_of_every_order(op):
    function, ends = FUNCTIONS[OPS.index(op)], offsets_of((2, 2, 5))
    inputs = [t.requires_grad_() for t in operands(op, 3, 3, 2, 6)]

    def call(*t):
        return function.apply(*t, ends)

    gradcheck(call, inputs, check_forward_ad=True)
    gradgradcheck(call, inputs, check_fwd_over_rev=True)
    for frozen in (0, 1):
        some = [t.detach().requires_grad_(i != frozen) for i, t in enumerate(inputs)]
        call(*some).sum().backward()
        assert some[frozen].grad is None
        assert some[1 - frozen].grad is not None


def test_forward_mode_and_vmap():
    x, w = operands("grouped_linear", 3)
    ends = offsets_of((2, 2, 7))
    tangents = draw(3, *x.shape), draw(4, *w.shape)
    _, pushed = jvp(lambda x, w: grouped_linear(x, w, ends), (x, w), tangents)
    expected = meaning("grouped_linear", tangents[0], w, (2, 2, 7)) + meaning(
        "grouped_linear", x, tangents[1], (2, 2, 7)
    )
    torch.testing.assert_close(pushed, expected)
    several = vmap(lambda x: grouped_linear(x, w, ends))(torch.stack([x, 2 * x]))
    torch.testing.assert_close(several[1], 2 * several[0])


def test_compile_and_opcheck():
    ends = offsets_of((2, 2, 7))
    for op in OPS:
        a, b = operands(op, 3, dtype=torch.float32)
        opcheck(getattr(torch.ops.qatkernels, op).default, (a.requires_grad_(), b.requires_grad_(), ends))
    x, w = (t.requires_grad_() for t in operands("grouped_linear", 3, dtype=torch.float32))
    eager = torch.autograd.grad(grouped_linear(x, w, ends).square().sum(), (x, w))
    compiled = torch.compile(
        lambda x, w: grouped_linear(x, w, ends).square().sum(), fullgraph=True, backend="aot_eager"
    )
    for a, b in zip(torch.autograd.grad(compiled(x, w), (x, w)), eager, strict=True):
        torch.testing.assert_close(a, b)


def test_bad_calls():
    x, w = operands("grouped_linear", 2)
    good = offsets_of((2, 7))
    for error, message, args in (
        (RuntimeError, "x is torch.int64", (x.long(), w, good)),
        (RuntimeError, "w is torch.float32, must be torch.float64", (x, w.float(), good)),
        (RuntimeError, r"x has shape \(7,\)", (x[0], w, good)),
        (RuntimeError, r"w has shape \(5, 7\)", (x, w[0], good)),
        (RuntimeError, r"w has shape \(2, 5, 7\), must be \(E, N, 6\)", (x[:, :6], w, good)),
        (RuntimeError, "offsets is torch.int64", (x, w, good.long())),
        (RuntimeError, r"offsets has shape \(3,\), must be \(2,\)", (x, w, offsets_of((1, 2, 3)))),
        (RuntimeError, "w is on meta", (x, w.to("meta"), good)),
        (ValueError, r"offsets is \[3, 2\], must ascend", (x, w, offsets_of((3, 2)))),
        (
            ValueError,
            r"offsets is \[3, 12\], must ascend from 0 to at most the 11 rows of x",
            (x, w, offsets_of((3, 12))),
        ),
        (ValueError, r"offsets is \[-1, 3\], must ascend", (x, w, offsets_of((-1, 3)))),
        (RuntimeError, r"offsets has shape \(1, 2\), must be \(2,\)", (x, w, good[None])),
    ):
        for call in (grouped_linear, IMPLS["grouped_linear"].get("cpp")):
            if call is grouped_linear or (call is not None and "meta" not in message):  # torch's own error
                with pytest.raises(error, match=message):
                    call(*args)
    g, outer = operands("grouped_outer", 2)
    for op, message, args in (
        ("grouped_linear_transposed", r"w has shape \(2, 5, 7\), must be \(E, 4, K\)", (g[:, :4], w, good)),
        ("grouped_outer", r"x has shape \(11, 7\), must be \(9, K\)", (g[:9], outer, good)),
        ("grouped_outer", "x is torch.float32, must be torch.float64", (g, outer.float(), good)),
        ("grouped_outer", "offsets is torch.float32", (g, outer, good.float())),
    ):
        for call in (getattr(torch.ops.qatkernels, op), IMPLS[op].get("cpp")):
            if call is not None:
                with pytest.raises(RuntimeError, match=message):
                    call(*args)
    if "cpp" in IMPLS["grouped_linear"]:
        for message, out in (
            (r"out is .*, must be torch.float64 of shape \(11, 5\)", torch.empty(11, 6).double()),
            (r"out is .*, must be torch.float64 of shape \(11, 5\)", torch.empty(11, 5)),
            ("out has strides .1, 11., must be contiguous", torch.empty(5, 11).double().T),
        ):
            with pytest.raises(ValueError, match=message):
                IMPLS["grouped_linear_out"]["cpp"](x, w, good, out)
