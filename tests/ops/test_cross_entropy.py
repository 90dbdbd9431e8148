"""Cross-entropy: every backend against float64, and derivatives of every order against torch's own."""

import pytest
import torch
import torch.nn.functional as F
from torch.func import grad, hessian, jvp, vmap
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode

from qatkernels.backends import IMPLS
from qatkernels.ops import cross_entropy, linear_cross_entropy
from qatkernels.ops._linear_cross_entropy import default_chunk
from qatkernels.ops.contract import FLOATS
from qatkernels.testing.compare import assert_same_bits, check_rows, run_out
from qatkernels.testing.samples import logits_calls
from tests.compiled import torch_compile_blamed
from tests.implementations import implementations, moved

TOKENS, VOCABULARY, FEATURES = 6, 11, 4


@pytest.mark.backends
@pytest.mark.parametrize("dtype", FLOATS)
def test_backends(dtype):
    for name, op, args in logits_calls(dtype):
        for backend, impl, device in implementations(op):
            check_rows(op, impl, moved(args, device), f"{backend} {name}")


@pytest.mark.skipif("cpp" not in IMPLS["cross_entropy"], reason="needs the compiled kernels")
@pytest.mark.parametrize("dtype", FLOATS)
def test_in_place_and_threads_change_no_bit(dtype):
    """Over the logits and the tangent, as the fused linear layer does it; and rows on one thread or two."""
    calls = {op: args for name, op, args in logits_calls(dtype) if name.startswith("4x9001")}
    out = {op: run_out(op, IMPLS[f"{op}_out"]["cpp"], args) for op, args in calls.items()}
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    for op, args in calls.items():
        for actual, expected in zip(run_out(op, IMPLS[f"{op}_out"]["cpp"], args), out[op], strict=True):
            assert_same_bits(actual, expected, op)
    torch.set_num_threads(threads)

    g, logits, *rest = calls["cross_entropy_backward"]
    place = logits.clone()
    IMPLS["cross_entropy_backward_out"]["cpp"](g, place, *rest, place)
    assert_same_bits(place, out["cross_entropy_backward"][0])
    tangent, tangent_g, g, logits, *rest = calls["cross_entropy_dual"]
    place, along = logits.clone(), tangent.clone()
    loss = torch.empty_like(g)
    IMPLS["cross_entropy_dual_out"]["cpp"](along, tangent_g, g, place, *rest, place, along, loss)
    for actual, expected in zip((place, along, loss), out["cross_entropy_dual"], strict=True):
        assert_same_bits(actual, expected)


@pytest.mark.skipif("cpp" not in IMPLS["cross_entropy"], reason="needs the compiled kernels")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_outputs_that_pass_the_caches(dtype):
    """Large outputs are stored another way, whose lines rows of odd length cut anywhere."""
    tokens, vocabulary = 300, (24 << 20) // 300 // dtype.itemsize + 1
    logits = torch.randn(tokens, vocabulary).to(dtype)
    tangent, targets = torch.randn_like(logits), torch.randint(vocabulary, (tokens,))
    g = torch.rand(tokens)
    lse = torch.logsumexp(logits.float(), 1)
    some = torch.tensor([0, 1, 7, tokens - 1])
    point = (logits, lse, targets, -100)
    for op, before in (("backward", (g,)), ("hvp", (tangent, None, g))):
        impl = IMPLS[f"cross_entropy_{op}_out"]["cpp"]
        whole = run_out(f"cross_entropy_{op}", impl, (*before, *point))[0]
        part = [None if t is None else t[some] for t in (*before, *point[:3])]
        assert whole.isfinite().all()
        assert_same_bits(whole[some], run_out(f"cross_entropy_{op}", impl, (*part, -100))[0])


@pytest.fixture
def targets():
    torch.manual_seed(0)
    targets = torch.randint(VOCABULARY, (TOKENS,))
    targets[2] = -100
    return targets


def pairs(targets, reduction):
    """Our functions, torch's, and where to differentiate them: (ours, torch's, primals)."""
    logits = torch.randn(TOKENS, VOCABULARY, dtype=torch.float64)
    hidden = torch.randn(TOKENS, FEATURES, dtype=torch.float64)
    weight = torch.randn(VOCABULARY, FEATURES, dtype=torch.float64)
    settings = {"reduction": reduction}
    return {
        "logits": (
            lambda z: cross_entropy(z, targets, **settings),
            lambda z: F.cross_entropy(z, targets, **settings),
            (logits,),
        ),
        "linear": (
            lambda h, w: linear_cross_entropy(h, w, targets, chunk_tokens=4, **settings),
            lambda h, w: F.cross_entropy(F.linear(h, w), targets, **settings),
            (hidden, weight),
        ),
        "linear, weight frozen": (
            lambda h: linear_cross_entropy(h, weight, targets, chunk_tokens=4, **settings),
            lambda h: F.cross_entropy(F.linear(h, weight), targets, **settings),
            (hidden,),
        ),
        "linear, hidden frozen": (
            lambda w: linear_cross_entropy(hidden, w, targets, chunk_tokens=4, **settings),
            lambda w: F.cross_entropy(F.linear(hidden, w), targets, **settings),
            (weight,),
        ),
    }


