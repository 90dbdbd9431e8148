"""The PTX by which the Triton kernels divide, run instruction by instruction, against division in IEEE arithmetic.

Neither Triton's interpreter nor its compiler runs it, so this does, with the C library's fused multiply-add.
"""

import ctypes
import ctypes.util
import struct

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from qatkernels.backends.triton._element import QUOTIENTS, QUOTIENTS_TINY

FMA = ctypes.CDLL(ctypes.util.find_library("m")).fmaf
FMA.restype, FMA.argtypes = ctypes.c_float, [ctypes.c_float] * 3
COMPARISONS = {
    "ne": lambda a, b: a != b and a == a and b == b, "lt": lambda a, b: a < b, "nan": lambda a, b: a != a or b != b,
}  # fmt: skip


def immediate(text):
    return np.float32(struct.unpack(">f", bytes.fromhex(text[2:]))[0])


def run(ptx, a, b, reciprocals):
    """Return the quotients, and whether the divisions at the end ran."""
    inputs = [*a, *b, *reciprocals]
    registers = {f"${i + 4}": np.float32(v) for i, v in enumerate(inputs)}
    body = ptx.strip("{}").replace("done:", "")
    divided = False
    for text in filter(None, map(str.strip, body.split(";"))):
        name, _, operands = text.partition(" ")
        if name == ".reg":
            continue
        if name == "@!again":
            divided = registers["again"]
            if not divided:
                break
            continue
        to, *sources = [part.strip() for part in operands.split(",")]
        values = [registers[s] if s in registers else immediate(s) for s in sources]
        kind = name.split(".")
        if kind[0] == "setp":
            found = COMPARISONS[kind[1]](*values[:2])
            combined = {"or": any, "and": all}.get(kind[2])
            registers[to] = bool(combined([found, values[2]]) if combined else found)
        elif kind[0] == "or":
            registers[to] = values[0] or values[1]
        else:
            assert kind[0] in ("neg", "abs") or kind[1] == "rn"
            with np.errstate(all="ignore"):
                registers[to] = {
                    "mul": lambda x, y: x * y, "neg": lambda x: -x, "abs": abs, "div": lambda x, y: x / y,
                    "fma": lambda x, y, z: np.float32(FMA(x, y, z)),
                }[kind[0]](*values)  # fmt: skip
    return [registers[f"${i}"] for i in range(4)], divided


def reciprocal(b):
    return np.float32(1) / b if 2.0**-60 <= b <= 2.0**20 else np.float32("nan")


def numbers():
    generator = np.random.default_rng(0)
    edges = [0.0, -0.0, 1e-45, -1e-39, 1.2e-38, 1e-30, 0.1, -1 / 3, 1.0, 7.5, 3e38, np.inf, -np.inf, np.nan]
    ordinary = generator.standard_normal(600)
    exponents = 2.0 ** generator.integers(-126, 126, 200) * (1 + generator.random(200))
    a = np.array([*edges, *ordinary, *exponents], np.float32)
    scales = [1e-5, 0.0123456, 0.5, 0.1, 1.0, 3.0, 1e6, 1e7, 1e30, np.inf, np.nan, 1e-25]
    b = [*scales, *np.abs(generator.standard_normal(8))]
    return a[: len(a) // 4 * 4].reshape(-1, 4), np.array(b, np.float32)


@pytest.mark.parametrize("tiny", [False, True])
def test_quotients(tiny):
    ptx = (QUOTIENTS_TINY if tiny else QUOTIENTS).value
    rows, scales = numbers()
    fast = 0
    for b in scales:
        for a in rows:
            got, divided = run(ptx, a, [b] * 4, [reciprocal(b)] * 4)
            fast += not divided
            with np.errstate(all="ignore"):
                wanted = a / b
            for value, quotient, number in zip(got, wanted, a, strict=True):
                if number == 0 and value == 0 == quotient:
                    continue  # its sign may be lost
                if not tiny and 0 < abs(number) < 2.0**-100 and 2.0**-60 <= b <= 2.0**20:
                    assert abs(value) <= 2.0**-39
                    assert np.signbit(value) == np.signbit(quotient)
                    continue
                assert torch.tensor(value).isnan() == torch.tensor(quotient).isnan()
                assert np.isnan(quotient) or value.tobytes() == quotient.tobytes(), (number, b)
    assert fast > 600, "every division was a hard one"
