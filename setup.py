"""Builds qatkernels._C with CMake and Ninja.

torch is located, never imported: `pip install .` then also works with build isolation, against the torch of the
environment that the package is installed into. Without torch or a compiler the result is a pure Python package (a
wheel is then tagged py3-none-any), and the build says so; qatkernels works without the extension, more slowly.

QATKERNELS_BUILD=none builds nothing, =cpu leaves CUDA out, =require turns a missing compiler or torch into an error.
QATKERNELS_CUDA_ARCHS overrides the CUDA architectures, for example "90a".
QATKERNELS_CMAKE_ARGS adds arguments for CMake, for example "-DCMAKE_BUILD_TYPE=Debug -DQK_SANITIZE=address".
"""

import hashlib
import importlib.util
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.editable_wheel import editable_wheel

ROOT = Path(__file__).parent
MODES = ("auto", "none", "cpu", "require")
MODE = os.environ.get("QATKERNELS_BUILD") or "auto"
CUDA_ARCHS = "80;90a;100"
CMAKE_ARGS = shlex.split(os.environ.get("QATKERNELS_CMAKE_ARGS", ""))


def find_torch():
    """Return the directory of the torch package that the result will run with, or None.

    With build isolation that torch is not on our path, so the interpreter is also asked what it finds on its own.
    """
    ask = "import importlib.util as u; s = u.find_spec('torch'); print(s.origin if s and s.origin else '')"
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    own = importlib.util.find_spec("torch")
    found = own and own.origin
    if not found:
        answer = subprocess.run([sys.executable, "-c", ask], env=clean, cwd=sys.prefix, capture_output=True, text=True)
        found = answer.stdout.strip()
    folder = Path(found).parent if found else None
    return folder if folder and (folder / "include").is_dir() else None


def missing():
    """Return what keeps the extension from being built, or None."""
    if MODE == "none":
        return "QATKERNELS_BUILD is none"
    if sys.platform == "win32":
        return "the kernels need GCC or Clang, and are not built on Windows: use WSL2 for compiled kernels"
    torch = find_torch()
    if torch is None:
        return (
            "no torch was found. For kernels, `pip install torch` first and install the sdist or a checkout in the "
            "same environment; a tool that builds in an environment of its own (`python -m build`, uv) needs its "
            "option against that, --no-isolation or --no-build-isolation"
        )
    version = version_of(torch)
    needed = re.search(r"torch>=([0-9.]+)", (ROOT / "pyproject.toml").read_text())[1]
    if numbers(version) < numbers(needed):
        return f"torch is {version}, must be {needed} or later: `pip install --upgrade torch` first"
    compilers = [shlex.split(os.environ["CXX"])[0]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    if not any(map(shutil.which, compilers)):
        return f"no C++ compiler was found ({', '.join(compilers)}): install g++ or clang++"
    return None


def version_of(torch):
    """Return the version of a torch package."""
    return runpy.run_path(str(torch / "version.py"))["__version__"]


def numbers(version):
    """Return the first two numbers of a version."""
    return tuple(int(part) for part in re.findall(r"[0-9]+", version)[:2])


def cuda_archs(torch_version):
    """Return the CUDA architectures to build for; empty without nvcc or with a CPU build of torch."""
    if MODE == "cpu" or torch_version.get("cuda") is None:
        return ""
    if shutil.which("nvcc") is None and "CUDACXX" not in os.environ:
        print("qatkernels: nvcc was not found, CUDA kernels are left out (Triton's are not affected)", file=sys.stderr)
        return ""
    return os.environ.get("QATKERNELS_CUDA_ARCHS", CUDA_ARCHS)


def say(text):
    """Print a line that stands out from the build's output."""
    print(f"\n*** qatkernels: {text}\n", file=sys.stderr, flush=True)


def require():
    """Stop if the extension cannot be built and must be."""
    if LACKING and MODE == "require":
        raise SystemExit(f"qatkernels: cannot build the extension, {LACKING}")


class CMakeBuild(build_ext):
    """Configure and build with CMake into where setuptools wants the module."""

    def run(self):
        require()
        if LACKING:
            say(f"building WITHOUT compiled kernels: {LACKING}")
        super().run()

    def build_extension(self, ext):
        import pybind11

        torch_dir = find_torch()
        torch_version = runpy.run_path(str(torch_dir / "version.py"))
        # CMake remembers options, so builds with other ones get a directory of their own.
        options = f"-{hashlib.sha256(shlex.join(CMAKE_ARGS).encode()).hexdigest()[:8]}" if CMAKE_ARGS else ""
        name = f"cmake-{sys.implementation.cache_tag}-torch{torch_version['__version__']}{options}"
        build_dir = ROOT / "build" / name
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        configure = {
            "CMAKE_INSTALL_PREFIX": target.parent,
            "CMAKE_MAKE_PROGRAM": shutil.which("ninja"),
            "Python_EXECUTABLE": sys.executable,
            "QK_VERSION": self.distribution.get_version(),
            "QK_TORCH_DIR": torch_dir,
            "QK_TORCH_VERSION": torch_version["__version__"],
            "QK_PYBIND11_INCLUDE": pybind11.get_include(),
            "QK_CUDA_ARCHS": cuda_archs(torch_version),
        }
        defines = [f"-D{name}={value}" for name, value in configure.items()]
        try:
            subprocess.run(["cmake", "-G", "Ninja", "-S", ROOT, "-B", build_dir, *defines, *CMAKE_ARGS], check=True)
            subprocess.run(["cmake", "--build", build_dir], check=True)
        except subprocess.CalledProcessError as error:
            raise SystemExit(
                "qatkernels: the kernels could not be built; the reason is above. They need a compiler for C++20; "
                "QATKERNELS_BUILD=none installs without them"
            ) from error
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)  # a process that runs the old one keeps it
        shutil.copyfile(next(build_dir.glob("_C*.so")), target)


class Wheel(bdist_wheel):
    """Say at the end what the wheel is. It is tagged py3-none-any if there is no extension to build."""

    def run(self):
        require()
        super().run()
        if LACKING:
            say(f"this wheel is pure Python, WITHOUT compiled kernels: {LACKING}")
        else:
            say(f"this wheel has compiled kernels, for torch {version_of(find_torch())} and no other")


class Editable(editable_wheel):
    """Say at the end what was left out."""

    def run(self):
        require()
        super().run()
        if LACKING:
            say(f"installed WITHOUT compiled kernels: {LACKING}")


if MODE not in MODES:
    raise SystemExit(f"qatkernels: QATKERNELS_BUILD is {MODE!r}, must be one of {', '.join(MODES)}")
LACKING = missing()
setup(
    ext_modules=[] if LACKING else [Extension("qatkernels._C", [])],
    cmdclass={"build_ext": CMakeBuild, "bdist_wheel": Wheel, "editable_wheel": Editable},
)
