"""Shared by every test: GPU tests skip without a device, and memory a kernel should write is poisoned first."""

import pytest
import torch


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


def pytest_configure(config):
    # torch.empty then fills with NaN or the largest integer, so an element that nothing wrote cannot pass.
    torch.utils.deterministic.fill_uninitialized_memory = True