KINDS = ("logits", "linear", "linear, weight frozen", "linear, hidden frozen")


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("kind", KINDS)
def test_derivatives_of_every_order(targets, kind, reduction):
    ours, theirs, primals = pairs(targets, reduction)[kind]
    every = tuple(range(len(primals)))
    vs = tuple(torch.randn_like(p) for p in primals)

    def along(f):
        return lambda *p: sum((g * v).sum() for g, v in zip(grad(f, every)(*p), vs, strict=True))

    orders = {
        "loss": lambda f: f(*primals),
        "jvp": lambda f: jvp(f, primals, vs)[1],
        "gradient": lambda f: grad(f, every)(*primals),
        "hessian": lambda f: hessian(f, every)(*primals),
        "forward over reverse": lambda f: jvp(grad(f, every), primals, vs)[1],
        "reverse over reverse": lambda f: grad(along(f), every)(*primals),
        "reverse over forward": lambda f: grad(lambda *p: jvp(f, p, vs)[1], every)(*primals),
        "forward over forward": lambda f: jvp(lambda *p: jvp(f, p, vs)[1], primals, vs)[1],
        "third, forward": lambda f: jvp(lambda *p: jvp(grad(f, every), p, vs)[1], primals, vs)[1],
        "third, reverse": lambda f: grad(lambda *p: jvp(along(f), p, vs)[1], every)(*primals),
    }
    for name, order in orders.items():
        torch.testing.assert_close(order(ours), order(theirs), msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("kind", KINDS)
def test_double_backward(targets, kind):
    """torch.autograd's own way, without functorch."""
    ours, theirs, primals = pairs(targets, "mean")[kind]
    vs = tuple(torch.randn_like(p) for p in primals)

    def product(f):
        leaves = [p.clone().requires_grad_() for p in primals]
        gs = torch.autograd.grad(f(*leaves), leaves, create_graph=True)
        return torch.autograd.grad(gs, leaves, vs)

    torch.testing.assert_close(product(ours), product(theirs))


@pytest.mark.parametrize("kind", KINDS[:2])
def test_losses_of_each_token(targets, kind):
    ours, theirs, primals = pairs(targets, "none")[kind]
    torch.testing.assert_close(ours(*primals), theirs(*primals))
    shaped = cross_entropy(torch.randn(2, 3, VOCABULARY), targets.view(2, 3), reduction="none")
    assert shaped.shape == (2, 3)
    many = torch.randn(3, *primals[0].shape, dtype=torch.float64)
    torch.testing.assert_close(
        vmap(lambda p: ours(p, *primals[1:]))(many), torch.stack([ours(p, *primals[1:]) for p in many])
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_have_float32_sums(dtype):
    """A gradient of the weight over many chunks is off by roundings of its terms, not of its partial sums."""
    tokens, chunk = 512, 8
    torch.manual_seed(0)
    hidden = torch.randn(tokens, FEATURES).to(dtype).requires_grad_()
    weight = torch.randn(VOCABULARY, FEATURES).to(dtype).requires_grad_()
    targets = torch.randint(VOCABULARY, (tokens,))
    loss = linear_cross_entropy(hidden, weight, targets, reduction="sum", chunk_tokens=chunk)
    assert loss.dtype == torch.float32
    got = torch.autograd.grad(loss, (hidden, weight))
    wide = [t.detach().double().requires_grad_() for t in (hidden, weight)]
    z = F.linear(*wide)
    expected = torch.autograd.grad(F.cross_entropy(z, targets, reduction="sum"), wide)
    for g, e in zip(got, expected, strict=True):
        assert g.dtype == dtype
        size = e.abs().mean()
        assert (g.double() - e).abs().max() < 8 * torch.finfo(dtype).eps * max(size, e.abs().max())


class LargestTensor(TorchDispatchMode):
    """Remembers how many elements the largest result had."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(t, torch.Tensor):
                self.elements = max(self.elements, t.untyped_storage().nbytes() // t.element_size())
        return out


def test_logits_never_exist_at_once():
    tokens, vocabulary, chunk = 64, 640, 8
    hidden, weight = torch.randn(tokens, 16, requires_grad=True), torch.randn(vocabulary, 16, requires_grad=True)
    targets = torch.randint(vocabulary, (tokens,))
    with LargestTensor() as largest:
        gs = torch.autograd.grad(
            linear_cross_entropy(hidden, weight, targets, chunk_tokens=chunk), (hidden, weight), create_graph=True
        )
        torch.autograd.grad(gs, (hidden, weight), [torch.ones_like(g) for g in gs])
        jvp(
            grad(lambda h: linear_cross_entropy(h, weight.detach(), targets, chunk_tokens=chunk)),
            (hidden.detach(),),
            (torch.ones_like(hidden),),
        )
    assert largest.elements == 2 * chunk * vocabulary < tokens * vocabulary
    assert default_chunk(vocabulary) > chunk


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile(targets, backend):
    hidden = torch.randn(TOKENS, FEATURES, requires_grad=True)
    weight = torch.randn(VOCABULARY, FEATURES, requires_grad=True)

    def step(h, w):
        return linear_cross_entropy(h, w, targets, chunk_tokens=4) + 2 * cross_entropy(h @ w.t(), targets)

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend=backend)
    with torch_compile_blamed(backend):
        for function in (compiled, step):
            torch.testing.assert_close(
                torch.autograd.grad(function(hidden, weight), (hidden, weight)),
                torch.autograd.grad(3 * F.cross_entropy(F.linear(hidden, weight), targets), (hidden, weight)),
            )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck_of_rows(dtype):
    for name, op, args in logits_calls(dtype):
        if name.startswith("3x4096"):  # opcheck takes no NaN for an answer
            with_grad = op != "cross_entropy_dual"
            args = [
                a.clone().requires_grad_() if with_grad and isinstance(a, torch.Tensor) and a.is_floating_point() else a
                for a in args
            ]
            opcheck(getattr(torch.ops.qatkernels, op).default, tuple(args))


def test_opcheck_of_the_linear_ops(targets):
    h, w, g = (torch.randn(s, requires_grad=True) for s in ((TOKENS, FEATURES), (VOCABULARY, FEATURES), (TOKENS,)))
    th, tw = torch.randn_like(h).requires_grad_(), torch.randn_like(w).requires_grad_()
    lse = torch.logsumexp(h.detach() @ w.detach().t(), 1)
    point, ops = (h, w, lse, targets, -100, 4), torch.ops.qatkernels
    opcheck(ops.linear_cross_entropy.default, (h, w, targets, -100, 4))
    for want in ((True, True), (True, False), (False, True)):
        opcheck(ops.linear_cross_entropy_backward.default, (g, *point, *want))
    opcheck(ops.linear_cross_entropy_jvp.default, (th, None, *point))
    for along in ((th, tw, g), (None, tw, None)):
        opcheck(ops.linear_cross_entropy_hvp.default, (*along, g, *point, True, True))


def test_ignored_tokens_and_targets_outside():
    logits = torch.randn(4, VOCABULARY)
    logits[0], logits[1, 0] = torch.nan, torch.inf
    targets = torch.tensor([-100, -100, 3, VOCABULARY])
    losses = cross_entropy(logits, targets, reduction="none")
    assert losses[:2].tolist() == [0, 0]
    assert losses[2:].isnan().tolist() == [False, True]
    g = grad(lambda z: cross_entropy(z, targets, reduction="sum"))(logits)
    assert g[:2].eq(0).all()
    assert g[2].isfinite().all()
    assert g[3].isnan().all()
    assert cross_entropy(torch.randn(2, 5), torch.tensor([-100, -100])).isnan()
    assert cross_entropy(torch.randn(0, 5), torch.empty(0, dtype=torch.int64), reduction="sum") == 0


def test_large_logits_do_not_overflow():
    logits = torch.tensor([[1e4, -1e4, 9999.0], [-3e38, 3e38, 0.0]])
    targets = torch.tensor([2, 1])
    torch.testing.assert_close(
        cross_entropy(logits, targets, reduction="none"), F.cross_entropy(logits, targets, reduction="none")
    )


def test_autocast():
    hidden, weight = torch.randn(TOKENS, FEATURES), torch.randn(VOCABULARY, FEATURES, requires_grad=True)
    targets = torch.arange(TOKENS)
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy(hidden, weight, targets)
    rounded = F.linear(hidden.bfloat16(), weight.bfloat16()).float()
    torch.testing.assert_close(loss, F.cross_entropy(rounded, targets))
    loss.backward()
    assert weight.grad.dtype == torch.float32


Z, T = torch.randn(4, 5), torch.tensor([0, 1, 2, 3])


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: cross_entropy(Z, T[:3]), ValueError, r"targets has shape \(3,\), must be \(4,\)"),
        (lambda: cross_entropy(Z, T, reduction="max"), ValueError, r"reduction is 'max'"),
        (lambda: cross_entropy(Z, T.int()), RuntimeError, r"targets is torch.int32"),
        (lambda: cross_entropy(Z.int(), T), RuntimeError, r"logits is torch.int32|must be torch.float32"),
        (lambda: cross_entropy(Z[:, :0], T), ValueError, r"logits has shape \(4, 0\).*vocabulary"),
        (lambda: linear_cross_entropy(Z, Z[:, :4], T), ValueError, r"hidden has shape \(4, 5\) and weight \(4, 4\)"),
        (lambda: linear_cross_entropy(Z, Z, T[:2]), ValueError, r"targets has shape \(2,\)"),
        (lambda: linear_cross_entropy(Z, Z, T, chunk_tokens=0), ValueError, r"chunk_tokens is 0"),
        (lambda: linear_cross_entropy(Z, Z.double(), T), RuntimeError, r"expected|weight is torch.float64"),
    ],
)
def test_errors(call, error, words):
    with pytest.raises(error, match=words):
        call()
