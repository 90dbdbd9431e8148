"""Builds qatkernels._C with CMake and Ninja.

torch is located, never imported: `pip install .` then also works with build isolation, against the torch of the
environment that the package is installed into. Without torch, a compiler or nvcc the build says what is left out and
goes on; qatkernels works without the extension, more slowly.

QATKERNELS_BUILD=none builds nothing, =cpu leaves CUDA out, =require turns a missing compiler or torch into an error.
QATKERNELS_CUDA_ARCHS overrides the CUDA architectures, for example "90a".
QATKERNELS_CMAKE_ARGS adds arguments for CMake, for example "-DCMAKE_BUILD_TYPE=Debug -DQK_SANITIZE=address".
"""

import hashlib
import os
import runpy
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
MODE = os.environ.get("QATKERNELS_BUILD", "auto")
CUDA_ARCHS = "80;90a;100"
CMAKE_ARGS = shlex.split(os.environ.get("QATKERNELS_CMAKE_ARGS", ""))


def find_torch():
    """Return the directory of the torch package that the result will run with, or None."""
    paths = [sysconfig.get_paths()["purelib"], sysconfig.get_paths()["platlib"], *sys.path]
    return next((Path(p) / "torch" for p in paths if (Path(p) / "torch" / "include").is_dir()), None)


def missing():
    """Return what keeps the extension from being built, or None."""
    if find_torch() is None:
        return "torch is not installed in this environment: `pip install torch` first"
    if not any(shutil.which(c) for c in (os.environ.get("CXX", "c++"), "g++", "clang++")):
        return "no C++ compiler was found: install g++ or clang++"
    return None


def cuda_archs(torch_version):
    """Return the CUDA architectures to build for; empty without nvcc or with a CPU build of torch."""
    if MODE == "cpu" or torch_version.get("cuda") is None:
        return ""
    if shutil.which("nvcc") is None and "CUDACXX" not in os.environ:
        print("qatkernels: nvcc was not found, CUDA kernels are left out (Triton's are not affected)", file=sys.stderr)
        return ""
    return os.environ.get("QATKERNELS_CUDA_ARCHS", CUDA_ARCHS)


class CMakeBuild(build_ext):
    """Configure and build with CMake into where setuptools wants the module."""

    def run(self):
        if MODE == "none":
            return
        reason = missing()
        if reason is None:
            super().run()
        elif MODE == "require":
            raise SystemExit(f"qatkernels: cannot build the extension, {reason}")
        else:
            print(f"\nqatkernels: building WITHOUT compiled kernels, {reason}\n", file=sys.stderr)

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
        subprocess.run(["cmake", "-G", "Ninja", "-S", ROOT, "-B", build_dir, *defines, *CMAKE_ARGS], check=True)
        subprocess.run(["cmake", "--build", build_dir], check=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)  # a process that runs the old one keeps it
        shutil.copyfile(next(build_dir.glob("_C*.so")), target)


setup(ext_modules=[Extension("qatkernels._C", [])], cmdclass={"build_ext": CMakeBuild})
