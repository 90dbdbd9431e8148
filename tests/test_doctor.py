"""`qatkernels doctor`: what it says of this installation, and the command that it gives for each kind."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import pytest
import torch

from qatkernels import __version__, backends, cli, doctor
from qatkernels.cli.common import BROKEN
from qatkernels.doctor import Extension, Installation, installation

AGAIN = "pip install --force-reinstall --no-deps --no-cache-dir"
PURE = "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
COMPILED = "Wheel-Version: 1.0\nRoot-Is-Purelib: false\nTag: cp311-cp311-linux_x86_64\n"


def site(root: Path, origin: object = None, wheel: str = PURE) -> Path:
    """Return the package's folder in a site-packages folder as an installer leaves it."""
    info = root / f"qatkernels-{__version__}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: qatkernels\nVersion: {__version__}\n")
    (info / "WHEEL").write_text(wheel)
    if origin is not None:
        (info / "direct_url.json").write_text(json.dumps(origin))
    (root / "qatkernels").mkdir()
    return root / "qatkernels"


def programs(folder: Path, *names: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Set the search path to a folder with exactly these programs."""
    folder.mkdir()
    for name in names:
        (folder / name).touch(mode=0o755)
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.delenv("CXX", raising=False)


def test_of_this_installation(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert cli.main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["installation"]["kind"] == "checkout"
    assert f"a checkout, used in place ({found['installation']['source']})" in text
    assert found["ops"].keys() == backends.OPS.keys()
    for op, served in found["ops"].items():
        assert op in text
        assert served["CPU"] == backends.chosen(op, "CPU")
        assert served["CPU"] in served["present"]
    assert found["missing"].keys() == backends.MISSING.keys()
    for name, entry in found["missing"].items():
        assert f"missing: {name}" in text
        assert entry["how"]


def test_a_checkout_is_built_in_place(tmp_path: Path) -> None:
    """Also where the environment's record is of another copy."""
    root = tmp_path / "a checkout"
    package = site(root, {"url": "file:///elsewhere", "dir_info": {"editable": True}})
    for name in ("setup.py", "CMakeLists.txt"):
        (root / name).touch()
    found = installation(package)
    assert found == Installation("checkout", package, str(root))
    assert found.reinstall == f"pip install --no-deps -e '{root}'"


@pytest.mark.parametrize(
    ("origin", "kind", "command"),
    [
        ({"url": "file:///src/my%20copy", "dir_info": {}}, "folder", f"{AGAIN} '/src/my copy'"),
        ({"url": "file:///dist/qk-1.tar.gz", "archive_info": {}}, "sdist", f"{AGAIN} /dist/qk-1.tar.gz"),
        ({"url": "https://a.b/qk.tar.gz", "archive_info": {}}, "sdist", f"{AGAIN} https://a.b/qk.tar.gz"),
        (
            {"url": "https://a.b/qk", "vcs_info": {"vcs": "git", "commit_id": "12ab"}},
            "git",
            f"{AGAIN} git+https://a.b/qk@12ab",
        ),
        (
            {"url": "file:///dist/qk-1-py3-none-any.whl", "archive_info": {}},
            "wheel",
            f"{AGAIN} --no-binary qatkernels qatkernels=={__version__}",
        ),
        (None, "index", f"{AGAIN} --no-binary qatkernels qatkernels=={__version__}"),
    ],
)
def test_what_was_copied_is_built_from_where_it_came(tmp_path: Path, origin: object, kind: str, command: str) -> None:
    found = installation(site(tmp_path, origin))
    assert (found.kind, found.pure) == (kind, True)
    assert found.reinstall == command
    assert "without compiled kernels" in str(found)
    compiled = installation(site(tmp_path / "compiled", origin, COMPILED))
    assert compiled.pure is False
    assert compiled.reinstall == command


def test_a_wheel_is_replaced_by_the_sdist_beside_it(tmp_path: Path) -> None:
    wheel, sdist = (tmp_path / f"qatkernels-{__version__}{end}" for end in ("-py3-none-any.whl", ".tar.gz"))
    sdist.touch()
    found = installation(site(tmp_path / "site", {"url": wheel.as_uri(), "archive_info": {}}))
    assert found.reinstall == f"{AGAIN} {sdist}"


def test_files_without_a_record(tmp_path: Path) -> None:
    (tmp_path / "qatkernels").mkdir()
    found = installation(tmp_path / "qatkernels")
    assert (found.kind, found.pure) == ("unknown", None)
    assert "--no-binary qatkernels" in found.reinstall
    assert "a source distribution or a checkout" in doctor.cure("cpp", found)


#: An extension that is not there.
ABSENT = Extension(None, "No module named 'qatkernels._C'")


@pytest.mark.parametrize("compiler", [True, False])
def test_a_pure_wheel_with_and_without_a_compiler(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compiler: bool
) -> None:
    programs(tmp_path / "bin", *(["c++"] if compiler else []), monkeypatch=monkeypatch)
    package = site(tmp_path, {"url": "file:///dist/qk-1.tar.gz", "archive_info": {}})
    found = doctor.diagnosis(package, ABSENT)
    assert found["broken"] == {}
    why, how = (found["missing"]["cpp"][key] for key in ("why", "how"))
    assert why == (
        "a build from a source distribution (/dist/qk-1.tar.gz), without compiled kernels: "
        "torch or a compiler was missing when it was built"
    )
    wanted = f"build it: `{AGAIN} /dist/qk-1.tar.gz`"
    if not compiler:
        compilers = "(`apt install g++`, `dnf install gcc-c++`, `xcode-select --install`)"
        wanted = f"needs a C++20 compiler {compilers}; then `{AGAIN} /dist/qk-1.tar.gz`"
    assert how == wanted
    assert f"installed    {Installation('sdist', package, '/dist/qk-1.tar.gz', True)}\n" in doctor.prescription(found)


def test_a_checkout_that_was_not_built(tmp_path: Path) -> None:
    for name in ("setup.py", "CMakeLists.txt"):
        (tmp_path / name).touch()
    (tmp_path / "qatkernels").mkdir()
    found = doctor.diagnosis(tmp_path / "qatkernels", ABSENT)
    assert found["missing"]["cpp"]["why"] == "the extension of this checkout was not built"
    assert f"pip install --no-deps -e {tmp_path}" in found["missing"]["cpp"]["how"]
    assert found["broken"] == {}


def test_an_extension_for_another_python(tmp_path: Path) -> None:
    package = site(tmp_path, None, COMPILED)
    (package / "_C.cpython-39-riscv64-linux-gnu.so").touch()
    found = doctor.diagnosis(package, ABSENT)
    assert found["missing"]["cpp"]["why"].startswith("_C.cpython-39-riscv64-linux-gnu.so is there, for another Python")
    assert found["broken"] == {}


def test_an_extension_that_does_not_load(tmp_path: Path) -> None:
    package = site(tmp_path, {"url": "file:///src", "dir_info": {}}, COMPILED)
    (package / f"_C{EXTENSION_SUFFIXES[0]}").touch()
    found = doctor.diagnosis(package, Extension(None, "undefined symbol: _ZN2at6detail"))
    assert found["broken"].keys() == {"cpp"}
    text = doctor.prescription(found)
    assert "BROKEN: cpp: the extension is there and does not load: undefined symbol" in text
    assert f"{AGAIN} /src" in text


def test_an_extension_for_another_torch(tmp_path: Path) -> None:
    package = site(tmp_path, {"url": "file:///dist/qk-1.tar.gz", "archive_info": {}}, COMPILED)
    (package / f"_C{EXTENSION_SUFFIXES[0]}").touch()
    text = doctor.prescription(doctor.diagnosis(package, Extension(None, "another torch", "2.12.0")))
    assert f"BROKEN: cpp: the extension was built for torch 2.12.0, this is {torch.__version__}" in text
    assert f"`{AGAIN} /dist/qk-1.tar.gz`" in text
    assert "or go back to the torch that it was built for: `pip install torch==2.12.0`" in text


def test_a_broken_extension_of_the_running_package(tmp_path: Path) -> None:
    """The command says so and ends with a code of its own."""
    copy = tmp_path / "qatkernels"
    shutil.copytree(Path(doctor.__file__).parent, copy, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    (copy / f"_C{EXTENSION_SUFFIXES[0]}").write_bytes(b"no library")
    done = subprocess.run(
        [sys.executable, "-m", "qatkernels", "doctor"], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == BROKEN, done.stderr
    assert "BROKEN: cpp: the extension is there and does not load: " in done.stdout
    assert "files without a record of their installation" in done.stdout


def test_what_cuda_needs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    here = Installation("folder", tmp_path, "/src", True)
    monkeypatch.setattr(torch.version, "cuda", None)
    programs(tmp_path / "without", "c++", monkeypatch=monkeypatch)
    assert doctor.cure("cuda", here) == (
        f"needs a CUDA build of PyTorch (this is {torch.__version__}) and nvcc, of the CUDA toolkit; "
        f"then `{AGAIN} /src`"
    )
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    programs(tmp_path / "with", "c++", "nvcc", monkeypatch=monkeypatch)
    assert doctor.cure("cuda", here) == f"build it: `{AGAIN} /src`"


def test_windows_has_no_kernels(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "platform", "win32")
    assert "WSL2" in doctor.cure("cpp", Installation("index", tmp_path, None, True))
