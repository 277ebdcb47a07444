"""Read and write files so that a crash or power loss leaves either the old content or the new. No torch."""

import contextlib
import errno
import json
import os
import reprlib
import shutil
import sys
from collections.abc import Buffer, Iterable, Iterator
from pathlib import Path
from typing import Any

NO_FSYNC = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS)  # of a directory, on some network file systems
MAX_JSON_BYTES = 256 * 2**20


def read_object(path: Path) -> dict[str, Any]:
    """Return the JSON object that a file holds.

    Raises:
        ValueError: if the file cannot be read, has more than `MAX_JSON_BYTES`, or holds something else.
    """
    try:
        size = path.stat().st_size
        value = json.loads(path.read_text(encoding="utf-8")) if size <= MAX_JSON_BYTES else None
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read: {why_unreadable(error)}") from None
    if size > MAX_JSON_BYTES:
        raise ValueError(f"{path} has {size:,} bytes; at most {MAX_JSON_BYTES:,} are read")
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a JSON object, got {reprlib.repr(value)}")
    return value


def why_unreadable(error: Exception) -> str:
    """Return why JSON or YAML cannot be read. In place of Python's names of its own limits, what is beyond them."""
    if isinstance(error, RecursionError):
        return "its brackets are nested too deeply"
    if "set_int_max_str_digits" in str(error):
        return f"it has an integer of more than {sys.get_int_max_str_digits():,} digits"
    return str(error)


def read_object_if_any(path: Path) -> dict[str, Any]:
    """Return the JSON object that a file holds, or an empty one if there is no file."""
    return read_object(path) if path.is_file() else {}


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replace `path` by `content` (text as UTF-8), durably. After an error the old file is still there.

    Raises:
        OSError: if it cannot be written.
    """
    write_blocks_atomically(path, [content.encode() if isinstance(content, str) else content])


def write_blocks_atomically(path: Path, blocks: Iterable[Buffer]) -> None:
    """Do the same with content that is not in one piece."""
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("wb") as file:
            file.writelines(blocks)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        if isinstance(error, OSError) and error.filename is None:  # as of a full disk
            error.filename = str(path)
        raise
    fsync(path.parent)


def fsync(path: Path) -> None:
    """Flush a file's content, or a directory's entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in NO_FSYNC:
            raise
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def writing_directory(target: Path) -> Iterator[Path]:
    """Yield an empty directory that replaces `target` at the end of the block, or is removed on an error."""
    partial = partial_of(target)
    shutil.rmtree(partial, ignore_errors=True)
    try:
        with resuming_directory(target):
            yield partial
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextlib.contextmanager
def resuming_directory(target: Path) -> Iterator[Path]:
    """Yield a directory that replaces `target` at the end of the block. After an error it stays, and is used again."""
    partial = partial_of(target)
    restore_replaced(target)
    partial.mkdir(parents=True, exist_ok=True)
    yield partial
    replace_directory(partial, target)


def remove_directory(path: Path) -> None:
    """Remove a directory if it is there; of a link to one, the link."""
    if path.is_symlink():
        path.unlink()
    shutil.rmtree(path, ignore_errors=True)


def partial_of(target: Path) -> Path:
    """Return the directory in which `target` is written."""
    return target.with_name(f".{target.name}.partial")


def replace_directory(new: Path, target: Path) -> None:
    """Replace `target` by the directory `new`, durably. A crash loses neither: see `restore_replaced`."""
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
    """Restore the directory that an interrupted `replace_directory` moved aside, if its successor is missing."""
    old = _replaced(target)
    if old.exists() and not target.exists():
        old.rename(target)


def _replaced(target: Path) -> Path:
    return target.with_name(f".{target.name}.replaced")
