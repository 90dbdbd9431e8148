"""The GPU machine that a pack is made for, and the paths of the files there and here."""

from __future__ import annotations

from pathlib import Path

#: The extension and Triton's cache work with these versions only.
PYTHON, TORCH, TRITON = (3, 12), "2.11.0+cu130", "3.6.0"
#: Compute capability, and how nvcc names it.
CAPABILITY, ARCHS = (9, 0), "90a"

ROOT = Path(__file__).parents[2]
#: Files that git ignores: the pack, and the journal of the last call.
FOLDER = ROOT / "build/gpu"
PACK, LAST = FOLDER / "pack.tar.xz", FOLDER / "last.jsonl"
#: Triton's cache contains absolute paths, so it has the same path on both machines.
CACHE = Path("/tmp/qatkernels-triton-cache")
#: Maximum bytes of the pack.
MOST_BYTES = 64 * 2**20
#: The parts of the calls whose kernels a pack may have.
PARTS = ("smoke", "rows", "tune", "tests")
