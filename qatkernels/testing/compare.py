"""How results of one implementation are held against the meaning of the op."""

from contextlib import contextmanager

import torch
import torch.nn.functional as F

from qatkernels.ops._op import OPS, as_tuple
from qatkernels.ops.fake_quantize import Rows

#: Additions that a float32 sum may take one after the other before it goes to float64 or up a tree; the error of a sum
#: is below this times the unit roundoff times the sum of magnitudes.
SEQUENTIAL_ADDITIONS = 128


def poisoned(outputs):
    """Fill outputs with NaN, or the largest integer."""
    for out in as_tuple(outputs):
        out.fill_(torch.nan if out.is_floating_point() else torch.iinfo(out.dtype).max)
    return outputs


def run_out(op, impl_out, args):
    """Run an `_out` implementation into poisoned memory and return the outputs."""
    outputs = poisoned(OPS[op].meta(*args))
    impl_out(*args, *as_tuple(outputs))
    return as_tuple(outputs)


def assert_same_bits(actual, expected, what=""):
    """Equal bit for bit, any NaN equal to any other."""
    assert actual.shape == expected.shape, what
    assert actual.dtype == expected.dtype, what
    if actual.is_floating_point():
        assert torch.equal(actual.isnan(), expected.isnan()), f"{what}: NaN in different places"
        actual, expected = actual.nan_to_num(nan=0.0), expected.nan_to_num(nan=0.0)
        assert torch.equal(actual.signbit(), expected.signbit()), f"{what}: signs differ"
    different = actual != expected
    assert not different.any(), (
        f"{what}: {int(different.sum())} of {actual.numel()} differ, "
        f"first {actual[different][0].item()!r} for {expected[different][0].item()!r}"
    )


@contextmanager
def torch_compile_blamed(backend):
    """Let a failing comparison of compiled with eager code say whether torch's compiler fails on plain torch too."""
    try:
        yield
    except AssertionError as error:
        wrong = _compiles_a_linear_layer_wrong(backend)
        verdict = (
            "wrong about a plain nn.Linear too: the fault is its own (docs/training.md, torch.compile on CPUs)"
            if wrong
            else "right about a plain nn.Linear: the fault is here"
        )
        raise AssertionError(f"{error}\ntorch.compile with {backend} is {verdict}") from error


def _compiles_a_linear_layer_wrong(backend):
    """Whether the compiled gradients of a linear layer are not the eager ones; 24 features are no whole registers."""

    def gradients(call):
        x, w, b = (torch.ones(shape, requires_grad=True) for shape in ((6, 32), (24, 32), (24,)))
        y = call(x, w, b)
        y.backward(torch.ones_like(y))
        return x.grad, w.grad, b.grad

    torch._dynamo.reset()
    compiled = gradients(torch.compile(lambda x, w, b: F.linear(x, w, b), fullgraph=True, backend=backend))
    return any(not torch.equal(a, b) for a, b in zip(compiled, gradients(F.linear), strict=True))


def run_in_place(impl, args):
    """Run an op in place on copies of its tensors and return them as they are afterwards."""
    args = [a.clone() if isinstance(a, torch.Tensor) else a for a in args]
    impl(*args)
    return [a for a in args if isinstance(a, torch.Tensor)]


def check_in_place(op, impl, args, what=""):
    """Hold an implementation of an op in place against the reference: every tensor, changed or not, bit for bit."""
    expected = run_in_place(OPS[op].reference, [a.cpu() if isinstance(a, torch.Tensor) else a for a in args])
    for actual, wanted in zip(run_in_place(impl, args), expected, strict=True):
        assert_same_bits(actual.cpu(), wanted, f"{op} {what}")


