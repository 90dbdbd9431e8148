"""For authors of backends and their tests: sample calls of every op, and what a result is compared with.

    from qatkernels.testing import check_op

    check_op("fake_quantize", my_kernel)    # raises AssertionError, with the call, where a bit differs

Nothing of the library imports this package.
"""

from .checks import Check, check_op, checks
from .compare import assert_same_bits, assert_within, check_sample, run_out
from .samples import GRIDS, Sample, complete_calls, make, samples

__all__ = [
    "GRIDS",
    "Check",
    "Sample",
    "assert_same_bits",
    "assert_within",
    "check_op",
    "check_sample",
    "checks",
    "complete_calls",
    "make",
    "run_out",
    "samples",
]
