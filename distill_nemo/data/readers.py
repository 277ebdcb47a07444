"""Read documents from files, in pieces that can be read independently.

Imports nothing heavy, since every worker process of `prepare` imports this module.
"""

import io
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from distill_nemo.data.formats import errors_named, is_compressed, layout, open_input
from distill_nemo.data.json_values import json_values
from distill_nemo.data.tables import (
    DELIMITERS,
    arrow_columns,
    arrow_values,
    csv_rows,
    parquet_columns,
    parquet_values,
    row_groups,
)

if TYPE_CHECKING:
    import pyarrow


@dataclass(frozen=True)
class Piece:
    """A piece of a file: bytes [start, stop) of JSON lines, row groups [start, stop) of parquet, or a whole file."""

    path: str
    kind: str  # see formats.layout
    start: int
    stop: int
    num_bytes: int
    mtime_ns: int


@dataclass(frozen=True)
class Record:
    """One document, or a bad record, whose `problem` and place `where` ("file:line") are set."""

    text: str = ""
    where: str = ""
    problem: str = ""


def cut(path: Path, text_key: str, max_bytes: int) -> list[Piece]:
    """Cut JSON lines and parquet into pieces of about `max_bytes`. Compressed lines and other files stay whole.

    Raises:
        ValueError: if the file cannot be read, has other content than its suffix says, or has no column `text_key`.
    """
    kind = layout(path)
    with errors_named(path):
        stat = path.stat()
        names = _columns(path, kind)
        groups = row_groups(path, max_bytes) if kind == "parquet" else [(0, stat.st_size, stat.st_size)]
    if names and names.count(text_key) != 1:
        number = "more than one" if text_key in names else "no"
        raise ValueError(
            f'{path} has {number} column "{text_key}"; it has {", ".join(names)}. Set text_key to one of them'
        )
    if kind == "jsonl" and not is_compressed(path):
        starts = range(0, stat.st_size, max_bytes)
        groups = [
            (start, min(start + max_bytes, stat.st_size), min(max_bytes, stat.st_size - start)) for start in starts
        ]
    return [Piece(str(path), kind, *group, stat.st_mtime_ns) for group in groups]


def _columns(path: Path, kind: str) -> list[str]:
    """Return the names of a table's columns; empty for other files and for an empty table."""
    if kind in DELIMITERS:
        with _open_text(path) as file:
            return next(csv_rows(file, kind), (0, []))[1]
    return parquet_columns(path) if kind == "parquet" else arrow_columns(path) if kind == "arrow" else []


def read(piece: Piece, text_key: str) -> Iterator[Record]:
    """Yield the documents of a piece in the file's order. Blank lines are skipped; other records without text are bad.

    Raises:
        ValueError: if the rest of the file cannot be read, for instance because it is truncated or its CSV is broken.
    """
    with errors_named(piece.path):
        yield from READERS[piece.kind](piece, text_key)


def _read_text(piece: Piece, text_key: str) -> Iterator[Record]:
    with open_input(Path(piece.path)) as file:
        raw = file.read()
    try:
        yield Record(raw.decode().removeprefix("\ufeff"))
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        yield Record(where=f"{piece.path}:{line}", problem=_not_utf8(error))


def _read_lines(piece: Piece, text_key: str) -> Iterator[Record]:
    """Yield the records of lines that begin inside the piece.

    A line number needs a read of all lines before, so only bad records have one.
    """
    path = Path(piece.path)
    stop = sys.maxsize if is_compressed(path) else piece.stop
    with open_input(path) as file:
        if piece.start:
            file.seek(piece.start - 1)
            file.readline()  # its line began in the previous piece
        first = position = file.tell() if piece.start else 0
        before, line = None, 0
        while position < stop and (raw := file.readline()):
            position, line = position + len(raw), line + 1
            if not raw.strip():
                continue
            record = _of_line(raw.removeprefix(b"\xef\xbb\xbf"), text_key)
            if record.problem:
                before = _count_lines(path, first) if before is None else before
                record = Record(where=f"{path}:{before + line}", problem=record.problem)
            yield record


