"""The paper's closed formula, and counts as people write them."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qatkernels import units
from qatkernels.plan import (
    ExtrapolationWarning,
    optimal_qat_fraction,
    tokens_per_parameter_byte,
    tokens_per_parameter_byte_at,
)

#: N, D, B, S and the fraction, from the formula by hand.
WORKED = [
    (86e6, 2.3e9, 4, 53.4884, 0.184315),
    (396e6, 100e9, 4, 505.051, 0.339210),
    (759e6, 1.4e12, 2, 7378.13, 0.469722),
    (2.2e9, 100e9, 4, 90.9091, 0.224873),
]


@pytest.mark.parametrize(("params", "tokens", "bits", "s", "fraction"), WORKED)
def test_worked_values(params: float, tokens: float, bits: float, s: float, fraction: float) -> None:
    assert float(f"{tokens_per_parameter_byte(params, tokens, bits):.6g}") == s
    assert round(optimal_qat_fraction(params, tokens, bits), 6) == fraction
    assert tokens_per_parameter_byte_at(optimal_qat_fraction(params, tokens, bits)) == pytest.approx(s, rel=1e-5)


def test_arrays_broadcast() -> None:
    n, d, b, s, f = map(np.array, zip(*WORKED, strict=True))
    assert tokens_per_parameter_byte(n, d, b) == pytest.approx(s, rel=1e-5)
    assert optimal_qat_fraction(n, d, b) == pytest.approx(f, abs=1e-6)
    assert optimal_qat_fraction(n[:, None], d, 4).shape == (4, 4)
    assert isinstance(optimal_qat_fraction(86e6, 2.3e9, 4), float)


@given(st.floats(1e-300, 1, exclude_max=True))
def test_inverse(fraction: float) -> None:
    s = tokens_per_parameter_byte_at(fraction)
    assert s > 1
    if 1.001 < s < 1e300:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExtrapolationWarning)
            assert optimal_qat_fraction(8, s, 1) == pytest.approx(fraction, rel=1e-9)


def test_inside_of_the_papers_range_nothing_is_said() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimal_qat_fraction([86e6, 2.2e9], [2.3e9, 1.4e12], [1, 6])


@pytest.mark.parametrize(
    ("tokens", "bits", "message"),
    [
        (2.2e9, 4, "tokens is 2.2e"),
        (1.5e12, 4, "tokens is 1.5e"),
        (1e11, 8, "bits is 8"),
        (1e11, 0.5, "bits is 0.5"),
        ([1e10, 1e9], 4, "tokens is 1e"),
    ],
)
def test_extrapolation_is_said(tokens: float, bits: float, message: str) -> None:
    with pytest.warns(ExtrapolationWarning, match=message):
        optimal_qat_fraction(1e8, tokens, bits)


@pytest.mark.parametrize("s", [1.0, 0.5])
def test_too_few_tokens(s: float) -> None:
    with pytest.raises(ValueError, match=rf"S = {s:g} tokens per parameter byte, must be above 1"):
        optimal_qat_fraction(1e9, s * 1e9, 8)
    with pytest.raises(ValueError, match="S = "):
        optimal_qat_fraction(1e9, [1e12, s * 1e9], 8)


@pytest.mark.parametrize("bad", [0, -1, math.nan, math.inf, [1e9, 0]])
@pytest.mark.parametrize("name", ["params", "tokens", "bits"])
def test_bad_arguments(name: str, bad: object) -> None:
    with pytest.raises(ValueError, match=f"{name} is .*, must be positive and finite"):
        optimal_qat_fraction(**{"params": 1e9, "tokens": 1e11, "bits": 4, name: bad})


@pytest.mark.parametrize("bad", [0, 1, -0.1, math.nan, [0.5, 1.0]])
def test_bad_fractions(bad: object) -> None:
    with pytest.raises(ValueError, match=r"must be in \(0, 1\)"):
        tokens_per_parameter_byte_at(bad)


@pytest.mark.parametrize(
    ("text", "value"),
    [("1.2B", 1_200_000_000), ("100b", 10**11), ("1.4T", 14 * 10**11), ("86M", 86_000_000), (" 5 k ", 5000),
     ("1e9", 10**9), ("2_000", 2000), ("2,000", 2000), (".5G", 5 * 10**8), ("7", 7)],
)  # fmt: skip
def test_counts(text: str, value: int) -> None:
    assert units.count(text) == value


@pytest.mark.parametrize(
    ("text", "value"), [("300MB", 3 * 10**8), ("1.5GiB", 3 * 2**29), ("4096", 4096), ("2 kib", 2048), ("1T", 10**12)]
)
def test_sizes(text: str, value: int) -> None:
    assert units.size(text) == value


@pytest.mark.parametrize("text", ["", "many", "1.2X", "-5", "0", "0.1", "1e400", "1.2.3", "nan", "B"])
def test_bad_counts(text: str) -> None:
    with pytest.raises(ValueError, match="is not a positive count"):
        units.count(text)
    with pytest.raises(ValueError, match="is not a positive size"):
        units.size(text)


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0"), (7, "7"), (999, "999"), (1000, "1k"), (1_234_567, "1.23M"), (999_999, "1M"),
                        (68.6e9, "68.6B"), (1.4e12, "1.4T"), (3.2e16, "32000T"), (0.25, "0.25")]
)  # fmt: skip
def test_human(value: float, text: str) -> None:
    assert units.human(value) == text


def test_human_bytes() -> None:
    assert [units.human(v, "B") for v in (12, 300e6, 2.4e9)] == ["12 B", "300 MB", "2.4 GB"]


@given(st.integers(1, 10**15))
def test_what_is_printed_can_be_read(value: int) -> None:
    assert units.count(units.human(value)) == pytest.approx(value, rel=6e-3)
