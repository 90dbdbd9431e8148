"""Runs the CPU kernels of every ISA of this machine in one process."""

from contextlib import contextmanager

from qatkernels.backends import extension

#: The compiled ISAs that this machine supports, the narrowest first.
ISAS = [isa for isa in extension().build_info()["isas"].split() if extension().has_isa(isa)] if extension() else []
#: ISAs whose products with packed weights are float32 sums, in the same order for any number of tokens.
FLOAT_ISAS = [isa for isa in ISAS if isa in ("baseline", "avx2", "avx512")]


@contextmanager
def using(isa):
    """Use the kernels of an ISA."""
    former = extension().use_isa(isa)
    try:
        yield
    finally:
        extension().use_isa(former)
