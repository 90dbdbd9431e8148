"""The list of slow tests, which `pytest -m "not slow"` leaves out. The others take a few minutes together.

`tests/slow.txt` has a test function in each line. conftest.py marks these as `slow`, and tests that use one of
`FIXTURES`. Make the list from a run of all tests:

    python -m pytest -n 2 --ignore tests/triton --junitxml=all.xml
    python -m tests.slow all.xml
"""

from __future__ import annotations

import collections
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

LIST = Path(__file__).with_suffix(".txt")
#: A test function is slow if its cases together take this many seconds, in a run of two processes on two cores.
SLOW = 2.0


#: Fixtures that take long, with the path of the tests that use them. All these tests are slow: only the first one waits
#: for the fixture, but without it the next one would.
FIXTURES = {
    "pair": "tests/",
    "four": "tests/",
    "run": "tests/trainer/test_pack_cli.py",
    "out": "tests/studies/test_winq_study.py",
    "why": "tests/studies/test_winq_study.py",
}


def names() -> set[str]:
    """Return the functions of the list: ``tests/nn/test_a.py::TestB::test_c``."""
    return set(LIST.read_text().split())


def function_of(nodeid: str) -> str:
    """Return the test function of a parametrized test."""
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
