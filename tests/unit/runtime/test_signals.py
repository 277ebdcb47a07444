"""Effects of a scheduler's signals."""

import os
import signal

import pytest

from distill_nemo.runtime.signals import StopSignal


def test_a_second_ctrl_c_ends_at_once_and_a_second_sigterm_does_not():
    with StopSignal() as stop:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)
        assert stop.received == signal.SIGTERM
    with StopSignal() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_sigurg_asks_for_a_stop():
    with StopSignal() as stop:
        os.kill(os.getpid(), signal.SIGURG)
        assert stop.received == signal.SIGURG
