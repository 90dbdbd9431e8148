"""Whether an implementation takes tensors of any strides: generated from the schemas, for each argument of each op."""

import pytest
import torch

from qatkernels.backends import CONDITIONS, IMPLS
from qatkernels.ops._op import OPS, as_tuple
from qatkernels.ops.samples import complete_calls
from tests.compare import assert_same_bits, poisoned

#: Arguments that are changed in place, or read beside one that is: refused unless they are contiguous.
CONTIGUOUS = {
    ("reset_", "w"),
    ("perturb_", "w"), ("perturb_", "g"),
    ("perturb_swap_", "w"), ("perturb_swap_", "g"),
    ("perturbation_norms", "g"), ("perturbation_norms", "w"),
}  # fmt: skip


def views(t):
    """Views of several layouts; all but the last have the values of ``t``, no two neighbours have one address apart."""
    other = torch.full_like(t, torch.nan if t.is_floating_point() else 1)
    yield "every other element", torch.stack([t, other], -1)[..., 0]
    if t.ndim > 1:
        yield "transposed", t.mT.contiguous().mT
        yield "a slice of longer rows", torch.cat([t, other], -1)[..., : t.shape[-1]]
    yield "repeated", t[..., :1].expand_as(t)


def run(impl, op, args, out):
    """Return what an implementation writes: its outputs, and what it changes in place."""
    if out:
        outputs = poisoned(OPS[op].fake(*args))
        impl(*args, *as_tuple(outputs))
    else:
        outputs = impl(*args)
    changed = [a for a, kind in zip(args, OPS[op].parameters.values(), strict=True) if "!" in kind]
    return [*as_tuple(outputs), *changed]


def forms(op, backend):
    """Return the implementations of one backend: the op and, where there is one, its twin; the latter is marked."""
    found = [(IMPLS[name].get(backend), name != op) for name in OPS[op].schemas]
    return [(impl, out) for impl, out in found if impl is not None]


def assert_equal(actual, expected, exact, what):
    if exact or not expected.is_floating_point():
        assert_same_bits(actual, expected, what)
        return
    bound = 1e-5 * expected.nan_to_num(0.0).abs().max().item() if expected.numel() else 0.0
    torch.testing.assert_close(actual, expected, rtol=0, atol=bound, equal_nan=True, msg=lambda m: f"{what}: {m}")


def check_strides(op, backend, device="cpu"):
    """Hold one backend's results for strided arguments against those for contiguous ones of equal values.

    Kernels must give the same bits. The reference is plain PyTorch, whose sums depend on the layout: there it is a
    bound far below what one wrong element makes.
    """
    tried = set()
    serves = CONDITIONS.get(op, {}).get(backend, lambda *args: True)
    for args in complete_calls(op, device):
        for i, (name, t) in enumerate(zip(OPS[op].parameters, args, strict=True)):
            if not isinstance(t, torch.Tensor):
                continue
            tried.add(name)
            for layout, view in views(t) if t.numel() > 1 else ():
                if view.is_contiguous():
                    continue
                for impl, out in forms(op, backend):
                    if serves(*args):
                        what = f"{op}{'_out' if out else ''} on {backend}, {name}: {layout}"
                        check_one(op, backend, impl, out, args, i, name, view, what)
    tensors = {name for name, kind in OPS[op].parameters.items() if kind.startswith("Tensor")}
    assert tried == tensors, f"complete_calls of {op} in qatkernels/ops/samples.py leaves out {tensors - tried}"


def check_one(op, backend, impl, out, args, i, name, view, what):
    given, copy = (tuple(v if j == i else clone(a) for j, a in enumerate(args)) for v in (view, view.contiguous()))
    if (op, name) in CONTIGUOUS:
        with pytest.raises((RuntimeError, ValueError), match="contiguous"):
            (IMPLS[op][backend] if backend != "reference" else getattr(torch.ops.qatkernels, op))(*given)
        return
    actual, expected = run(impl, op, given, out), run(impl, op, copy, out)
    for a, e in zip(actual, expected, strict=True):
        assert_equal(a, e, backend != "reference", what)


def clone(a):
    return a.clone() if isinstance(a, torch.Tensor) else a


def check_strided_outputs(op, backend, device="cpu"):
    """An output that is not contiguous is refused, and nothing around it is touched."""
    args = complete_calls(op, device)[0]
    impl = IMPLS[f"{op}_out"][backend]
    for i, output in enumerate(as_tuple(OPS[op].fake(*args))):
        if output.numel() < 2:
            continue
        outputs = list(as_tuple(OPS[op].fake(*args)))
        memory = torch.zeros((*output.shape, 2), dtype=output.dtype, device=output.device)
        outputs[i] = memory[..., 0]
        with pytest.raises((RuntimeError, ValueError), match=r"contiguous"):
            impl(*args, *outputs)
        assert not memory.any(), f"{op}_out on {backend} wrote into an output that it refused"