def check_norms(impl_out, g, w, eta):
    """Hold sums of squares against float64 ones, to the rounding of their additions and of each square."""
    (actual,) = run_out("perturbation_norms", impl_out, (g, w, eta))
    expected = OPS["perturbation_norms"].reference(g.cpu(), None if w is None else w.cpu(), eta)
    bound = (SEQUENTIAL_ADDITIONS + 8) * torch.finfo(torch.float64 if g.dtype == torch.float64 else torch.float32).eps
    assert_within(actual.cpu(), expected, bound * expected + 1e-300, "perturbation_norms")


def scale_gradients(sample):
    """Return (ds, its error bound, dz, its error bound) with exact summands, summed in float64."""
    w, scale, zero_point, seed, grid, noise, scale_noise, grad_scale = sample.point
    rows = Rows(w, scale, zero_point, seed, tuple(grid), noise, scale_noise)
    g = rows.view(sample.upstream()).double()
    below, above = rows.masks()
    unit = torch.finfo(rows.dtype).eps / 2

    def total(summand):
        products = g * summand.double()
        bound = (
            SEQUENTIAL_ADDITIONS * unit * products.abs().sum(-1)
            + 2 * torch.finfo(scale.dtype).eps * products.sum(-1).abs()
        )
        return (products.sum(-1) * grad_scale).view(scale.shape), (bound * grad_scale).view(scale.shape)

    return *total(rows.scale_derivative()), *total(torch.where(below | above, -rows.scale, 0.0))


def assert_within(actual, expected, bound, what=""):
    """Finite and no further from a float64 expectation than a bound, element by element."""
    error = (actual.double() - expected).abs()
    assert bool((error <= bound).all()), f"{what}: error {error.max().item():.3g} beyond {bound.max().item():.3g}"


def check_sample(op, impl_out, sample):
    """Hold one `_out` implementation of an op of the fake-quantize family against the reference on one sample."""
    args = sample.args(op)
    actual = run_out(op, impl_out, args)
    expected = as_tuple(OPS[op].reference(*args))
    assert_same_bits(actual[0], expected[0], f"{op} {sample.name} {OPS[op].outputs[0]}")
    if op == "fake_quantize_dual":
        assert_same_bits(actual[1], expected[1], f"{op} {sample.name} {OPS[op].outputs[1]}")
    if op == "fake_quantize_backward":
        ds, ds_bound, dz, dz_bound = scale_gradients(sample)
        assert_within(actual[1], ds, ds_bound, f"{op} {sample.name} ds")
        if sample.zero_point is not None:
            assert_within(actual[2], dz, dz_bound, f"{op} {sample.name} dz")


def special_calls(grid, dtype):
    """Calls by op with ties of every level, both zeros, subnormals, the largest numbers, infinities and NaN.

    Scales go from below the floor to infinite; each row has one.
    """
    ties = [(k + 0.5 + grid.offset) / grid.steps for k in range(grid.code_min - 2, grid.code_max + 2)]
    edges = [*grid.clamp, *grid.passes, *grid.values[:4]]
    info = torch.finfo(dtype)
    extremes = [0.0, -0.0, info.tiny, -info.tiny, info.tiny / 4, info.max, -info.max, torch.inf, -torch.inf, torch.nan]
    unit = torch.tensor(ties + edges, dtype=torch.float64)
    near = torch.cat([unit, unit * (1 + info.eps), unit * (1 - info.eps)])
    scale = torch.tensor([1.0, 0.5, 3.0, 0.01, 1e-5, 1e-7, 0.0, -2.0, 1e30, torch.inf, torch.nan], dtype=torch.float32)
    rows = [torch.cat([near * max(s, 1e-5), torch.tensor(extremes, dtype=torch.float64)]) for s in scale.tolist()]
    w = torch.stack(rows).to(dtype)
    zero_point = torch.full_like(scale, 3.0 if grid.bits < 8 else 100.0) if grid.has_zero_point else None
    constants = list(grid.constants)
    point = (w, scale, zero_point, None, constants, 0.0, 0.0, 1.0)
    return {
        "fake_quantize": (*point, None),
        "fake_quantize_backward": (torch.ones_like(w), *point),
        "quantize": (w, scale, zero_point, constants, grid.code_min, grid.code_max),
    }


