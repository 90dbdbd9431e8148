"""The scripts in examples/ run, and stay short enough to read at once."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from qatkernels.formats import load_packed
from qatkernels.nn import packed_modules

ROOT = Path(__file__).parents[1]
NEEDS = {
    "quantize_transformers": ("transformers",),
    "qlora": ("transformers", "peft"),
    "trainer": ("transformers", "accelerate"),
    "accelerate_loop": ("accelerate",),
    "lightning_module": ("lightning",),
}
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


def run(folder, *arguments):
    """Run Python in a folder, and return what it printed."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=folder, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("script", EXAMPLES, ids=lambda path: path.stem)
def test_runs(script, tmp_path):
    for package in NEEDS.get(script.stem, ()):
        pytest.importorskip(package)
    assert run(tmp_path, "-W", "error::DeprecationWarning:qatkernels", script).strip()


def test_accelerate_launches_two_processes(tmp_path):
    """Without a GPU too, as the example says how."""
    pytest.importorskip("accelerate")
    script = ROOT / "examples" / "accelerate_loop.py"
    launch = ("--multi_gpu", "--num_processes", "2", "--main_process_port", "0")
    assert "accelerate launch --multi_gpu --num_processes 2 examples/accelerate_loop.py" in script.read_text()
    printed = run(tmp_path, "-m", "accelerate.commands.launch", *launch, script)
    assert printed.count("2 processes") == printed.count("without noise") == 1
    layers = [torch.nn.Linear(32, 128), torch.nn.GELU(), torch.nn.Linear(128, 8)]
    model = load_packed(tmp_path / "packed.safetensors", lambda config: torch.nn.Sequential(*layers))
    assert packed_modules(model).keys() == {"0", "2"}


@pytest.mark.parametrize("script", EXAMPLES, ids=lambda path: path.stem)
def test_is_short(script):
    assert len(script.read_text().splitlines()) < 80
