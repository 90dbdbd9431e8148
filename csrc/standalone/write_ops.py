"""Write the schemas and contracts of all ops as a C++ header, for the library that serves them without Python.

    python csrc/standalone/write_ops.py HEADER

CMake calls it. Python states the schemas and contracts (qatkernels/ops), and here they are copied.
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
os.environ["QATKERNELS_BACKEND"] = "reference"  # the extension need not exist yet

from qatkernels.ops._op import OPS


def main(path: Path) -> None:
    """Write the header."""
    lines = ["// Written by csrc/standalone/write_ops.py."]
    for op in OPS.values():
        name, arguments, contract = (f'R"qk({text})qk"' for text in (op.name, op.arguments, op.contract.text))
        schemas = ", ".join(f'{{R"qk({n})qk", R"qk({schema})qk"}}' for n, schema in op.schemas.items())
        lines.append(f"{{{name}, {arguments}, {contract}, {{{schemas}}}}},")
    path.write_text("\n".join(lines) + "\n")


main(Path(sys.argv[1]))
