"""Who is waited for that holds an output directory: a holder on another machine, which may have died."""

import json
import subprocess
import sys

import pytest

from distill_nemo.runtime import output_lock

HOLD = """
import fcntl, sys
file = open(sys.argv[1], "w")
fcntl.lockf(file, fcntl.LOCK_EX)
file.write(sys.argv[2])
file.flush()
print("held", flush=True)
sys.stdin.read()
"""
HERE = output_lock._machine()


@pytest.mark.parametrize(
    ("machine", "waits"),
    [
        (HERE, False),
        ({**HERE, "boot": "another"}, True),  # a pod that was moved
        ({**HERE, "host": "another"}, True),
        ({"host": HERE["host"]}, True),  # as older versions wrote it
    ],
)
def test_a_holder_on_another_machine_is_waited_for(tmp_path, monkeypatch, capsys, machine, waits):
    monkeypatch.setattr(output_lock, "LEASE_SECONDS", 0.5)
    content = json.dumps({**machine, "process": "process 41", "since": "before"})
    command = [sys.executable, "-c", HOLD, str(tmp_path / output_lock.NAME), content]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
        refused = output_lock.OutputLock(tmp_path)._take()
        holder.terminate()
    assert refused and refused.startswith(f"another run works there (process 41 on {machine['host']}, since before);")
    assert ("waiting" in capsys.readouterr().out) == waits


def test_the_holder_says_which_machine_it_is_on(tmp_path):
    assert output_lock.OutputLock(tmp_path)._take() is None
    held = json.loads((tmp_path / output_lock.NAME).read_text())
    assert HERE.items() <= held.items() and "boot" in HERE
