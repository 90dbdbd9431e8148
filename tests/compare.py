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
