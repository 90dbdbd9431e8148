"""For each op, backend and tensor argument: a strided argument gives what a contiguous one of equal values gives."""

import pytest
import torch

from qatkernels.backends import IMPLS
from qatkernels.ops._op import OPS
from tests.strides import check_strided_outputs, check_strides

BACKENDS = {"reference": "cpu", "cpp": "cpu"} | (
    {"triton": "cuda", "cuda": "cuda"} if torch.cuda.is_available() else {}
)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_inputs(op, backend):
    if backend not in IMPLS[op]:
        pytest.skip(f"{op} has no {backend} kernel")
    check_strides(op, backend, BACKENDS[backend])


@pytest.mark.parametrize("op", [op for op in OPS if OPS[op].outputs])
@pytest.mark.parametrize("backend", BACKENDS)
def test_outputs(op, backend):
    if backend not in IMPLS[f"{op}_out"]:
        pytest.skip(f"{op} has no {backend} kernel")
    check_strided_outputs(op, backend, BACKENDS[backend])
