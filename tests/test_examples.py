"""The scripts in examples/ run, and stay short enough to read at once."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NEEDS = {
    "quantize_transformers": ("transformers",),
    "qlora": ("transformers", "peft"),
    "trainer": ("transformers", "accelerate"),
    "accelerate_loop": ("accelerate",),
    "lightning_module": ("lightning",),
}
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


@pytest.mark.parametrize("script", EXAMPLES, ids=lambda path: path.stem)
def test_runs(script, tmp_path):
    for package in NEEDS.get(script.stem, ()):
        pytest.importorskip(package)
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, "-W", "error::DeprecationWarning:qatkernels", str(script)],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


@pytest.mark.parametrize("script", EXAMPLES, ids=lambda path: path.stem)
def test_is_short(script):
    assert len(script.read_text().splitlines()) < 80
