"""The examples of the README and the docs run as they stand."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
EXAMPLES = [source for page in PAGES for source in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)]


def test_there_are_examples():
    assert len(EXAMPLES) >= 3


@pytest.mark.parametrize("source", EXAMPLES)
def test_example(source):
    exec(compile(source, "example", "exec"), {})
