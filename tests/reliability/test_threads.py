"""Eight threads at once, and children of a process whose threads compute. Also what ThreadSanitizer runs."""

from __future__ import annotations

import os

import pytest

from qatkernels.backends import extension

from .runner import Campaign

pytestmark = pytest.mark.skipif(extension() is None, reason="kernels and pool belong to the extension")


def test_eight_threads() -> None:
    from . import threads

    campaign = Campaign("threads", seed=14, cases=2)
    threads.run(campaign)
    assert not campaign.failures


@pytest.mark.skipif(
    not hasattr(os, "fork") or "libtsan" in os.environ.get("LD_PRELOAD", ""),
    reason="needs fork, which ThreadSanitizer does not allow beside threads",
)
def test_forks_of_a_process_whose_threads_compute() -> None:
    from . import forks

    campaign = Campaign("forks", seed=14, cases=10)
    forks.run(campaign)
    assert not campaign.failures
