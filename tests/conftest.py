"""Marks, hypothesis profiles and fixtures of all tests. Tests marked `gpu` are skipped without a CUDA device."""

import os
import sys
import tempfile

import pytest
import torch
from hypothesis import settings

from tests import slow
from tests.implementations import HAS_GPU
from tests.isas import ISAS, TILED, using
from tests.pair import Group

# torch.compile caches code for one instruction set. torch 2.13 reuses it under another ATEN_CPU_CAPABILITY, and then
# elements are missing or written past the end (docs/training.md). So each instruction set has its own cache.
os.environ.setdefault(
    "TORCHINDUCTOR_CACHE_DIR",
    f"{tempfile.gettempdir()}/inductor-{os.getuid()}-{torch.backends.cpu.get_cpu_capability().replace(' ', '-')}",
)

# `pytest -n` gives every core a process, where further threads would only wait for each other. Tests of threads ask for
# as many as they need.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"  # of processes that tests start
    torch.set_num_threads(1)

# No test asserts a time, so there is no deadline. In CI every run tries the same examples, so that a failure comes from
# the change.
settings.register_profile("any machine", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("ci" if os.environ.get("CI") else "any machine")


def pytest_collection_modifyitems(items):
    listed = slow.names()
    for item in items:
        if slow.function_of(item.nodeid) in listed or slow.fixture_of(item.nodeid, item.fixturenames):
            item.add_marker(pytest.mark.slow)
    if HAS_GPU:
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if item.get_closest_marker("gpu"):  # item.keywords would also have the names of folders
            item.add_marker(skip)


@pytest.fixture(params=[*ISAS, *TILED])
def isa(request):
    """Run a test with the CPU kernels of each ISA that this machine has, and with tiles where an ISA has them."""
    with using(request.param):
        yield request.param


@pytest.fixture(scope="session")
def pair():
    """Two processes of one gloo group (tests/pair.py), for all tests of this worker of pytest."""
    if sys.platform != "linux" or not torch.distributed.is_gloo_available():
        pytest.skip("needs gloo")
    processes = Group()
    yield processes
    processes.close()


@pytest.fixture(scope="session")
def four():
    """Four such processes."""
    if sys.platform != "linux" or not torch.distributed.is_gloo_available():
        pytest.skip("needs gloo")
    processes = Group(4)
    yield processes
    processes.close()
