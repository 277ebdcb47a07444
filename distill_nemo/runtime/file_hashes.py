"""Hash files by content, in parts that several processes can share. No torch.

A safetensors file is hashed tensor by tensor. Its metadata and the order of its header, which varies between two writes
of the same tensors, do not affect the hash.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

PART_BYTES = 2**28
BLOCK_BYTES = 2**24
MAX_HEADER_BYTES = 10**8  # of the format itself


@dataclass(frozen=True)
class FilePart:
    """Range of bytes of a file.

    Args:
        path: the file.
        label: identifies their content, independent of the offset; None for a whole file, as `sha256sum` hashes it.
        offset: of the first byte.
        length: number of bytes.
    """

    path: Path
    label: str | None
    offset: int
    length: int


def parts(path: Path) -> list[FilePart]:
    """Divide a file into its tensors, if it is a safetensors file, and into parts of at most `PART_BYTES`."""
    size = path.stat().st_size
    spans = _tensors(path, size) if path.suffix == ".safetensors" else None
    return [
        FilePart(path, f"{label}:{begin - start}", begin, min(PART_BYTES, end - begin))
        for label, start, end in spans or [("", 0, size)]
        for begin in range(start, max(end, start + 1), PART_BYTES)
    ]


def whole_file(path: Path) -> FilePart:
    """Return all of a file as one part, whose hash is that of `sha256sum`."""
    return FilePart(path, None, 0, path.stat().st_size)


def hash_part(part: FilePart) -> str:
    """Return the SHA-256 of a part's label, if it has one, and bytes.

    Raises:
        ValueError: if the file has become shorter.
    """
    digest = hashlib.sha256(b"" if part.label is None else f"{part.label}:{part.length}\n".encode())
    left = part.length
    with part.path.open("rb") as file:
        file.seek(part.offset)
        while left:
            block = file.read(min(left, BLOCK_BYTES))
            if not block:
                raise ValueError(f"{part.path} became shorter while it was read")
            digest.update(block)
            left -= len(block)
    return digest.hexdigest()


def join_hashes(hashes: list[str]) -> str:
    """Return one hash for the parts of a file, independent of their order."""
    return hashlib.sha256("".join(sorted(hashes)).encode()).hexdigest()


def _tensors(path: Path, size: int) -> list[tuple[str, int, int]] | None:
    """Return (name, dtype and shape; first byte; end) of every tensor, or None if the header is damaged."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > min(MAX_HEADER_BYTES, size):
                return None
            header = json.loads(file.read(length))
        spans = sorted(
            (8 + length + tensor["data_offsets"][0], 8 + length + tensor["data_offsets"][1], name)
            for name, tensor in header.items()
            if name != "__metadata__"
        )
        labels = {name: json.dumps([name, header[name]["dtype"], header[name]["shape"]]) for _, _, name in spans}
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None
    ends = [8 + length, *(end for _, end, _ in spans)]
    if [start for start, _, _ in spans] != ends[:-1] or ends[-1] != size:  # every byte belongs to one tensor
        return None
    return [(labels[name], start, end) for start, end, name in spans]
