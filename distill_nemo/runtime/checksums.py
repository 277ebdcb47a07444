"""What was written is what is read: SHA-256 of every file of a checkpoint, as `sha256sum -c SHA256SUMS` reads them.

Ranks share the reading: each hashes the files it wrote, and checks every world-size-th.
"""

import hashlib
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist

SUMS = "SHA256SUMS"


def sum_own_files(directory: Path, rank: int) -> None:
    """Hash the tensor files that this rank wrote, into a part that `join_sums` collects."""
    _write(directory / f"{SUMS}.{rank}", {path.name: _sha256(path) for path in directory.glob(f"__{rank}_*.distcp")})


def then_sum_own_files(write: Any, directory: Path, rank: int) -> Any:
    """`write`, and `sum_own_files` after it, in the same process: an async save's own, away from the training."""
    return partial(_write_and_sum, write, directory, rank)


def _write_and_sum(write: Any, directory: Path, rank: int, *args: Any, **kwargs: Any) -> None:
    write(*args, **kwargs)
    sum_own_files(directory, rank)


def join_sums(directory: Path) -> None:
    """Make one file of the parts and of what no rank has hashed; called once, when all else is written."""
    parts, sums = sorted(directory.glob(f"{SUMS}.*")), {}
    for part in parts:
        sums |= _read(part)
        part.unlink()
    files = (path for path in directory.rglob("*") if path.is_file())
    others = {path.relative_to(directory).as_posix(): path for path in files}
    sums |= {name: _sha256(path) for name, path in others.items() if name not in sums}
    _write(directory / SUMS, dict(sorted(sums.items())))


def damages(directory: Path) -> list[str]:
    """What is wrong with the files of a checkpoint, the same on every rank; every rank must call it.

    Collectives: one all-gather of a few words.
    """
    try:
        sums = _read(directory / SUMS)
    except (OSError, ValueError) as error:
        own = [f"{SUMS} cannot be read ({error})"] if dist.get_rank() == 0 else []
    else:
        mine = list(sums.items())[dist.get_rank() :: dist.get_world_size()]
        own = [words for name, expected in mine if (words := _damage(directory / name, expected))]
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, own)
    return sorted(words for of_rank in found for words in of_rank)


def _damage(path: Path, expected: str) -> str | None:
    try:
        return None if _sha256(path) == expected else f"{path.name} is not what was written (SHA-256 differs)"
    except FileNotFoundError:
        return f"{path.name} is missing"
    except OSError as error:
        return f"{path.name} cannot be read ({error.strerror})"


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read(path: Path) -> dict[str, str]:
    """File name -> hexadecimal sum."""
    lines = path.read_text(encoding="utf-8").splitlines()
    if not all(len(line) > 66 and line[64:66] == "  " for line in lines):
        raise ValueError("not in the format of sha256sum")
    return {line[66:]: line[:64] for line in lines}


def _write(path: Path, sums: dict[str, str]) -> None:
    path.write_text("".join(f"{value}  {name}\n" for name, value in sums.items()), encoding="utf-8")
