"""Contracts: Python and the extension read one text, refuse the same calls in the same words, and agree on outputs."""

import itertools

import pytest
import torch

from qatkernels.backends import CONDITIONS, IMPLS
from qatkernels.grids import lsq
from qatkernels.ops import quant_linear_dual
from qatkernels.ops._op import OPS, as_tuple
from qatkernels.ops.contract import Contract
from qatkernels.testing.samples import complete_calls

COMPILED = sorted(op for op in OPS if "cpp" in IMPLS[op])
#: What a call may have in place of a number.
NUMBERS = (-200, -1, 0, 1, 2, 5, 9, 127, 200, 2**61)
REALS = (-0.5, 0.0, 0.5, 1.5, 1e-7, 123456.0, float("inf"), float("nan"))


def tensors_like(t):
    """Yield tensors that differ from one in one respect."""
    for dtype in (
        torch.float32, torch.bfloat16, torch.float64, torch.int8, torch.uint8, torch.int32, torch.int64, torch.bool,
        torch.int16, torch.complex64,
    ):  # fmt: skip
        if dtype != t.dtype:
            yield t.to(dtype)
    yield t[None]
    yield t.new_zeros(())
    yield t.new_zeros(0)
    for dim in range(t.ndim):
        yield t.narrow(dim, 0, max(t.shape[dim] - 1, 0)).contiguous()
        yield torch.cat([t, t], dim)
    if t.ndim > 1:
        yield t.mT.contiguous().mT


def replacements(kind, value):
    """Yield what a mistaken caller may give in place of an argument, None where it is optional."""
    if kind.endswith("?"):
        yield None
    kind = kind.removesuffix("?")
    if kind.startswith("Tensor"):
        yield from tensors_like(value if value is not None else torch.zeros(2, 3))
    elif kind == "int":
        yield from NUMBERS
    elif kind == "float":
        yield from REALS
    elif kind == "float[]":
        yield value[:-1]
    elif kind == "ScalarType":
        yield from (torch.float32, torch.bfloat16, torch.float64, torch.int8)


def outcome(function, *args):
    """Return the error of a call, its type and its words, or what it returned."""
    try:
        return function(*args)
    except (RuntimeError, ValueError) as error:
        return type(error), str(error).split("\n")[0]


def refused(found):
    return isinstance(found, tuple) and found and isinstance(found[0], type)


@pytest.mark.parametrize("op", COMPILED)
def test_the_extension_says_what_python_says(op):
    declared, tried = OPS[op], 0
    for args in complete_calls(op, "cpu")[:2]:
        for i, kind in enumerate(declared.parameters.values()):
            for value in replacements(kind, args[i]):
                given = [a.clone() if isinstance(a, torch.Tensor) else a for a in (*args[:i], value, *args[i + 1 :])]
                said = outcome(declared.contract.specs, given)
                found = outcome(IMPLS[op]["cpp"], *given)
                what = f"{op}, argument {i} is {value if not isinstance(value, torch.Tensor) else value.shape}"
                tried += 1
                if refused(said):
                    assert found == said, what
                elif not refused(found):
                    named = zip(declared.outputs, as_tuple(found), strict=True)
                    outputs = [(name, tuple(t.shape), t.dtype) for name, t in named]
                    assert outputs == [tuple(spec) for spec in said], what
                else:
                    # What only a look at numbers, or an allocation, can tell.
                    assert "must ascend" in found[1] or "more bytes than" in found[1], f"{what}: {found}"
    assert tried > 10


@pytest.mark.parametrize("op", [op for op in COMPILED if OPS[op].outputs])
def test_outputs_that_do_not_fit_are_refused_with_the_same_words(op):
    declared = OPS[op]
    args = complete_calls(op, "cpu")[0]
    right = as_tuple(declared.meta(*args))
    for i, t in enumerate(right):
        for value in itertools.islice(tensors_like(t), 12):
            given = [value if i == j else r.clone() for j, r in enumerate(right)]
            said = outcome(declared.contract.check_outputs, args, given)
            found = outcome(IMPLS[f"{op}_out"]["cpp"], *args, *given)
            assert found == said, f"{op}, output {i}: {value.dtype} {tuple(value.shape)}"


def test_conditions_are_of_ops_that_are_declared():
    assert set(CONDITIONS) <= set(OPS)


def test_a_contract_of_an_argument_that_is_not_there():
    with pytest.raises(ValueError, match=r"'y: float' is of no argument of \['x'\]"):
        Contract("y: float", {"x": "Tensor"})


def test_every_tensor_has_a_statement():
    with pytest.raises(ValueError, match=r"says nothing of \['y'\]"):
        Contract("x: float", {"x": "Tensor", "y": "Tensor?"})


def test_a_transposed_product_with_a_weight_without_rows():
    x, w, scale = torch.randn(3, 0), torch.randn(0, 24), torch.ones(0)
    for tangent in (None, torch.randn(3, 0)):
        y, dy = quant_linear_dual(x, w, scale, lsq(4), transposed=True, tangent_x=tangent)
        assert torch.equal(y, torch.zeros(3, 24))
        assert torch.equal(dy, torch.zeros(3, 24))


def test_messages_show_what_is_known():
    contract = Contract(
        """
        x: float [*T, K]
        w: like(x) [E if more, N, row_bytes(K, bits)]
        require bits > 1; bits is {bits}, must be above 1 for {T} and {numel(T)}
        -> out: like(x) [*T, N] if more else [0]
        """,
        {"x": "Tensor", "w": "Tensor", "more": "bool", "bits": "int"},
    )
    x = torch.zeros(2, 3, 16)
    assert contract.specs((x, torch.zeros(5, 4), False, 2)) == [("out", (0,), torch.float32)]
    assert contract.specs((x, torch.zeros(7, 5, 4), True, 2)) == [("out", (2, 3, 5), torch.float32)]
    with pytest.raises(RuntimeError, match=r"^w has shape \(5, 4\), must be \(E, N, 4\)$"):
        contract.check((x, torch.zeros(5, 4), True, 2))
    with pytest.raises(RuntimeError, match=r"^bits is 1, must be above 1 for \(2, 3\) and 6$"):
        contract.check((x, torch.zeros(5, 2), False, 1))
    with pytest.raises(RuntimeError, match=r"^w is torch.float64, must be torch.float32$"):
        contract.check((x, torch.zeros(5, 4).double(), False, 2))
