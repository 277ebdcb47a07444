"""A watched file is read whole, however little the system returns at a time."""

import os

import numpy as np
import pytest

from distill_nemo.runtime.watched_file import WatchedFile


@pytest.fixture
def numbers(tmp_path, monkeypatch):
    """Return a file of 0 to 99 that a system reads which returns at most 24 bytes a call. Linux returns 2 GiB."""
    path, pread = tmp_path / "numbers", os.pread
    np.arange(100, dtype=np.int32).tofile(path)
    monkeypatch.setattr(os, "pread", lambda file, size, offset: pread(file, min(size, 24), offset))
    return path


def test_more_than_a_call_returns_is_read(numbers):
    file = WatchedFile(str(numbers))
    assert file.read(np.int32, 60, 40).tolist() == list(range(10, 70))
    assert file.read(np.int32, 0, 400).tolist() == []


def test_a_file_that_ends_before_is_refused(numbers):
    with pytest.raises(ValueError, match="has 400 bytes now"):
        WatchedFile(str(numbers)).read(np.int32, 60, 200)
