"""On a GPU: products, spectra and every place for the basis, against the CPU."""

import copy

import pytest
import torch

from qatkernels.hessian import HessianOperator, eigs, spectrum, trace
from qatkernels.nn import QuantConfig, quantize_model
from qatkernels.ops import cross_entropy
from qatkernels.trainer.demo_model import ModelConfig, Transformer
from tests.implementations import GPU

pytestmark = pytest.mark.gpu


def operators(**options):
    model = quantize_model(Transformer(ModelConfig(64, 2, 2, 32, 50)), QuantConfig(2))
    tokens = torch.randint(50, (4, 33))

    def loss(m, t):
        return cross_entropy(m(t[:, :-1]), t[:, 1:])

    there = copy.deepcopy(model).to(GPU)
    return (
        HessianOperator(model, loss, [tokens], dtype=torch.float64),
        HessianOperator(there, loss, [tokens.to(GPU)], **options),
    )


OPTIONS = ({}, {"engine": "forward"}, {"checkpoint": True}, {"dtype": torch.float64})


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_products(options):
    here, there = operators(**options)
    v = torch.randn(here.n, dtype=torch.float64)
    wanted = here.matvec(v)
    found = there.matvec(v.to(GPU, there.dtype)).cpu().double()
    assert (found - wanted).norm() < (1e-9 if "dtype" in options else 1e-4) * wanted.norm()


@pytest.mark.parametrize("basis", [{}, {"basis_device": "cpu"}, {"basis_dtype": torch.bfloat16}], ids=str)
def test_spectrum(basis):
    here, there = operators()
    wanted, found = spectrum(here, 2, 30), spectrum(there, 2, 30, **basis)
    assert found.lambda_max == pytest.approx(wanted.lambda_max, rel=1e-3)
    assert found.lambda_min == pytest.approx(wanted.lambda_min, rel=1e-2, abs=1e-4)
    assert found.trace.value == pytest.approx(wanted.trace.value, rel=1e-2, abs=wanted.trace.error)


def test_eigenpairs_and_trace():
    here, there = operators()
    torch.testing.assert_close(eigs(there, 2).values, eigs(here, 2).values, rtol=1e-4, atol=1e-5)
    mine, yours = trace(there, 20), trace(here, 20)
    assert mine.value == pytest.approx(yours.value, rel=1e-3)
    assert trace(there, 20, "hutch++").error >= 0
