"""The smoke test of a new machine, on what is here."""

import pytest
import torch

from qatkernels.backends import IMPLS
from qatkernels.ops._op import OPS
from qatkernels.testing.checks import checks_on
from tests.implementations import implementations

NAMES = [(check.op, check.name) for check in checks_on(torch.device("cpu"))]


@pytest.mark.backends
@pytest.mark.parametrize("index", range(len(NAMES)), ids=["-".join(name).replace(" ", "-") for name in NAMES])
def test_check(index):
    for backend, impl, device in implementations(NAMES[index][0]):
        check = checks_on(device)[index]
        if backend not in check.refused_by:
            check.run(impl)


def test_every_op_with_a_kernel_is_checked():
    checked = {op for op, _ in NAMES}
    assert checked == {op for op in OPS if set(IMPLS[op]) != {"reference"}}


def test_a_check_can_fail():
    check = next(c for c in checks_on(torch.device("cpu")) if c.op == "fake_quantize")
    with pytest.raises(AssertionError):
        check.run(lambda *args: args[-1].zero_())
