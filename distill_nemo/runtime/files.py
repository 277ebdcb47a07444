"""Write files so that a crash or a power loss leaves the old content or the new one. No torch."""

import contextlib
import errno
import os
import shutil
from pathlib import Path

NO_FSYNC = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS)  # of a directory, on some network file systems


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replace `path` by `content` (text as UTF-8), durably; after an error the old file is still there.

    Raises:
        OSError: when it cannot be written.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise
    fsync(path.parent)


def fsync(path: Path) -> None:
    """Put a file's content, or a directory's entries, on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in NO_FSYNC:
            raise
    finally:
        os.close(descriptor)


def replace_directory(new: Path, target: Path) -> None:
    """Put a whole directory in the place of `target`, durably. A crash loses neither: see `restore_replaced`."""
    for path in (*new.rglob("*"), new):
        fsync(path)
    old = _replaced(target)
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    try:
        new.rename(target)
    except BaseException:
        restore_replaced(target)
        raise
    fsync(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def restore_replaced(target: Path) -> None:
    """Bring back the directory that an interrupted `replace_directory` had moved aside, if its successor is missing."""
    old = _replaced(target)
    if old.exists() and not target.exists():
        old.rename(target)


def _replaced(target: Path) -> Path:
    return target.with_name(f".{target.name}.replaced")
