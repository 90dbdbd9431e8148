"""``python -m bench.kernels``: statistics of the Triton kernels' machine code, without a GPU.

A run measures every case and keeps it in bench/results/kernels-sm90.json under a name, ``after`` unless told otherwise;
earlier names stay. ``docs`` makes the table of docs/benchmarks.md from that file.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import re
import sys
from pathlib import Path
from typing import Any

from ..machine import git_state
from ..report import RESULTS, save
from .table import DOCS, update

ARCHITECTURE = 90
#: Arguments of kernels that describe the tiling.
TILE = ("BLOCK_M", "BLOCK_N", "BLOCK_K", "SPLIT", "R", "C", "T", "N", "K")


def measured(name: str, architecture: int = ARCHITECTURE) -> dict[str, Any]:
    """Return the statistics of the kernel of a case."""
    from .ahead import compiled, disassembly, recorded_launches, resources
    from .cases import CASES, on
    from .sass import counts, hot, parsed, resident, usual

    op, args, start = CASES[name]()
    with on(architecture):
        launches = [launch for launch in recorded_launches(op, args) if launch[0].__name__.startswith(start)]
    launch = launches[0]
    kernel = compiled(launch, architecture)
    registers, stack, local = resources(kernel.asm["cubin"])
    code = parsed(disassembly(kernel.asm["cubin"]))
    warps, shared = kernel.metadata.num_warps, kernel.metadata.shared
    tile = {name: launch[1][name] for name in TILE if name in launch[1]}
    return {
        "kernel": launch[0].__name__,
        "launches": len(launches),
        "registers": registers,
        "stack": stack + local,
        "shared": shared,
        "warps": warps,
        "stages": launch[2].get("num_stages"),
        "tile": tile,
        "blocks": resident(registers, shared, warps, architecture),
        "all": counts(usual(code)),
        "loop": counts(usual(hot(code))),
    }


def main() -> int:
    """Measure, or make the table."""
    parser = argparse.ArgumentParser(prog="python -m bench.kernels", description=__doc__)
    parser.add_argument("command", nargs="?", choices=("measure", "docs"), default="measure")
    parser.add_argument("--only", default="", help="regular expression: cases to measure; others stay as they are")
    parser.add_argument("--name", default="after", help="name of the measurement in the file")
    parser.add_argument("--out", type=Path, default=RESULTS / f"kernels-sm{ARCHITECTURE}.json")
    parser.add_argument("--show", action="store_true", help="print, and write nothing")
    options = parser.parse_args()
    if options.command == "docs":
        update(DOCS, options.out)
        return 0
    from .cases import CASES

    document = (
        json.loads(options.out.read_text()) if options.out.exists() else {"architecture": ARCHITECTURE, "runs": {}}
    )
    run = document["runs"].setdefault(options.name, {"cases": {}})
    versions = {"triton": importlib.metadata.version("triton")}
    for name in [name for name in CASES if re.search(options.only, name)]:
        run["cases"][name] = found = measured(name)
        loop = found["loop"]
        print(
            f"{name}: {found['registers']} registers, {found['shared']} B shared, {found['warps']} warps, "
            f"{found['blocks']} blocks, stack {found['stack']}, tile {found['tile']}, {found['all']['instructions']} "
            f"instructions\n    loop { ({k: v for k, v in loop.items() if v}) }",
            flush=True,
        )
        if not options.show:
            run |= {"git": git_state(), "versions": versions}
            save(document, options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
