"""How results of one implementation are held against the meaning of the op."""

import torch

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
    outputs = poisoned(OPS[op].fake(*args))
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