def check_first_output(op, impl_out, args):
    """Hold the weight-sized output of an `_out` implementation against the reference, bit for bit."""
    on_cpu = [a.cpu() if isinstance(a, torch.Tensor) else a for a in args]
    expected = as_tuple(OPS[op].reference(*on_cpu))[0]
    assert_same_bits(run_out(op, impl_out, args)[0].cpu(), expected, op)


def _bound_of_rows(op, args, number):
    """Error bounds of the outputs of an op of cross_entropy.py, whose tensors are given in float64; unit roundoff 1.

    An exponential is off by what its argument is off by, and by a few units of its own. Where the dtype that it is
    computed in, ``number``, has no normal number for it, it is 0 (csrc/cpu/simd.h).
    """
    info = torch.finfo(number)
    *before, logits, lse, _, _ = args if op != "cross_entropy" else (args[0], torch.logsumexp(args[0], 1), *args[1:])
    x = logits - lse[:, None]
    p = x.exp()
    p_error = (p * (x.abs() + 8) * 4).nan_to_num(nan=0.0) + torch.where(p < 2 * info.smallest_normal, p / info.eps, 0.0)

    def sum_error(v):
        return ((p_error + SEQUENTIAL_ADDITIONS * p) * v.abs()).sum(1)

    if op == "cross_entropy":
        lse_error = sum_error(torch.ones_like(x)) + 4 * lse.abs()
        return lse_error + 8 * logits.nan_to_num(neginf=0.0).abs().amax(1), lse_error
    if op == "cross_entropy_backward":
        return (before[0].abs()[:, None] * (p_error + 4),)
    v = before[0]
    mean, mean_error = (p * v).sum(1), sum_error(v) + 2 * (p * v).sum(1).abs()
    loss_error = mean_error + 4 * v.abs().amax(1)
    if op == "cross_entropy_jvp":
        return (loss_error,)
    tangent_g, g = before[1:]
    second = g.abs()[:, None] * (
        (p_error + 8 * p) * (v.abs() + mean.abs()[:, None]) + (p + p_error) * mean_error[:, None]
    )
    if tangent_g is not None:
        second = second + tangent_g.abs()[:, None] * (p_error + 8)
    first = (g.abs()[:, None] * (p_error + 4),) if op == "cross_entropy_dual" else ()
    return (*first, second, loss_error)


def check_rows(op, impl_out, args, what=""):
    """Hold an `_out` implementation of an op of cross_entropy.py against the formula in float64."""
    actual = run_out(op, impl_out, args)
    wide = tuple(a.double().cpu() if _real(a) else a.cpu() if isinstance(a, torch.Tensor) else a for a in args)
    number = torch.float64 if any(_real(a) and a.dtype == torch.float64 for a in args) else torch.float32
    expected, bounds, unit = (
        as_tuple(OPS[op].reference(*wide)),
        _bound_of_rows(op, wide, number),
        torch.finfo(number).eps,
    )
    for name, a, e, bound in zip(OPS[op].outputs, actual, expected, bounds, strict=True):
        info = torch.finfo(a.dtype)
        bound = unit * bound + info.eps * (e.abs() + info.smallest_normal)
        assert torch.equal(a.isnan().cpu(), e.isnan()), f"{op} {what} {name}: NaN in different places"
        # Of a row that is ignored the outputs are exactly 0, whatever it holds.
        bound = bound.nan_to_num(nan=0.0)
        kept = ~e.isnan()
        assert_within(a.cpu()[kept], e[kept], bound.expand_as(e)[kept], f"{op} {what} {name}")


def _real(a):
    return isinstance(a, torch.Tensor) and a.is_floating_point()


