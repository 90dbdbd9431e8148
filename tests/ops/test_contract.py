"""Contracts: Python and the extension read one text, refuse the same calls in the same words, and agree on outputs."""

import itertools
import random

import pytest
import torch

from qatkernels.backends import CONDITIONS, IMPLS
from qatkernels.backends.compiled import extension
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
    """Return the error of a call (its type and message), or what it returned."""
    try:
        return function(*args)
    except (RuntimeError, ValueError) as error:
        return type(error), str(error).split("\n")[0]


def refused(found):
    return isinstance(found, tuple) and found and isinstance(found[0], type)


def compare(op, args):
    """Call an op of the extension, and compare the error or the outputs with what the contract says in Python."""
    declared = OPS[op]
    given = [a.clone() if isinstance(a, torch.Tensor) else a for a in args]
    said = outcome(declared.contract.specs, given)
    found = outcome(IMPLS[op]["cpp"], *given)
    what = f"{op} of {[tuple(a.shape) if isinstance(a, torch.Tensor) else a for a in args]}"
    if refused(said):
        assert found == said, what
    elif not refused(found):
        named = zip(declared.outputs, as_tuple(found), strict=True)
        outputs = [(name, tuple(t.shape), t.dtype) for name, t in named]
        assert outputs == [tuple(spec) for spec in said], what
    else:
        # errors that depend on the contents of a tensor, or on memory, are not in contracts
        assert "must ascend" in found[1] or "more bytes than" in found[1], f"{what}: {found}"


@pytest.mark.parametrize("op", COMPILED)
def test_the_extension_says_what_python_says(op):
    tried = 0
    for args in complete_calls(op, "cpu")[:2]:
        for i, kind in enumerate(OPS[op].parameters.values()):
            for value in replacements(kind, args[i]):
                compare(op, (*args[:i], value, *args[i + 1 :]))
                tried += 1
    assert tried > 10


@pytest.mark.parametrize("op", COMPILED)
def test_of_two_wrong_arguments_both_name_the_same(op):
    """The order of the checks is the same."""
    pick = random.Random(op)
    kinds = list(OPS[op].parameters.values())
    args = complete_calls(op, "cpu")[0]
    wrong = [[i, value] for i, kind in enumerate(kinds) for value in replacements(kind, args[i])]
    for _ in range(150):
        call = list(args)
        for i, value in pick.sample(wrong, 2):
            call[i] = value
        compare(op, call)


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


# The language alone: an op of the extension that only checks its contract.
PARAMETERS = {
    "x": "Tensor", "y": "Tensor?", "a": "int", "b": "int?", "r": "float", "flag": "bool", "numbers": "float[]",
}  # fmt: skip
counter = itertools.count()


def both(text, args):
    """Return what Python and the extension say of a call by a contract: an error, or the outputs."""
    contract, name = Contract(text, PARAMETERS), f"contract_{next(counter)}"
    arguments = ", ".join(f"{kind} {parameter}" for parameter, kind in PARAMETERS.items())
    extension().state(name, f"{name}({arguments}) -> ()", contract.text)
    extension().declare_check("qatkernels_contracts", name, f"{name}({arguments}) -> str")

    def python(*args):
        return "".join(f"{name}: {dtype} {shape}\n" for name, shape, dtype in contract.specs(args))

    return outcome(python, *args), outcome(getattr(torch.ops.qatkernels_contracts, name), *args)


class Expressions:
    """Random expressions of the language."""

    def __init__(self, seed):
        self.random = random.Random(seed)

    def integer(self, depth):
        """Return an expression of integers that are not negative, small enough for exact products."""
        if depth == 0:
            return self.random.choice(["a", "K", "0", "3", "127", "len(T)", "numel(T)", "len(numbers)"])
        a, b = (self.integer(depth - 1) for _ in range(2))
        return self.random.choice([
            f"({a} + {b})", f"{a} * {b}", f"({a}) % 7", f"min({a}, {b})", f"row_bytes({a}, {b})", f"2 ** min({a}, 9)",
            f"({a} if {self.truth(depth - 1)} else {b})", f"({b} or {a})", f"({a} and {b})",
        ])  # fmt: skip

    def truth(self, depth):
        if depth == 0:
            return self.random.choice(["flag", "x", "y", "b is None", "y is not None", "numbers", "r < inf", "b == 2"])
        a, b = self.integer(depth - 1), self.integer(depth - 1)
        p, q = self.truth(depth - 1), self.truth(depth - 1)
        sign = self.random.choice(["<", "<=", ">", ">=", "==", "!="])
        return self.random.choice([
            f"{a} {sign} {b}", f"{a} {sign} r", f"-{a} {sign} {b} {sign} {a}", f"({p} and {q})", f"({p} or {q})",
            f"not {p}", f"({p} if {q} else not {p})", f"({b} {sign} 0.5)",
        ])  # fmt: skip


