"""File formats by suffix and compression. A file with other content than its suffix says is refused by name.

Imports nothing heavy, since every worker process of `prepare` imports this module.
"""

import contextlib
import errno
import io
import lzma
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from distill_nemo.data.json_values import json_layout
from distill_nemo.runtime.files import why_unreadable

KINDS = {
    "text": (".txt", ".text", ".md", ".py"),
    "json": (".jsonl", ".jsonlines", ".jl", ".ndjson", ".json"),
    "csv": (".csv",),
    "tsv": (".tsv",),
    "parquet": (".parquet",),
    "arrow": (".arrow", ".feather"),
}
CODECS = {".gz": "gzip", ".bz2": "bz2", ".zst": "zstd", ".lz4": "lz4", ".xz": "xz"}
SUFFIXES = {suffix: kind for kind, suffixes in KINDS.items() for suffix in suffixes}
TABLES = ("parquet", "arrow")  # opened by pyarrow; they compress their own columns
KNOWN = (
    f"Known are {' '.join(SUFFIXES)}, and all but {' '.join(KINDS['parquet'] + KINDS['arrow'])} also compressed, with "
    f"{' '.join(CODECS)} behind"
)
MAX_MAGIC = 512  # bytes at a file's beginning that tell its content
BLOCK_BYTES = 1 << 16  # read at a time
OTHER_CONTENT = {
    "gzip": rb"\x1f\x8b",
    "bzip2": rb"BZh[1-9]1AY&SY",
    "Zstandard": rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18",
    "lz4": rb"\x04\x22\x4d\x18",
    "xz": rb"\xfd7zXZ\x00",
    "zip": rb"PK\x03\x04",
    "tar": rb".{257}ustar",
    "parquet": rb"PAR1\x15",
    "Arrow": rb"ARROW1\x00|\xff\xff\xff\xff",
    "UTF-16 or UTF-32": rb"\xff\xfe|\xfe\xff|\x00\x00\xfe\xff",
    "a pointer of Git LFS": rb"version https://git-lfs",
    "NUL bytes": rb"[^\x00]{0,3}\x00",  # UTF-16 without its mark, or zeros after a crash
}


def split_suffixes(path: Path) -> tuple[str, str]:
    """Return the suffixes of format and compression in lower case: "a.JSONL.gz" -> (".jsonl", ".gz")."""
    compression = path.suffix.lower() if path.suffix.lower() in CODECS else ""
    return (Path(path.stem) if compression else path).suffix.lower(), compression


def is_compressed(path: Path) -> bool:
    """Return True if the file is compressed, by its suffix."""
    return bool(split_suffixes(path)[1])


def problem_of(path: Path) -> str:
    """Return why `path` cannot be an input, by its name and type; "" if it can."""
    try:
        mode = path.stat().st_mode
    except OSError as error:
        return "a link to nothing" if error.errno in (errno.ENOENT, errno.ELOOP) else str(error.strerror)
    if not stat.S_ISREG(mode):
        return "a pipe, a socket or a device"
    suffix, compression = split_suffixes(path)
    if suffix not in SUFFIXES:
        return f'unknown suffix "{suffix}{compression}"' if suffix or compression else "no suffix"
    if compression and SUFFIXES[suffix] in TABLES:
        return f"{suffix}{compression} is not read: decompress it"
    return ""


def open_input(path: Path) -> BinaryIO:
    """Open a file for reading, with decompression."""
    _, compression = split_suffixes(path)
    if not compression:
        return path.open("rb")
    if compression == ".xz":
        return io.BufferedReader(_Xz(path))
    import pyarrow

    return io.BufferedReader(pyarrow.input_stream(str(path), compression=CODECS[compression]))


def open_text(path: Path) -> TextIO:
    """Open a text file. Bytes that are not UTF-8 become surrogates, which make a record bad."""
    return io.TextIOWrapper(open_input(path), "utf-8-sig", errors="surrogateescape", newline="")


class _Xz(io.RawIOBase):
    """Decompressor of all streams of an .xz file. `lzma.open` silently ends before a stream with a damaged header."""

    def __init__(self, path: Path) -> None:
        self._file, self._stream = path.open("rb"), lzma.LZMADecompressor()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = b""
        while not data:
            raw = b""
            if self._stream.eof:
                raw = self._stream.unused_data.lstrip(b"\0")  # padding between streams
                if not raw and not (raw := self._file.read(BLOCK_BYTES)):
                    return 0
                self._stream = lzma.LZMADecompressor()
            elif self._stream.needs_input and not (raw := self._file.read(BLOCK_BYTES)):
                raise EOFError("it was cut short")
            data = self._stream.decompress(raw, len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        self._file.close()
        super().close()


def layout(path: Path) -> str:
    """Return a file's format: text, csv, tsv, parquet, arrow, or what `json_layout` finds.

    Raises:
        ValueError: if the content is not what the suffix says.
    """
    suffix, compression = split_suffixes(path)
    kind = SUFFIXES[suffix]
    if kind in TABLES:
        return kind
    with errors_named(path):
        if compression and not path.stat().st_size:
            raise ValueError(f"it is empty, which no whole {compression} file is")
        with open_input(path) as file:
            head = file.read(MAX_MAGIC)
        for name, pattern in OTHER_CONTENT.items():
            if re.match(pattern, head, re.S):
                raise ValueError(f"it holds {name}, which its suffix does not say")
        if kind != "json":
            return kind
        with open_text(path) as file:
            return json_layout(file)


@contextlib.contextmanager
def errors_named(path: Path | str) -> Iterator[None]:
    """Turn errors of reading a file into a ValueError that names it."""
    try:
        yield
    except (OSError, EOFError, ValueError, RecursionError, lzma.LZMAError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else why_unreadable(error).rstrip(".")
        raise ValueError(
            f"{path} cannot be read: {reason}; mend or convert it, or leave it out of the inputs"
        ) from None
