"""One run at a time in an output directory."""

import contextlib
import errno
import fcntl
import json
import os
import socket
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any

import torch.distributed as dist

NAME = "run.lock"
LEASE_SECONDS = 120.0  # NFSv4 servers keep the lock of a machine that has died for 90
UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


class OutputLock:
    """`with OutputLock(directory):` on every rank; rank 0 holds a POSIX lock on `run.lock` meanwhile.

    The kernel, or the file server, frees it when the process ends, however that comes: a file that is left is stale,
    and taken over. Unlike flock's, the lock is not inherited by the processes that write checkpoints. The directory is
    made, and removed again where nothing else came into it.

    Raises:
        ValueError: on every rank, when another run holds it, naming host and process.
    """

    def __init__(self, directory: Path) -> None:
        self.directory, self.path = directory, directory / NAME
        self._file: int | None = None
        self._made: list[Path] = []

    def __enter__(self) -> "OutputLock":
        refused = [self._take() if dist.get_rank() == 0 else None]
        dist.broadcast_object_list(refused, src=0)
        if refused[0]:
            raise ValueError(f"output_dir = {self.directory}: {refused[0]}")
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._file is not None:
            self.path.unlink(missing_ok=True)  # while it is locked, so that nobody locks a file that goes away
            os.close(self._file)
        with contextlib.suppress(OSError):
            for directory in self._made:
                directory.rmdir()

    def _take(self) -> str | None:
        """Lock, or say why not."""
        try:
            self._made = [path for path in (self.directory, *self.directory.parents) if not path.exists()]
            self.directory.mkdir(parents=True, exist_ok=True)
            until, said = time.monotonic() + LEASE_SECONDS, False
            while not self._lock():
                holder = self._holder()
                words = "another run works there ({process} on {host}, since {since})".format(**holder)
                if _machine().items() <= holder.items() or time.monotonic() > until:
                    return f"{words}; wait for it, stop it, or choose another output_dir"
                if not said:
                    print(f"{words}: waiting {LEASE_SECONDS:.0f} s, in case that machine has died", flush=True)
                said = True
                time.sleep(1)
        except OSError as error:
            if error.errno not in UNSUPPORTED:
                return f"cannot be written: {error.strerror}"
            print(
                f"warning: {self.directory} is on a file system without locks: see that no other run writes there",
                file=sys.stderr,
            )
        return None

    def _lock(self) -> bool:
        file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(file).st_ino != self.path.stat().st_ino:
                raise FileNotFoundError  # freed and removed by its holder in between
        except (BlockingIOError, PermissionError, FileNotFoundError):
            os.close(file)
            return False
        left = os.read(file, 4096)
        if left:
            holder = self._holder(left)
            print("{process} on {host} ended without freeing {path}: taking over".format(path=self.path, **holder))
        os.truncate(file, 0)
        since = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
        process = " ".join(filter(None, [f"process {os.getpid()}", _job()]))
        os.pwrite(file, json.dumps({**_machine(), "process": process, "since": since}).encode(), 0)
        self._file = file
        return True

    def _holder(self, content: bytes | None = None) -> dict[str, Any]:
        unknown = {"host": "unknown host", "process": "a process", "since": "unknown time"}
        try:
            return unknown | json.loads(self.path.read_bytes() if content is None else content)
        except (OSError, ValueError):
            return unknown


def _machine() -> dict[str, str]:
    """This machine since its start: a pod keeps its host name on another node."""
    with contextlib.suppress(OSError):
        return {"host": socket.gethostname(), "boot": Path("/proc/sys/kernel/random/boot_id").read_text().strip()}
    return {"host": socket.gethostname()}


def _job() -> str:
    job = os.environ.get("SLURM_JOB_ID")
    return f"of SLURM job {job}" if job else ""
