"""Errors of ranks, of which the user should see the first one alone."""

import pytest
import torch

from distill_nemo.runtime import errors


def test_a_rank_that_lost_its_connection_lets_rank_0_print_the_reason(monkeypatch):
    waited = []
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(errors.time, "sleep", waited.append)
    with pytest.raises(RuntimeError, match="closed by peer"), errors.errors_in_one_screen():
        raise RuntimeError("Connection closed by peer")  # not of this package, so its traceback is shown
    assert waited == [errors.RANK_0_SECONDS]


@pytest.mark.parametrize(
    ("take", "cause"),
    [
        (lambda: torch.empty(2**60, dtype=torch.uint8), " (DefaultCPUAllocator: can't allocate memory: you tried"),
        (lambda: bytearray(2**62), ":"),
    ],
)
def test_memory_that_runs_out_is_one_line_that_says_what_to_lower(take, cause, capsys):
    with pytest.raises(SystemExit), errors.errors_in_one_screen():
        take()
    printed = capsys.readouterr().err
    assert printed.startswith("error: this host's memory ran out") and cause in printed
    assert printed.count("\n") == 1 and "lower the micro batch size" in printed