def _read_json(piece: Piece, text_key: str) -> Iterator[Record]:
    with _open_text(Path(piece.path)) as file:
        for number, value in enumerate(json_values(file), start=1):
            yield _of_object(value, text_key, f"{piece.path}, record {number}")


def _read_csv(piece: Piece, text_key: str) -> Iterator[Record]:
    with _open_text(Path(piece.path)) as file:
        rows = csv_rows(file, piece.kind)
        names = next(rows, (0, []))[1]
        for line, row in rows:
            where = f"{piece.path}:{line}"
            if len(row) == len(names):
                yield _of_text(row[names.index(text_key)], text_key, where)
            else:
                yield Record(where=where, problem=f"has {len(row)} fields, and the header {len(names)}")


def _read_parquet(piece: Piece, text_key: str) -> Iterator[Record]:
    return _of_scalars(parquet_values(Path(piece.path), text_key, piece.start, piece.stop), piece, text_key)


def _read_arrow(piece: Piece, text_key: str) -> Iterator[Record]:
    return _of_scalars(arrow_values(Path(piece.path), text_key), piece, text_key)


READERS = {
    "text": _read_text,
    "jsonl": _read_lines,
    "json": _read_json,
    "csv": _read_csv,
    "tsv": _read_csv,
    "parquet": _read_parquet,
    "arrow": _read_arrow,
}


def _open_text(path: Path) -> TextIO:
    """Open a text file. Bytes that are not UTF-8 become surrogates, which make a record bad."""
    return io.TextIOWrapper(open_input(path), "utf-8-sig", errors="surrogateescape", newline="")


def _of_line(raw: bytes, text_key: str) -> Record:
    try:
        return _of_object(json.loads(raw.decode()), text_key)
    except UnicodeDecodeError as error:
        return Record(problem=_not_utf8(error))
    except (ValueError, RecursionError) as error:
        return Record(problem=f"is not valid JSON: {error}")


def _of_object(value: object, text_key: str, where: str = "") -> Record:
    if not isinstance(value, dict):
        return Record(where=where, problem=f"is a {type(value).__name__}, not an object")
    if text_key not in value:
        return Record(where=where, problem=f'has no key "{text_key}" (it has {", ".join(list(value)[:5]) or "none"})')
    return _of_text(value[text_key], text_key, where)


def _of_text(text: object, text_key: str, where: str = "") -> Record:
    if not isinstance(text, str):
        return Record(where=where, problem=f'"{text_key}" is {type(text).__name__}, not a string')
    try:
        text.encode()
    except UnicodeEncodeError as error:  # half of a surrogate pair, escaped in JSON, or a byte, see `_open_text`
        byte = ord(text[error.start]) - 0xDC00
        problem = "holds half of a surrogate pair"
        if 0x80 <= byte <= 0xFF:
            problem = f"is not UTF-8: byte 0x{byte:02x}"
        return Record(where=where, problem=f'"{text_key}" {problem}')
    return Record(text)


def _of_scalars(scalars: "Iterator[tuple[int, pyarrow.Scalar]]", piece: Piece, text_key: str) -> Iterator[Record]:
    for row, scalar in scalars:
        where = f"{piece.path}:{row}"
        try:
            yield _of_text(scalar.as_py(), text_key, where)
        except UnicodeDecodeError as error:
            yield Record(where=where, problem=_not_utf8(error))


def _not_utf8(error: UnicodeDecodeError) -> str:
    return f"is not UTF-8: byte 0x{error.object[error.start]:02x}, {error.reason}"


def _count_lines(path: Path, stop: int) -> int:
    lines = 0
    with path.open("rb") as file:
        while stop > 0 and (block := file.read(min(stop, 1 << 20))):
            lines, stop = lines + block.count(b"\n"), stop - len(block)
    return lines
