"""Counts the instructions in the loop in which a kernel spends its time.

Each instruction of the loop counts once. The count does not tell how long they take.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

_LINE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)([^;]*);")
_TARGET = re.compile(r"0x([0-9a-f]+)\s*$")

#: Limits of a multiprocessor of compute capability 8.0 and 9.0: registers, warps, blocks, warps that are allocated
#: together, and registers that are allocated together for a warp.
_REGISTERS, _WARPS, _BLOCKS, _TOGETHER, _UNIT = 65536, 64, 32, 4, 256
#: Bytes of shared memory of a multiprocessor by architecture, and the bytes that are reserved for each block.
_SHARED, _OWN = {80: 167936, 90: 233472, 100: 233472}, 1024

#: Matrix instructions of both generations.
_MATRIX = ("HMMA", "IMMA", "DMMA", "HGMMA", "IGMMA", "UTCHMMA", "UTCIMMA")
#: Classes of instructions that tables show, by the start of the name.
CLASSES: dict[str, tuple[str, ...]] = {
    "matrix": _MATRIX,
    "fma": ("FFMA", "FMUL", "FADD", "HFMA2", "HADD2", "HMUL2"),
    "double": ("DADD", "DMUL", "DFMA"),
    "conversion": ("I2F", "F2I", "F2F", "I2I"),
    "special": ("MUFU",),
    "division": ("FCHK",),
    "shared": ("LDS", "STS", "LDSM", "STSM"),
    "barrier": ("BAR", "WARPSYNC"),
    "branch": ("BRA", "BSSY", "BSYNC", "CALL"),
    "shuffle": ("SHFL",),
}


@dataclass(frozen=True)
class Instruction:
    """One instruction: its address, its name with modifiers, its operands."""

    address: int
    name: str
    operands: str

    @property
    def base(self) -> str:
        """The name without modifiers."""
        return self.name.partition(".")[0]

    @property
    def jumps_to(self) -> int | None:
        """The target of a branch."""
        found = _TARGET.search(self.operands.split(",")[-1].rstrip()) if self.base == "BRA" else None
        return int(found[1], 16) if found else None


def parsed(text: str) -> list[Instruction]:
    """Return the instructions of a disassembly, without the trap and the padding at the end."""
    found = [Instruction(int(a, 16), name, rest) for a, name, rest in _LINE.findall(text)]
    return [i for i in found if i.base != "NOP" and i.jumps_to != i.address]


def loops(code: Sequence[Instruction]) -> list[list[Instruction]]:
    """Return the bodies of the innermost loops."""
    spans = sorted({(i.jumps_to, i.address) for i in code if i.jumps_to is not None and i.jumps_to < i.address})
    inner = [a for a in spans if not any(b != a and a[0] <= b[0] and b[1] <= a[1] for b in spans)]
    return [[i for i in code if start <= i.address <= end] for start, end in inner]


def hot(code: Sequence[Instruction]) -> list[Instruction]:
    """Return the innermost loop with most matrix instructions, of equals the longest; all code if there is no loop."""

    def weight(body: Sequence[Instruction]) -> tuple[int, int]:
        return sum(i.base in _MATRIX for i in body), len(body)

    return max(loops(code), key=weight, default=list(code))


def width(instruction: Instruction) -> int:
    """Return the bytes that a load or store moves for each thread."""
    parts = instruction.name.split(".")[1:]
    for part in parts:
        if part in ("64", "128"):
            return int(part) // 8
        if part in ("U8", "S8", "U16", "S16"):
            return int(part[1:]) // 8
    return 4


def usual(code: Sequence[Instruction]) -> list[Instruction]:
    """Return the code without the rare slow path of divisions, which calls a subroutine, and without that."""
    calls = [i for i in code if i.base == "CALL"]
    subroutines = [int(found[1], 16) for i in calls if (found := _TARGET.search(i.operands.rstrip()))]
    end = min(
        (a for a in subroutines if not calls or a > calls[-1].address), default=code[-1].address + 1 if code else 0
    )
    rare: set[int] = set()
    for i in code:
        target = i.jumps_to
        if target is not None and target > i.address and any(i.address < c.address < target for c in calls):
            rare |= {j.address for j in code if i.address < j.address < target}
    return [i for i in code if i.address < end and i.address not in rare]


def counts(code: Sequence[Instruction]) -> dict[str, Any]:
    """Return how many instructions there are, by class, and global loads and stores by their width in bytes."""

    def by_width(select: Callable[[Instruction], bool]) -> dict[str, int]:
        found = Counter(width(i) for i in code if select(i))
        return {str(size): found[size] for size in sorted(found)}

    bases = Counter(i.base for i in code)
    return {
        "instructions": len(code),
        **{name: sum(bases[base] for base in starts) for name, starts in CLASSES.items()},
        "loads": by_width(lambda i: i.base == "LDG"),
        "copies": by_width(lambda i: i.base == "LDGSTS"),
        "stores": by_width(lambda i: i.base == "STG"),
    }


def resident(registers: int, shared: int, warps: int, architecture: int) -> int:
    """Return how many blocks of a kernel a multiprocessor holds at once.

    Args:
        registers: of a thread.
        shared: bytes of shared memory of a block.
        warps: of a block.
        architecture: ten times the compute capability.
    """
    for_a_warp = -(-registers * 32 // _UNIT) * _UNIT
    warps_there = min(_REGISTERS // for_a_warp // _TOGETHER * _TOGETHER, _WARPS)
    return min(warps_there // warps, _SHARED[architecture] // (shared + _OWN), _BLOCKS)
