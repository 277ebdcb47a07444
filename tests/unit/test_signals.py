"""Processes that a scheduler's SIGTERM must not end."""

import multiprocessing
import os
import signal

import pytest

from distill_nemo.runtime.signals import StopSignal, deaf_children


def test_a_helper_outlives_sigterm_and_this_process_hears_it():
    with StopSignal() as stop:
        with deaf_children():
            manager = multiprocessing.get_context("spawn").Manager()
            os.kill(os.getpid(), signal.SIGTERM)  # comes now to a process of several threads, else afterwards
        assert stop.received == signal.SIGTERM
        queue, helper = manager.Queue(), manager._process
        os.kill(helper.pid, signal.SIGTERM)
        queue.put("still there")
        assert queue.get(timeout=10) == "still there"
        manager.shutdown()
        assert not helper.is_alive()


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
