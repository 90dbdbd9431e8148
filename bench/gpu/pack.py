"""The pack: one file with the extension and Triton's cache, built here for the GPU machine."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import platform
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .target import ARCHS, CACHE, MOST_BYTES, PACK, PYTHON, ROOT, TORCH, TRITON

#: Environment of a build of the extension.
BUILD = {"QATKERNELS_BUILD": "require", "QATKERNELS_CUDA_ARCHS": ARCHS}
#: Files of Triton's cache that a launch needs. The others are intermediate stages of a compilation.
_KEPT = (".cubin", ".json", ".so")
_MANIFEST = "pack.json"
_EXTENSION = f"qatkernels/_C.cpython-{PYTHON[0]}{PYTHON[1]}-x86_64-linux-gnu.so"


def make(seconds: float, jobs: int, parts: tuple[str, ...]) -> int:
    """Build the extension, fill Triton's cache, and write the pack.

    Args:
        seconds: when to stop compiling kernels of a part; what is missing is compiled on the GPU machine.
        jobs: processes that compile at once, for the extension and for the kernels.
        parts: of :data:`bench.gpu.target.PARTS`, those to compile for. What earlier packs compiled is kept.
    """
    _check_versions()
    began = time.monotonic()
    environment = {**os.environ, **BUILD, "CMAKE_BUILD_PARALLEL_LEVEL": str(jobs)}
    subprocess.run([sys.executable, "setup.py", "build_ext", "--inplace"], cwd=ROOT, env=environment, check=True)
    built = time.monotonic() - began
    print(f"extension: {built:.0f} s", flush=True)
    CACHE.mkdir(parents=True, exist_ok=True)
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "TRITON_CACHE_DIR": str(CACHE), "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    for part in parts:
        command = [sys.executable, "-O", "-W", "ignore", "-m", "bench.gpu", "warm", part, "--seconds", str(seconds)]
        running = [
            subprocess.Popen([*command, "--share", f"{i}/{jobs}"], cwd=ROOT, env=environment) for i in range(jobs)
        ]
        if any([process.wait() for process in running]):
            raise SystemExit(f"kernels of the {part} could not be compiled")
    kernels = _write()
    size = PACK.stat().st_size
    print(f"{PACK.relative_to(ROOT)}: {size / 2**20:.1f} MiB, {kernels} kernels, {time.monotonic() - began:.0f} s")
    if size > MOST_BYTES:
        raise SystemExit(f"the pack has {size} bytes, must be at most {MOST_BYTES}: compile for fewer tests")
    return 0


def _check_versions() -> None:
    """Raise SystemExit unless this interpreter and its packages have the versions of the GPU machine."""
    import torch
    import triton

    here = {"Python": sys.version_info[:2], "torch": torch.__version__, "triton": triton.__version__}
    wanted = {"Python": PYTHON, "torch": TORCH, "triton": TRITON}
    for name, version in wanted.items():
        if here[name] != version:
            raise SystemExit(f"{name} is {here[name]}, must be {version}: run this with the interpreter of a virtual "
                             f"environment that has what the GPU machine has (bench/gpu/README.md)")  # fmt: skip


def _write() -> int:
    """Write the pack and return the number of kernels in it."""
    manifest = {
        "made": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "python": platform.python_version(), "torch": TORCH,
        "triton": TRITON, "archs": ARCHS, "sources": sources(), "git": _git(),
    }  # fmt: skip
    PACK.parent.mkdir(parents=True, exist_ok=True)
    described = PACK.parent / _MANIFEST
    files = sorted(_cached())
    manifest["kernels"] = sum(file.suffix == ".cubin" for file in files)
    described.write_text(json.dumps(manifest, indent=1) + "\n")
    with tarfile.open(PACK, "w:xz", preset=6) as tar:
        tar.add(described, _MANIFEST)
        tar.add(ROOT / _EXTENSION, _EXTENSION)
        # Kernels of the same name are similar; stored next to each other they compress better.
        for file in sorted(files, key=lambda f: (f.name, str(f))):
            tar.add(file, f"cache/{file.relative_to(CACHE)}")
    return int(manifest["kernels"])


def _cached() -> Iterator[Path]:
    return (file for file in CACHE.rglob("*") if file.suffix in _KEPT and not file.parent.name.startswith("tmp."))


def sources() -> str:
    """Return a hash of the extension's sources."""
    found = hashlib.sha256()
    for file in (*sorted((ROOT / "csrc").rglob("*")), ROOT / "CMakeLists.txt"):
        if file.is_file():
            found.update(f"{file.relative_to(ROOT)}\0".encode() + file.read_bytes())
    return found.hexdigest()


def _git() -> dict[str, Any]:
    from ..machine import git_state

    return git_state()


def unpack(pack: Path = PACK) -> dict[str, Any]:
    """Install the extension and the cache from the pack, and return the description in the pack."""
    if not pack.exists():
        return {"status": "absent", "note": f"{pack} is not here: everything is compiled"}
    with tarfile.open(pack) as tar:
        for member in tar:
            folder, name = (CACHE, member.name[6:]) if member.name.startswith("cache/") else (ROOT, member.name)
            if member.name != _MANIFEST and member.isfile():
                target = folder / name
                target.parent.mkdir(parents=True, exist_ok=True)
                source = tar.extractfile(member)
                assert source is not None
                target.unlink(missing_ok=True)  # a process that uses the old file keeps it
                target.write_bytes(source.read())
            elif member.name == _MANIFEST:
                described = tar.extractfile(member)
                assert described is not None
                manifest = json.loads(described.read())
    fresh = manifest["sources"] == sources()
    note = "" if fresh else "the extension was built from other sources than these"
    return {**manifest, "status": "unpacked" if fresh else "stale", "note": note}


def entries() -> int:
    """Return the number of entries in Triton's cache."""
    return sum(1 for _ in CACHE.glob("*")) if CACHE.exists() else 0


def probe() -> int:
    """Launch a kernel of the pack. Return :data:`bench.codes.MISSED` if Triton compiled it again."""
    import torch

    import qatkernels as qk
    from qatkernels.backends import IMPLS
    from qatkernels.testing.samples import make

    from ..codes import MISSED

    before = entries()
    sample = make(qk.grids.lsq(4), (8192, 8192), torch.bfloat16, device="cuda")
    IMPLS["fake_quantize"]["triton"](*sample.args("fake_quantize"))
    torch.cuda.synchronize()
    new = entries() - before
    print(f"Triton's cache: {before} entries, {new} new for a kernel that should be there", flush=True)
    return MISSED if new else 0


def processors() -> int:
    """Return how many processors this process may use."""
    return len(os.sched_getaffinity(0))


def has(module: str) -> bool:
    """Return whether a module is installed."""
    return importlib.util.find_spec(module) is not None
