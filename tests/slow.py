"""Which tests are slow: those that `pytest -m "not slow"` leaves out, so that the rest is done in minutes.

`tests/slow.txt` has a test function a line; conftest.py gives them the mark `slow`, as to what uses one of `FIXTURES`.
From a whole run the list is made by

    python -m pytest -n 2 --ignore tests/triton --junitxml=all.xml
    python -m tests.slow all.xml
"""

from __future__ import annotations

import collections
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

LIST = Path(__file__).with_suffix(".txt")
#: Seconds from which the cases of a function together count as slow, in a run of two processes on two cores.
SLOW = 3.0


#: Fixtures of many tests that take longer than any test of the fast lane, and where: whatever uses one is slow, not
#: only the test that comes first and has to wait for it.
FIXTURES = {
    "pair": "tests/",
    "run": "tests/trainer/test_pack_cli.py",
    "out": "tests/studies/test_winq_study.py",
    "why": "tests/studies/test_winq_study.py",
}


def names() -> set[str]:
    """Return the functions of the list: ``tests/nn/test_a.py::TestB::test_c``."""
    return set(LIST.read_text().split())


def function_of(nodeid: str) -> str:
    """Return the function that a test is a case of."""
    return nodeid.partition("[")[0]


def fixture_of(nodeid: str, fixtures: list[str]) -> bool:
    """Whether a test uses a fixture that takes long to make."""
    return any(name in FIXTURES and nodeid.startswith(FIXTURES[name]) for name in fixtures)


def main() -> None:
    """Write the list from a JUnit file."""
    seconds: collections.Counter[str] = collections.Counter()
    for case in ET.parse(sys.argv[1]).iter("testcase"):
        parts = case.get("classname", "").split(".")
        last = next((i for i, part in enumerate(parts) if part.startswith("test_")), None)
        if last is None:
            continue  # a file that was not collected
        file = "/".join(parts[: last + 1]) + ".py"
        name = "::".join([file, *parts[last + 1 :], function_of(case.get("name", ""))])
        seconds[name] += float(case.get("time", 0))
    slow = sorted(name for name, time in seconds.items() if time >= SLOW)
    LIST.write_text("".join(f"{name}\n" for name in slow))
    left = sum(time for name, time in seconds.items() if time < SLOW)
    print(f"{len(slow)} of {len(seconds)} functions are slow; the others took {left:.0f} s in all")


if __name__ == "__main__":
    main()
