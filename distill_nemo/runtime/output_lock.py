"""Locks that let only one process at a time write an output. Imports torch only for the ranks of a run."""

import contextlib
import errno
import fcntl
import json
import os
import socket
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType

LEASE_SECONDS = 120.0  # NFSv4 servers keep the lock of a machine that has died for 90
UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


class OutputLock:
    """Context manager that holds a POSIX lock on the file `path`: `with OutputLock(path, "output = X"):`.

    The kernel, or the file server, frees the lock when the process ends in any way. A lock file left behind is stale
    and is taken over. Unlike a lock by flock, it is not inherited by child processes. Missing directories are created,
    and removed again if they are still empty.

    Args:
        path: the lock file. If the output appears by a rename, it lies beside the output, not inside.
        what: field and value that the user set, for the error.
        patient: wait for a holder until it ends.

    Raises:
        ValueError: if another process holds the lock, naming it and its host, or if `path` cannot be written.
    """

    def __init__(self, path: Path, what: str, patient: bool = False) -> None:
        self.path, self.what, self.patient = path, what, patient
        self._file: int | None = None
        self._made: list[Path] = []

    def __enter__(self) -> "OutputLock":
        if refused := self.take():
            raise ValueError(refused)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.free()

    def take(self) -> str | None:
        """Take the lock, or return the reason why it cannot be taken."""
        try:
            return self._wait()
        except OSError as error:
            self.free()
            where = error.filename if isinstance(error.filename, str) else self.path
            return f"{self.what}: {where} cannot be written: {error.strerror}"

    def take_if_free(self) -> bool:
        """Take the lock without waiting; return False if another process holds it."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        return self._lock()

    def free(self) -> None:
        """Release the lock, if this process holds it."""
        if self._file is not None:
            with contextlib.suppress(OSError):
                self.path.unlink()  # while locked, so that nobody locks a file about to be removed
            os.close(self._file)
            self._file = None
        with contextlib.suppress(OSError):
            for directory in self._made:
                directory.rmdir()

    def _wait(self) -> str | None:
        self._made = [path for path in self.path.parents if not path.exists()]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        deadline, is_reported = time.monotonic() + LEASE_SECONDS, False
        while not self._lock():
            holder = self._holder()
            problem = "{what}: another process writes there ({process} on {host}, since {since})".format(
                **holder, what=self.what
            )
            if not self.patient and (_machine().items() <= holder.items() or time.monotonic() > deadline):
                return f"{problem}; wait for it, stop it, or choose another output"
            if not is_reported:
                until = "until it ends" if self.patient else f"{LEASE_SECONDS:.0f} s, in case that machine has died"
                print(f"{problem}: waiting {until}", flush=True)
            is_reported = True
            time.sleep(1)
        return None

    def _lock(self) -> bool:
        """Return False if another process holds the lock."""
        file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(file).st_ino != self.path.stat().st_ino:
                raise FileNotFoundError  # its holder has released and removed it meanwhile
        except (BlockingIOError, PermissionError, FileNotFoundError):
            os.close(file)
            return False
        except OSError as error:
            if error.errno not in UNSUPPORTED:
                os.close(file)
                raise
            print(
                f"warning: {self.path.parent} is on a file system without locks: make sure that no other process "
                "writes there",
                file=sys.stderr,
            )
            os.close(file)
            with contextlib.suppress(OSError):
                self.path.unlink()  # nobody would remove it
            return True
        self._file = file
        left = os.read(file, 4096)
        if left:
            holder = self._holder(left)
            print("{process} on {host} ended without freeing {path}: taking over".format(**holder, path=self.path))
        since = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
        process = " ".join(filter(None, [f"process {os.getpid()}", _job()]))
        os.truncate(file, 0)
        os.pwrite(file, json.dumps({**_machine(), "process": process, "since": since}).encode(), 0)
        return True

    def _holder(self, content: bytes | None = None) -> dict[str, str]:
        """Return what the holder wrote about itself; unreadable parts are "unknown"."""
        holder = {"host": "unknown host", "process": "a process", "since": "unknown time", "boot": ""}
        with contextlib.suppress(OSError, ValueError, AttributeError):
            written = json.loads(self.path.read_bytes() if content is None else content)
            holder |= {name: str(value) for name, value in written.items() if name in holder}
        return holder


@contextlib.contextmanager
def locked_by_rank_0(path: Path, what: str) -> Iterator[None]:
    """Hold an `OutputLock` on rank 0; if it is refused, all ranks raise. Collective: every rank must call it."""
    import torch.distributed as dist

    lock = OutputLock(path, what)
    refused = [lock.take() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(refused, src=0)
    if refused[0]:
        raise ValueError(refused[0])
    try:
        yield
    finally:
        lock.free()


def _machine() -> dict[str, str]:
    """Return host name and boot id, since a pod keeps its host name when it moves to another machine."""
    with contextlib.suppress(OSError):
        return {"host": socket.gethostname(), "boot": Path("/proc/sys/kernel/random/boot_id").read_text().strip()}
    return {"host": socket.gethostname()}


def _job() -> str:
    job = os.environ.get("SLURM_JOB_ID")
    return f"of SLURM job {job}" if job else ""
