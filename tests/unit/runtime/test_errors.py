"""Errors of ranks, of which the user should see the first one alone."""

import pytest

from distill_nemo.runtime import errors


def test_a_rank_that_lost_its_connection_lets_rank_0_print_the_reason(monkeypatch):
    waited = []
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(errors.time, "sleep", waited.append)
    with pytest.raises(RuntimeError, match="closed by peer"), errors.errors_in_one_screen():
        raise RuntimeError("Connection closed by peer")  # not of this package, so its traceback is shown
    assert waited == [errors.RANK_0_SECONDS]
