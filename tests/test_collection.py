"""Tests are found and run however pytest is started, and what they share is one module."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent


def test_pytest_alone_collects():
    """The command `pytest` does not put the working directory on the path; `python -m pytest` does."""
    script = "import sys, pytest; sys.exit(pytest.main(['-q', '--collect-only', 'tests/ops/test_gram_schmidt.py']))"
    run = subprocess.run([sys.executable, "-I", "-c", script], cwd=TESTS.parent, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.mark.parametrize("path", sorted(TESTS.rglob("*.py")), ids=lambda p: str(p.relative_to(TESTS)))
def test_shared_modules_have_one_name(path):
    """`compare` and `qatkernels.testing.compare` would be two modules, each with its own state."""
    shared = {p.stem for p in TESTS.glob("*.py")}
    for node in ast.walk(ast.parse(path.read_text())):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [node.module or ""]
        assert not shared & {name.partition(".")[0] for name in names}, f"line {node.lineno}: import it as tests.<name>"
