"""What a scheduler's signals must do, and must not."""

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from distill_nemo.runtime.helper_process import queue_of_helper
from distill_nemo.runtime.signals import StopSignal


def test_a_helper_outlives_sigterm():
    queue = queue_of_helper()
    helper = queue._manager._process
    os.kill(helper.pid, signal.SIGTERM)
    queue.put("still there")
    assert queue.get(timeout=10) == "still there"
    queue._manager.shutdown()
    assert not helper.is_alive()


KILLED = """
import os, signal
from distill_nemo.runtime.helper_process import queue_of_helper
if __name__ == "__main__":
    queue = queue_of_helper()
    print(queue._manager._process.pid, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_helper_does_not_outlive_its_process(tmp_path):
    """It holds the output open: until it ends, so does whatever reads that."""
    (tmp_path / "killed.py").write_text(KILLED)
    ended = subprocess.run([sys.executable, tmp_path / "killed.py"], stdout=subprocess.PIPE, text=True, timeout=60)
    assert ended.returncode == -signal.SIGKILL
    deadline = time.monotonic() + 10
    while psutil.pid_exists(int(ended.stdout)) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not psutil.pid_exists(int(ended.stdout))


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