@pytest.mark.skipif(extension() is None, reason="the extension is not built")
@pytest.mark.parametrize("seed", range(8))
def test_random_expressions_have_one_value(seed):
    write = Expressions(seed)
    for _ in range(30):
        integer, truth = write.integer(3), write.truth(3)
        text = f"""
            x: float [*T, K]
            y: like(x)|int8 [*T, min(K, 2)]
            require not {truth}; {{{integer}}} {{{truth}}} {{b}} {{r}} {{flag}} {{x}} {{T}} {{-a}}
            let A = {integer}
            let P = {truth}
            -> out: wide(x) [*T, A] if P else [K, len(T)]
            -> other: code({integer}) [A * 2 if not P, {integer}, 2]
            """
        for _ in range(4):
            t = write.random.choice
            x = torch.zeros(*t([(), (2,), (0, 3)]), t([0, 1, 5]), dtype=t([torch.float32, torch.float16]))
            y = t([None, x[..., :2], x[..., :1].to(torch.int8), x.double()])
            r = t([-0.5, 0.0, 3.0, 1e300, float("inf"), float("nan")])
            args = (x, y, t([0, 1, 4, 200]), t([None, 0, 2]), r, t([True, False]), t([[], [1.0, 2.0]]))
            said, found = both(text, args)
            assert found == said, text


@pytest.mark.skipif(extension() is None, reason="the extension is not built")
def test_sizes_that_overflow_are_refused():
    """A product of sizes that does not fit 64 bits does not wrap around to a valid size."""
    x = torch.zeros(2)
    for size in ("a * a", "a ** 2", "a * a + 5", "row_bytes(a, a)", "min(a * a, a) * a"):
        said, found = both(f"x: float [*T, K]\ny: like(x) [{size}]", (x, torch.zeros(0), 2**40, None, 0.0, True, []))
        assert said[0] is found[0] is RuntimeError
        assert "y has shape (0,), must be (" in said[1]
        assert "y has shape (0,), must be (" in found[1]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("require a // 2 > 0; no", "FloorDiv, which the language does not have"),
        ("require a in (1, 2); no", "In, which|Tuple, which"),
        ("require flag == True; no", "the constant True, must be a number or None"),
        ("require a is b; no", "`is` compares with None only"),
        ("require r + 1 > 0; no", "arithmetic with r, must be of integers"),
        ("require a * 0.5 > 0; no", "arithmetic with 0.5, must be of integers"),
        ("require a < 1_000; no", "the number 1_000, must be digits"),
        ("require a < 1e3; no", "the number 1e3, must be digits"),
        ("require a < 0x10; no", "the number 0x10, must be digits"),
        ("require abs(a) > 0; no", r"the name abs|the call abs\(a\), must be of numel, len, min, row_bytes"),
        ("require K > 0; no", "the name K, must be an argument or a size from an earlier statement"),
        ("require a >; no", "is not an expression"),
        ("y: float [K, *T]", r"has a \* that is not in front"),
        ("y: float [a if flag else 2 if flag]", "has an if of its own, must be named by a let before"),
        ("y: bool", "has no dtype bool, must be float or one of"),
        ("y: like(z)", r"like\(z\) must be of 1 arguments"),
    ],
)
def test_what_the_extension_cannot_read_is_refused(line, message):
    with pytest.raises(ValueError, match=message):
        Contract(f"{line}\nx: float\ny: float", PARAMETERS)


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
