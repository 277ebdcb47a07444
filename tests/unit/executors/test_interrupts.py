"""Signals to the command that watches a run, and their effect on the run."""

import contextlib
import io
import os
import signal
import subprocess

import psutil
import pytest

from distill_nemo.executors import local
from distill_nemo.executors.watch.interrupts import left_running, passing_on_signals


class Closed(io.StringIO):
    """A closed terminal."""

    def write(self, text):
        raise OSError(5, "Input/output error")


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT, signal.SIGTERM])
def test_ranks_are_told_though_the_terminal_is_closed_and_a_child_has_ended(monkeypatch, number):
    ended = subprocess.Popen(["true"])
    with subprocess.Popen(["sleep", "60"], start_new_session=True) as torchrun:
        children = [psutil.Process(child.pid) for child in (ended, torchrun)]
        ended.wait()
        monkeypatch.setattr(psutil.Process, "children", lambda self: children)
        with contextlib.redirect_stderr(Closed()), pytest.raises(SystemExit) as exited, passing_on_signals():
            os.kill(os.getpid(), number)
        try:
            assert torchrun.wait(5) == -signal.SIGTERM
        finally:
            torchrun.kill()
    assert exited.value.code == 128 + number


def test_the_watching_of_a_job_ends_though_the_terminal_is_closed():
    with contextlib.redirect_stderr(Closed()), pytest.raises(SystemExit) as exited, left_running("the job goes on"):
        os.kill(os.getpid(), signal.SIGHUP)
    assert exited.value.code == 128 + signal.SIGHUP


def test_torchrun_waits_for_ranks_that_save():
    assert local().env_vars["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] == os.environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "600")
