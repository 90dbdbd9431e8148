"""The GPU machine that a pack is made for, and where things lie on it and here."""

from __future__ import annotations

from pathlib import Path

#: The extension and Triton's cache serve these versions alone.
PYTHON, TORCH, TRITON = (3, 12), "2.11.0+cu130", "3.6.0"
#: Compute capability, and how nvcc names it.
CAPABILITY, ARCHS = (9, 0), "90a"

ROOT = Path(__file__).parents[2]
#: Ignored by git: what is taken along, and the journal of the last call.
FOLDER = ROOT / "build/gpu"
PACK, LAST = FOLDER / "pack.tar.xz", FOLDER / "last.jsonl"
#: Triton's cache holds absolute paths, so it lies in one place on both machines.
CACHE = Path("/tmp/qatkernels-triton-cache")
#: Bytes that can be taken along.
MOST_BYTES = 64 * 2**20
