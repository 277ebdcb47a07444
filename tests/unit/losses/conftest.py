"""Choice of kernels for the tests of the losses."""

import pytest

from distill_nemo.losses.kernels.dispatch import VARIABLE
from tests.kernels import skip_if_unusable


@pytest.fixture(params=["c", "eager", "triton"])
def kernels(request, monkeypatch):
    """Compute losses with these kernels."""
    skip_if_unusable(request.param)
    monkeypatch.setenv(VARIABLE, request.param)
    return request.param
