"""SHA-256 of every file of a checkpoint, in the format of `sha256sum -c SHA256SUMS`; all files are fsynced.

Ranks share the work: each hashes the files that it wrote, and checks one file in world-size on resume.
"""

import hashlib
import re
from functools import partial
from pathlib import Path
from typing import Any

from distill_nemo.runtime.files import fsync, write_atomically

SUMS = "SHA256SUMS"
LINE = re.compile(r"([0-9a-f]{64})  (.+)")


def sum_own_files(directory: Path, rank: int) -> None:
    """Hash the tensor files that this rank wrote, into a file that `join_sums` collects."""
    files = list(directory.glob(f"__{rank}_*.distcp"))
    for path in files:
        fsync(path)
    _write(directory / f"{SUMS}.{rank}", {path.name: sha256(path) for path in files})


def then_sum_own_files(write: Any, directory: Path, rank: int) -> Any:
    """Return `write` followed by `sum_own_files` in the same process, which is an async save's, not training's."""
    return partial(_write_and_sum, write, directory, rank)


def _write_and_sum(write: Any, directory: Path, rank: int, *args: Any, **kwargs: Any) -> None:
    write(*args, **kwargs)
    sum_own_files(directory, rank)


def join_sums(directory: Path) -> None:
    """Join the ranks' sums into one file and add files that no rank has hashed; called once, after all is written."""
    parts, sums = sorted(directory.glob(f"{SUMS}.*")), {}
    for part in parts:
        sums |= read_sums(part)
        part.unlink()
    for path in directory.rglob("*"):
        name = path.relative_to(directory).as_posix()
        if path.is_dir():
            fsync(path)
        elif name not in sums:
            fsync(path)
            sums[name] = sha256(path)
    _write(directory / SUMS, dict(sorted(sums.items())))


def read_sums(path: Path) -> dict[str, str]:
    """Return file name -> hexadecimal sum.

    Raises:
        ValueError: if a line is no sum, or a name occurs twice or points outside the directory.
    """
    sums: dict[str, str] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        match = LINE.fullmatch(line)
        if match is None:
            raise ValueError("not in the format of sha256sum")
        value, name = match.groups()
        if name in sums or name.startswith("/") or ".." in name.split("/"):
            raise ValueError(f"{name[:80]} is named twice, or lies outside the checkpoint")
        sums[name] = value
    return sums


def identity_of(directory: Path) -> str:
    """Return what tells a checkpoint from another one of its name: the hash of its sums; "none" without any."""
    try:
        return sha256(directory / SUMS)
    except FileNotFoundError:
        return "none"


def sha256(path: Path) -> str:
    """Return the hexadecimal sum of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write(path: Path, sums: dict[str, str]) -> None:
    write_atomically(path, "".join(f"{value}  {name}\n" for name, value in sums.items()))