def check_gram_schmidt(impl_out, args, what=""):
    """Hold an `_out` implementation of gram_schmidt against float64: one rounding of w, and sums of float64."""
    basis, w, h = (None if a is None else a.cpu() for a in args)
    w_new, dots, sq = (t.cpu() for t in run_out("gram_schmidt", impl_out, args))
    rows, eps = basis.double(), torch.finfo(torch.float64).eps
    unit = torch.finfo(w.dtype).eps
    if h is None:
        assert_same_bits(w_new, w, what)
    else:
        magnitude = w.double().abs() + h.abs() @ rows.abs()
        assert_within(w_new, w.double() - h @ rows, unit * w_new.double().abs() + (len(h) + 2) * eps * magnitude, what)
    x = w_new.double()
    terms = max(x.numel(), 1)
    assert_within(dots, rows @ x, terms * eps * (rows.abs() @ x.abs()), what)
    assert_within(sq, x @ x, terms * eps * (x @ x), what)


def check_linear_dual(impl_out, sample, tokens, transposed):
    """Hold an `_out` implementation of quant_linear_dual against products of the reference's weight in float64."""
    dtype = sample.dtype or sample.w.dtype
    generator = torch.Generator().manual_seed(3)
    shape = tokens, sample.w.shape[0 if transposed else 1]
    x, u = (torch.randn(shape, generator=generator).to(sample.w.device, dtype) for _ in range(2))
    for tangent_x, tangents in ((u, sample.tangents()), (None, sample.tangents()), (u, (None,) * 3)):
        got = run_out("quant_linear_dual", impl_out, (x, tangent_x, *tangents, *sample.point, transposed))
        q, v = (t.double() for t in OPS["fake_quantize_dual"].reference(*tangents, *sample.point, dtype))
        q, v = (q, v) if transposed else (q.t(), v.t())
        wide, along = x.double(), torch.zeros_like(x).double() if tangent_x is None else u.double()
        eps, least = torch.finfo(dtype).eps, torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
        for actual, exact, size in (
            (got[0], wide @ q, wide.abs() @ q.abs()),
            (got[1], wide @ v + along @ q, wide.abs() @ v.abs() + along.abs() @ q.abs()),
        ):
            # Sums in float32, whose order is the library's; two roundings to the dtype of x, whose numbers are
            # ``least`` apart at least.
            bound = 2 * eps * exact.abs() + len(q) ** 0.5 * 8 * min(eps, 2**-23) * size + eps * size / 4 + 2 * least
            assert ((actual.double() - exact).abs() <= bound).all(), sample.name


def grouped_meaning(op, a, b, ends):
    """Return a product of tokens with their experts' weights by its definition, one expert at a time."""
    parts = [slice(s, e) for s, e in zip((0, *ends), ends, strict=False)]
    if op == "grouped_outer":
        return torch.stack([a[p].T @ b[p] for p in parts]) if parts else a.new_zeros(0, a.shape[1], b.shape[1])
    w = b.mT if op == "grouped_linear" else b
    y = a.new_zeros(a.shape[0], w.shape[-1])
    for e, part in enumerate(parts):
        y[part] = a[part] @ w[e]
    return y


def check_grouped(op, impl_out, args, ends, device, what=""):
    """Hold an `_out` implementation of a grouped product against float64.

    A sum of n products is off by n roundings of the sum of their magnitudes, and is rounded to the dtype.
    """
    a, b = args
    expected = grouped_meaning(op, a.double(), b.double(), ends)
    terms = {"grouped_linear": a.shape[1], "grouped_linear_transposed": a.shape[1], "grouped_outer": a.shape[0]}[op]
    unit = torch.finfo(torch.float64 if a.dtype == torch.float64 else torch.float32).eps
    sums = max(terms, 16) * unit * grouped_meaning(op, a.double().abs(), b.double().abs(), ends)
    offsets = torch.tensor(ends, dtype=torch.int32, device=device)
    (actual,) = run_out(op, impl_out, (a.to(device), b.to(device), offsets))
    assert_within(actual.cpu(), expected, sums + torch.finfo(a.dtype).eps * expected.abs(), f"{op} {ends} {what}")
