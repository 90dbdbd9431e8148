"""Helpers to test kernels: sample calls of every op, and comparisons of results with the reference.

    from qatkernels.testing import check_op

    check_op("fake_quantize", my_kernel)    # raises AssertionError, which names the call, if a bit differs

The rest of the library does not import this package.
"""

from .checks import Check, check_op, every_check
from .compare import assert_same_bits, assert_within, check_sample, run_out
from .samples import GRIDS, Sample, complete_calls, every_sample, make

__all__ = [
    "GRIDS",
    "Check",
    "Sample",
    "assert_same_bits",
    "assert_within",
    "check_op",
    "check_sample",
    "complete_calls",
    "every_check",
    "every_sample",
    "make",
    "run_out",
]
