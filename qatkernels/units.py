"""Reads and writes counts and sizes with suffixes: 1.2B parameters, 100B tokens, 300 MB."""

from __future__ import annotations

import math
import re

_COUNTS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "g": 10**9, "t": 10**12}
_BYTES = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
_NUMBER = r"\s*([0-9][0-9_,]*\.?[0-9]*(?:e[+-]?[0-9]+)?|\.[0-9]+)\s*"


def count(text: str) -> int:
    """Return the count in a text such as ``1.2B``, ``300k``, ``2_000`` or ``1e9``; B and G are both 10⁹.

    Raises:
        ValueError: if the text is not a count of at least 1.
    """
    return _parse(text, _COUNTS, r"([kmbgt]?)", "a positive count such as 1.2B, 300M, 5k or 2e6")


def size(text: str) -> int:
    """Return the bytes in a text such as ``300MB``, ``1.5GiB`` or ``4096``.

    Raises:
        ValueError: if the text is not a size of at least one byte.
    """
    return _parse(text, _BYTES, r"([kmgt]?i?)b?", "a positive size such as 300MB or 1.5GiB")


def _parse(text: str, factors: dict[str, int], suffix: str, allowed: str) -> int:
    match = re.fullmatch(_NUMBER + suffix, text.lower().strip())
    factor = factors.get(match[2]) if match else None
    value = float(match[1].replace("_", "").replace(",", "")) * factor if match and factor else 0.0
    if not math.isfinite(value) or round(value) < 1:
        raise ValueError(f"{text!r} is not {allowed}")
    return round(value)


def human(value: float, unit: str = "") -> str:
    """Return a count with three digits and the suffix k, M, B or T; for bytes (``unit="B"``) kB, MB, GB or TB."""
    letters = ("", "k", "M", "G", "T") if unit else ("", "k", "M", "B", "T")
    power = 0
    while power < 4 and abs(float(f"{value / 1000**power:.3g}")) >= 1000:
        power += 1
    number = f"{value / 1000**power:.3g}"
    number = f"{float(number):.0f}" if "e" in number else number
    return f"{number} {letters[power]}{unit}" if unit else number + letters[power]
