"""One writer of an output at a time: others wait for a holder elsewhere, and a failure to lock gives the reason."""

import errno
import fcntl
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from distill_nemo.runtime import output_lock
from distill_nemo.runtime.output_lock import OutputLock

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
    command = [sys.executable, "-c", HOLD, str(tmp_path / "lock"), content]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
        refused = OutputLock(tmp_path / "lock", "output = X").take()
        holder.terminate()
    start = f"output = X: another process writes there (process 41 on {machine['host']}, since before);"
    assert refused and refused.startswith(start)
    assert ("waiting" in capsys.readouterr().out) == waits


def test_a_patient_process_waits_for_a_holder_on_its_own_machine(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(output_lock, "LEASE_SECONDS", 0.0)
    command = [sys.executable, "-c", HOLD, str(tmp_path / "lock"), json.dumps(HERE)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
        monkeypatch.setattr(output_lock.time, "sleep", lambda seconds: holder.kill() or holder.wait())
        with OutputLock(tmp_path / "lock", "output = X", patient=True):
            assert holder.returncode is not None and "waiting until it ends" in capsys.readouterr().out


def test_the_holder_says_which_machine_it_is_on_and_leaves_nothing_behind(tmp_path):
    path = tmp_path / "new" / "deep" / "lock"
    with OutputLock(path, "output = X"):
        held = json.loads(path.read_text())
        assert HERE.items() <= held.items() and "boot" in HERE
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("left", [b"\xff\xfe", b"[]", b"{", b'{"process": 3, "what": 1, "path": 2}', b"\x00" * 40])
def test_a_lock_file_that_a_dead_process_left_is_taken_over_whatever_it_holds(tmp_path, capsys, left):
    (tmp_path / "lock").write_bytes(left)
    with OutputLock(tmp_path / "lock", "output = X"):
        assert "taking over" in capsys.readouterr().out
    assert not (tmp_path / "lock").exists()


UNPRIVILEGED = """
import os, sys
from pathlib import Path
from distill_nemo.runtime.output_lock import OutputLock
os.chdir(sys.argv[1])
if os.getuid() == 0:
    os.setuid(65534)
print(OutputLock(Path(sys.argv[2]), "output = X").take())
"""


@pytest.mark.parametrize(
    ("lock", "message"),
    [
        ("lock", "lock cannot be written: Permission denied"),
        ("new/lock", "new cannot be written: Permission denied"),
        ("others", "others cannot be written: Permission denied"),
    ],
)
def test_a_directory_that_cannot_be_written_is_named_with_its_error(tmp_path, lock, message):
    (tmp_path / "others").write_text("")
    (tmp_path / "others").chmod(0o444)
    tmp_path.chmod(0o555)
    command = [sys.executable, "-c", UNPRIVILEGED, str(tmp_path), lock]
    environment = {**os.environ, "PYTHONPATH": str(Path(output_lock.__file__).parents[2])}
    out = subprocess.run(command, capture_output=True, text=True, check=True, env=environment, timeout=60).stdout
    assert out == f"output = X: {message}\n"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EIO, errno.EACCES, errno.EDQUOT])
def test_the_error_of_the_file_system_is_reported(tmp_path, monkeypatch, number):
    def failing(path, *args):
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr(os, "open", failing)
    refused = OutputLock(tmp_path / "lock", "output = X").take()
    assert refused == f"output = X: {tmp_path}/lock cannot be written: {os.strerror(number)}"


def test_a_file_system_without_locks_is_used_with_a_warning(tmp_path, monkeypatch, capsys):
    def unsupported(*args):
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr(fcntl, "lockf", unsupported)
    with OutputLock(tmp_path / "lock", "output = X"):
        assert f"warning: {tmp_path} is on a file system without locks" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("place", ["lock", "file/lock"])
def test_a_path_that_is_something_else_is_named(tmp_path, place):
    (tmp_path / "lock").mkdir()
    (tmp_path / "file").write_text("")
    with pytest.raises(
        ValueError, match=rf"output = X: {tmp_path}/\w+.* cannot be written: (Is a directory|File exists)"
    ):
        OutputLock(tmp_path / place, "output = X").__enter__()


def test_an_error_is_not_hidden_by_a_lock_file_that_cannot_be_removed(tmp_path, monkeypatch):
    """The file system may have been remounted read-only meanwhile."""

    def read_only(path, missing_ok=False):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    with pytest.raises(OSError, match="checkpoint could not be written"), OutputLock(tmp_path / "lock", "output = X"):
        monkeypatch.setattr(Path, "unlink", read_only)
        raise OSError("checkpoint could not be written")
