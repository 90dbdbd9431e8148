"""Checks that an implementation takes tensors of any strides, for every tensor argument in an op's schema."""

import pytest
import torch

from qatkernels.backends import CONDITIONS, IMPLS
from qatkernels.ops._op import OPS, as_tuple
from qatkernels.testing.compare import assert_same_bits, poisoned
from qatkernels.testing.samples import complete_calls


def views(t):
    """Return strided views, each with whether its values are those of ``t``. A single element has none."""
    if t.numel() < 2:
        return []
    other = torch.full_like(t, torch.nan if t.is_floating_point() else 1)
    found = [("every other element", torch.stack([t, other], -1)[..., 0], True)]
    if t.ndim > 1:
        found.append(("transposed", t.mT.contiguous().mT, True))
        found.append(("a slice of longer rows", torch.cat([t, other], -1)[..., : t.shape[-1]], True))
    found.append(("repeated", t[..., :1].expand_as(t), False))
    return [view for view in found if not view[1].is_contiguous()]


def run(impl, op, args, out):
    """Return what an implementation writes: its outputs, and arguments that it changes in place."""
    if out:
        outputs = poisoned(OPS[op].meta(*args))
        impl(*args, *as_tuple(outputs))
    else:
        outputs = impl(*args)
    changed = [a for a, kind in zip(args, OPS[op].parameters.values(), strict=True) if "!" in kind]
    return [*as_tuple(outputs), *changed]


def forms(op, backend):
    """Return the implementations of a backend: the op, and its `_out` form if there is one, with a flag."""
    found = [(IMPLS[name].get(backend), name != op) for name in OPS[op].schemas]
    return [(impl, out) for impl, out in found if impl is not None]


def assert_equal(actual, expected, exact, what):
    if exact or not expected.is_floating_point():
        assert_same_bits(actual, expected, what)
        return
    bound = 1e-5 * expected.nan_to_num(0.0).abs().max().item() if expected.numel() else 0.0
    torch.testing.assert_close(actual, expected, rtol=0, atol=bound, equal_nan=True, msg=lambda m: f"{what}: {m}")


def check_strides(op, backend, device="cpu"):
    """Compare a backend's results for strided arguments with those for contiguous ones of equal values.

    Kernels must give the same bits. The reference is plain PyTorch, whose sums depend on the layout, so it has a bound
    far below the error of a single wrong element. The `_out` form is tested with every layout. The allocating form
    calls it, so one layout is enough.
    """
    tried = set()
    serves = CONDITIONS.get(op, {}).get(backend, lambda *args: True)
    for args in complete_calls(op, device):
        tensors = {name: i for i, name in enumerate(OPS[op].parameters) if isinstance(args[i], torch.Tensor)}
        tried |= set(tensors)
        if not serves(*args):
            continue
        for (impl, out), first in zip(reversed(forms(op, backend)), (False, True), strict=False):
            expected = run(impl, op, copied(args), out)
            for name, i in tensors.items():
                for layout, view, same in views(args[i])[: 1 if first else None]:
                    what = f"{op}{'_out' if out else ''} on {backend}, {name}: {layout}"
                    given = copied(args, i, view)
                    if "!" in OPS[op].parameters[name]:  # changed in place: must be contiguous
                        check_refused(op, backend, given)
                        continue
                    wanted = expected if same else run(impl, op, copied(args, i, view.contiguous()), out)
                    for a, e in zip(run(impl, op, given, out), wanted, strict=True):
                        assert_equal(a, e, backend != "reference", what)
    wanted = {name for name, kind in OPS[op].parameters.items() if kind.startswith("Tensor")}
    assert tried == wanted, f"complete_calls of {op} in qatkernels/testing/samples.py leaves out {wanted - tried}"


def copied(args, index=None, replacement=None):
    """Return copies of the arguments, which an op may change in place, with one of them replaced."""
    given = [a.clone() if isinstance(a, torch.Tensor) else a for a in args]
    if index is not None:
        given[index] = replacement
    return tuple(given)


def check_refused(op, backend, args):
    """Check that a call is refused. The reference is called as an op: its plain function checks nothing."""
    impl = IMPLS[op][backend] if backend != "reference" else getattr(torch.ops.qatkernels, op)
    with pytest.raises((RuntimeError, ValueError), match="contiguous"):
        impl(*args)


def check_strided_outputs(op, backend, device="cpu"):
    """Check that an output that is not contiguous is refused, and that memory around it does not change."""
    args = complete_calls(op, device)[0]
    impl = IMPLS[f"{op}_out"][backend]
    for i, output in enumerate(as_tuple(OPS[op].meta(*args))):
        if output.numel() < 2:
            continue
        outputs = list(as_tuple(OPS[op].meta(*args)))
        memory = torch.zeros((*output.shape, 2), dtype=output.dtype, device=output.device)
        outputs[i] = memory[..., 0]
        with pytest.raises((RuntimeError, ValueError), match=r"contiguous"):
            impl(*args, *outputs)
        assert not memory.any(), f"{op}_out on {backend} wrote into an output that it refused"
