"""The ctypes structures of on_host.py agree with those of csrc/common; where they differ, the harness does not
compile.
"""

import shutil
import subprocess
from ctypes import Structure, c_int64, c_uint32, c_void_p

import pytest

if shutil.which("g++") is None:
    pytest.skip("needs g++", allow_module_level=True)

from tests.cuda import on_host


def errors(tmp_path, structures):
    source = tmp_path / "checks.cpp"
    source.write_text(on_host.layout_checks(structures))
    command = on_host.compile_command(source, "-fsyntax-only")
    return subprocess.run(command, capture_output=True, text=True).stderr


def test_mirrors_agree(tmp_path):
    assert errors(tmp_path, on_host.STRUCTURES) == ""


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ((("seed", c_void_p), ("out", c_void_p), ("numel", c_int64)), "number of fields of NormalCall = 3"),
        ((("out", c_void_p), ("seed", c_void_p), ("numel", c_int64), ("stream", c_uint32)), "(NormalCall, seed) = 8"),
        ((("seed", c_void_p), ("out", c_void_p), ("numel", c_uint32), ("stream", c_uint32)), "NormalCall::numel) = 4"),
    ],
    ids=["missing", "exchanged", "narrower"],
)
def test_differences_do_not_compile(tmp_path, fields, message):
    mirror = type("NormalCall", (Structure,), {"_fields_": fields})
    assert message in errors(tmp_path, (mirror,))
