"""Kernels of the losses that can run on this machine. Triton's run in its interpreter (tests/conftest.py)."""

from importlib.metadata import version

import pytest
from packaging.version import Version

from distill_nemo.losses.kernels import cpu_kernels


def skip_if_unusable(kernels: str) -> None:
    """Skip the test if these kernels cannot run here."""
    if kernels == "c" and cpu_kernels.library() is None:
        pytest.skip("no C compiler")
    old_triton = Version(version("triton")) < Version("3.7") and Version(version("numpy")) >= Version("2.4")
    if kernels == "triton" and old_triton:
        pytest.skip("the interpreter of Triton before 3.7 does not work with numpy from 2.4 on")
