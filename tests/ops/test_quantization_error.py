"""The error of quantizing a weight: its values, its order of additions, and what it refuses."""

import pytest
import torch
from torch.library import opcheck

from qatkernels.backends import IMPLS
from qatkernels.grids import affine, lsq, seq
from qatkernels.ops import fake_quantize, quantization_error
from qatkernels.ops._op import OPS
from qatkernels.testing.compare import assert_same_bits, check_error, run_out, special_calls
from qatkernels.testing.samples import GRIDS, complete_calls, make
from tests.implementations import implementations, moved, samples_on

SAMPLES = samples_on(torch.device("cpu"))


@pytest.mark.backends
@pytest.mark.parametrize("index", range(len(SAMPLES)), ids=[s.name for s in SAMPLES])
def test_is_the_reference(index):
    for _, impl, device in implementations("quantization_error"):
        *tensors, moments, constants = samples_on(device)[index].args("quantization_error")
        for each in (None, moments):
            check_error(impl, (*tensors, each, constants))


@pytest.mark.backends
@pytest.mark.parametrize("grid", GRIDS, ids=lambda g: f"{g.scheme}{g.bits}")
def test_special_values(grid):
    for dtype in (torch.float32, torch.float16, torch.float64):
        w, scale, zero_point, constants = special_calls(grid, dtype)["quantize"][:4]
        for _, impl, device in implementations("quantization_error"):
            check_error(impl, moved((w, scale, zero_point, None, constants), device))


@pytest.mark.parametrize("group_size", [None, 16])
def test_is_the_sum_of_squared_errors(group_size):
    """Against the quantized weight, for rows and groups, an expert's moments only for its own weights."""
    w, moments = torch.randn(3, 5, 48), torch.rand(3, 48, dtype=torch.float64)
    grid = affine(3)
    scale = grid.init_scale(w, group_size) * 0.7
    zero_point = grid.init_zero_point(w, scale, group_size)
    y = fake_quantize(w, scale, grid, group_size=group_size, zero_point=zero_point)
    for each, of_weights in ((None, 1.0), (moments, moments[:, None])):
        wanted = ((w - y).double().square() * of_weights).view(*scale.shape, -1).sum(-1)
        found = quantization_error(w, scale, grid, group_size=group_size, zero_point=zero_point, moments=each)
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=0)


def test_one_scale_for_all_and_one_for_each_expert():
    w, moments = torch.randn(4, 7, 33), torch.rand(4, 33, dtype=torch.float64)
    of_rows = quantization_error(w, torch.full((4, 7), 0.8), seq(2), moments=moments)
    of_experts = quantization_error(w, torch.full((4,), 0.8), seq(2), moments=moments)
    torch.testing.assert_close(of_experts, of_rows.sum(1), rtol=1e-12, atol=0)
    of_all = quantization_error(w, torch.tensor(0.8), seq(2), moments=moments)
    torch.testing.assert_close(of_all, of_rows.sum(), rtol=1e-12, atol=0)


def test_threads_change_no_bit():
    threads = torch.get_num_threads()
    for sample in (make(affine(4), (37, 5000)), make(seq(2), (300, 1000), granularity="tensor")):
        *tensors, moments, constants = sample.args("quantization_error")
        for each in (None, moments):
            results = []
            for count in (1, 2, 3):
                torch.set_num_threads(count)
                args = (*tensors, each, constants)
                results += run_out("quantization_error", IMPLS["quantization_error_out"]["cpp"], args)
            torch.set_num_threads(threads)
            for other in results[1:]:
                assert_same_bits(other, results[0], sample.name)


def test_empty_weights():
    for shape in ((0, 8), (3, 0)):
        w, scale = torch.empty(shape), torch.ones(shape[:1])
        found = quantization_error(w, scale, lsq(4), moments=torch.ones(shape[-1], dtype=torch.float64))
        assert torch.equal(found, torch.zeros(shape[:1], dtype=torch.float64))


def test_opcheck():
    for args in complete_calls("quantization_error"):
        opcheck(torch.ops.qatkernels.quantization_error.default, args)


@pytest.mark.parametrize(
    ("moments", "message"),
    [
        (torch.ones(8), "moments is torch.float32, must be torch.float64"),
        (torch.ones(7, dtype=torch.float64), r"moments has shape \(7,\), must be \(\.\.\., 8\)"),
        (torch.ones(3, 8, dtype=torch.float64), "moments has 3 rows, must divide the 4 rows of the weight"),
    ],
)
def test_refusals(moments, message):
    w = torch.randn(4, 8)
    for each in (torch.ops.qatkernels.quantization_error, OPS["quantization_error"].meta):  # checked in C++, in Python
        with pytest.raises(RuntimeError, match=message):
            each(w, torch.ones(4), None, moments, list(lsq(4).constants))
    with pytest.raises(RuntimeError, match="scale has 3 elements, must divide the 32 elements"):
        torch.ops.qatkernels.quantization_error(w, torch.ones(3), None, None, list(lsq(4).constants))
