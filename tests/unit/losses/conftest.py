"""Kernels by which the tests of the losses run."""

import pytest

from distill_nemo.losses.kernels.dispatch import VARIABLE
from tests.kernels import skip_if_unusable


@pytest.fixture(params=["c", "eager", "triton"])
def kernels(request, monkeypatch):
    """Compute losses by these kernels."""
    skip_if_unusable(request.param)
    monkeypatch.setenv(VARIABLE, request.param)
    return request.param
