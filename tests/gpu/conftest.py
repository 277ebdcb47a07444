"""Tests that need a GPU; `make gpu` runs them.

With DISTILL_NEMO_GPU_REHEARSAL=1 they run on CPU, at smaller sizes, so that a machine without a GPU can check that they
still work. Otherwise a machine without a GPU skips them.
"""

import os

import pytest
import torch

REHEARSAL = os.environ.get("DISTILL_NEMO_GPU_REHEARSAL") == "1"


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available() and not REHEARSAL:
        for item in items:
            if "tests/gpu" in item.nodeid:
                item.add_marker(pytest.mark.skip(reason="needs a GPU"))


@pytest.fixture(scope="session")
def device():
    """Return the device under test."""
    from distill_nemo.runtime.device import setup_device

    return setup_device()
