"""Runs the CPU kernels of every ISA of this machine in one process."""

from contextlib import contextmanager

from qatkernels.backends import extension

#: The compiled ISAs that this machine supports, the narrowest first.
ISAS = [isa for isa in extension().build_info()["isas"].split() if extension().has_isa(isa)] if extension() else []
#: ISAs whose products with packed weights are float32 sums, in the same order for any number of tokens.
FLOAT_ISAS = [isa for isa in ISAS if isa in ("baseline", "avx2", "avx512")]


def _tiles():
    try:
        extension().use_tiles(extension().use_tiles("amx"))
    except ValueError:
        return ["portable"]
    return ["portable", "amx"]


#: The others with each kind of tiles (csrc/cpu/tiles.h): "avx512_vnni+portable". AMX only where the machine has it.
TILED = [f"{isa}+{tiles}" for isa in ISAS if isa not in FLOAT_ISAS for tiles in _tiles()]


@contextmanager
def using(name):
    """Use the kernels of an ISA, without tiles unless the name has them."""
    isa, _, tiles = name.partition("+")
    former, tiles_before = extension().use_isa(isa), extension().use_tiles(tiles or "none")
    try:
        yield
    finally:
        extension().use_isa(former)
        extension().use_tiles(tiles_before)
