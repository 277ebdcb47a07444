"""A process ends when its parent is killed, whatever it does with SIGTERM."""

import subprocess
import sys

import pytest

PARENT = """
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", sys.argv[1]])
child.wait()
"""
CHILD = """
import signal, sys, time
from distill_nemo.runtime import orphans
orphans.POLL_SECONDS = 0.05
asked = []
{handler}
orphans.end_with_parent({grace})
print("ready", flush=True)
while not asked:
    time.sleep(0.05)
print("ended by itself", flush=True)
"""
IGNORED = "signal.signal(signal.SIGTERM, signal.SIG_IGN)"
HANDLED = "signal.signal(signal.SIGTERM, lambda *_: asked.append(1))"


@pytest.mark.parametrize(
    ("handler", "grace", "expected"), [("", 600, ""), (HANDLED, 600, "ended by itself\n"), (IGNORED, 0.2, "")]
)
def test_a_process_whose_parent_was_killed_ends(handler, grace, expected):
    child = CHILD.format(handler=handler, grace=grace)
    parent = subprocess.Popen([sys.executable, "-c", PARENT, child], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None and parent.stdout.readline() == "ready\n"
    parent.kill()
    out, _ = parent.communicate(timeout=60)  # to the end of the pipe, which the child holds
    assert out == expected
