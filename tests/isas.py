"""The CPU kernels of every ISA that this machine has, one after another in this process."""

from contextlib import contextmanager

from qatkernels.backends import extension

#: What this machine runs of the ISAs that were compiled, the narrowest first.
ISAS = [isa for isa in extension().build_info()["isas"].split() if extension().has_isa(isa)] if extension() else []
#: Those whose products with packed weights are sums in float32, added in one order whatever the number of tokens.
FLOAT_ISAS = [isa for isa in ISAS if isa in ("baseline", "avx2", "avx512")]


@contextmanager
def using(isa):
    """Compute with the kernels of a named ISA."""
    former = extension().use_isa(isa)
    try:
        yield
    finally:
        extension().use_isa(former)
