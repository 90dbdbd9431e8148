"""What authors of backends get: a comparison that finds what is wrong, and examples that are true."""

import doctest
import importlib

import pytest
import torch

from qatkernels.testing import check_op, every_check

OPS = sorted({check.op for check in every_check(torch.device("cpu"))})


@pytest.mark.parametrize("name", ["samples", "compare", "checks"])
def test_examples(name):
    found = doctest.testmod(importlib.import_module(f"qatkernels.testing.{name}"))
    assert found.attempted
    assert not found.failed


def last_element_left(op):
    """What a kernel with a wrong bound does: it leaves the last element of an output, or of what it changes."""

    def kernel(*args):
        outputs = [a for a in args if isinstance(a, torch.Tensor)]
        last = outputs[0 if op.endswith("_") else -1]
        before = last.flatten()[-1].clone()
        getattr(torch.ops.qatkernels, op if op.endswith("_") else f"{op}_out")(*args)
        last.view(-1)[-1] = before

    return kernel


@pytest.mark.parametrize("op", ["fake_quantize", "lowbit_linear", "reset_", "pack"])
def test_one_element_that_is_wrong_is_found(op):
    with pytest.raises(AssertionError, match=rf"^{op}, "):
        check_op(op, last_element_left(op))


@pytest.mark.parametrize("op", OPS)
def test_what_torch_calls_is_right(op):
    assert check_op(op, getattr(torch.ops.qatkernels, op if op.endswith("_") else f"{op}_out")) >= 2


def test_unknown_op():
    with pytest.raises(ValueError, match=r"op is 'fake_quantise', must be one of cross_entropy, .*fake_quantize,"):
        check_op("fake_quantise", print)
