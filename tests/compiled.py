"""Tells whether a wrong result of torch.compile is a fault of this package or of torch."""

from contextlib import contextmanager

import torch
import torch.nn.functional as F


@contextmanager
def torch_compile_blamed(backend):
    """Add to a failed comparison of compiled and eager code whether torch's compiler also fails on plain torch code."""
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
    """Whether compiled gradients of a linear layer differ from eager ones. 24 features do not fill whole registers."""

    def gradients(call):
        x, w, b = (torch.ones(shape, requires_grad=True) for shape in ((6, 32), (24, 32), (24,)))
        y = call(x, w, b)
        y.backward(torch.ones_like(y))
        return x.grad, w.grad, b.grad

    torch._dynamo.reset()
    compiled = gradients(torch.compile(lambda x, w, b: F.linear(x, w, b), fullgraph=True, backend=backend))
    return any(not torch.equal(a, b) for a, b in zip(compiled, gradients(F.linear), strict=True))
