"""Read documents from files, in pieces that can be read independently.

Imports nothing heavy, since every worker process of `prepare` imports this module.
"""

import itertools
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill_nemo.data.conversations import (
    HAS_ZEROS,
    JSON_DECODER,
    ZEROS,
    Conversation,
    Format,
    RecordError,
    columns_of,
    conversation_of,
    format_of,
    record_of,
)
from distill_nemo.data.formats import BLOCK_BYTES, errors_named, is_compressed, layout, open_input, open_text
from distill_nemo.data.json_values import json_values
from distill_nemo.data.tables import (
    DELIMITERS,
    arrow_columns,
    arrow_rows,
    csv_rows,
    parquet_columns,
    parquet_rows,
    row_groups,
)
from distill_nemo.runtime.files import why_unreadable

if TYPE_CHECKING:
    import pyarrow

MESSAGES_AT = ", or format=chat and text_key to its messages"
FIRST_RECORDS = 100  # of a file, that are searched for a known format
_COUNTED: dict[tuple[Path, int, int], tuple[int, int]] = {}  # bytes and their lines, see `_count_lines`


@dataclass(frozen=True)
class FilePiece:
    """A piece of a file: bytes [start, stop) of JSON lines, row groups [start, stop) of parquet, or a whole file."""

    path: str
    kind: str  # see formats.layout
    start: int
    stop: int
    num_bytes: int
    mtime_ns: int


@dataclass(frozen=True)
class Schema:
    """Format of all records, and the key or column of a text."""

    kind: Format
    text_key: str


@dataclass(frozen=True)
class Record:
    """One document, or a bad record, whose `problem` is set.

    Args:
        document: a text or a conversation.
        problem: continues a sentence that begins with the record's place.
        where: returns the place, "file:line". To find a line number can take a read of all lines before.
    """

    document: str | Conversation = ""
    problem: str = ""
    where: Callable[[], str] = str


def schema_of(paths: list[Path], text_key: str) -> Schema:
    """Return the format of the first record that has one; text if there is none among the first of each file.

    Raises:
        ValueError: if a file cannot be read.
    """
    for path in paths:
        kind = layout(path)
        with errors_named(path):
            columns = [text_key] if kind == "text" else _columns(path, kind)
            for names in [columns] if columns else _keys(path, kind):
                if found := format_of(names, text_key):
                    return Schema(found, text_key)
    return Schema("text", text_key)


def _keys(path: Path, kind: str) -> Iterator[list[str]]:
    """Yield the keys of a JSON file's first records."""
    if kind not in ("json", "jsonl", "lists"):
        return
    with open_text(path) as file:
        lines = map(_value_if_any, filter(str.strip, file))
        values = lines if kind == "jsonl" else json_values(file, of_array=kind == "json")
        records = map(record_of, itertools.islice(values, FIRST_RECORDS))
        yield from (list(record) for record in records if isinstance(record, dict))


def _value_if_any(line: str) -> object:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):  # a bad record, which is counted later
        return None


def cut(path: Path, schema: Schema, max_bytes: int) -> list[FilePiece]:
    """Cut JSON lines and parquet into pieces of about `max_bytes`. Compressed lines and other files stay whole.

    Raises:
        ValueError: if the file cannot be read, has other content than its suffix says, or lacks the format's columns.
    """
    kind = layout(path)
    with errors_named(path):
        stat = path.stat()
        names = _columns(path, kind)
        groups = row_groups(path, max_bytes) if kind == "parquet" else [(0, stat.st_size, stat.st_size)]
    if names:
        _check_columns(path, names, schema)
    if kind == "jsonl" and not is_compressed(path):
        starts = range(0, stat.st_size, max_bytes)
        groups = [
            (start, min(start + max_bytes, stat.st_size), min(max_bytes, stat.st_size - start)) for start in starts
        ]
    return [FilePiece(str(path), kind, *group, stat.st_mtime_ns) for group in groups]


def _check_columns(path: Path, names: list[str], schema: Schema) -> None:
    listed, key = ", ".join(names), schema.text_key
    if schema.kind == "text" and names.count(key) != 1:
        number = "more than one" if key in names else "no"
        raise ValueError(
            f'{path} has {number} column "{key}"; it has {listed}. Set text_key to one of them{MESSAGES_AT}'
        )
    is_chat = schema.kind == "chat" and key in names
    if schema.kind != "text" and not is_chat and format_of(names, "") != schema.kind:
        raise ValueError(f"{path} has no columns of format {schema.kind}; it has {listed}")
    if len(set(names)) != len(names):
        raise ValueError(f"{path} has more than one column of one name; it has {listed}")


def _columns(path: Path, kind: str) -> list[str]:
    """Return the names of a table's columns; empty for other files and for an empty table."""
    if kind in DELIMITERS:
        with open_text(path) as file:
            return next(csv_rows(file, kind), (0, []))[1]
    return parquet_columns(path) if kind == "parquet" else arrow_columns(path) if kind == "arrow" else []


def read(piece: FilePiece, schema: Schema) -> Iterator[Record]:
    """Yield the documents of a piece in the file's order. Blank lines are skipped; other records without text are bad.

    Raises:
        ValueError: if the rest of the file cannot be read, for instance because it is truncated or its CSV is broken.
    """
    with errors_named(piece.path):
        yield from READERS[piece.kind](piece, schema)


def _read_text(piece: FilePiece, schema: Schema) -> Iterator[Record]:
    if schema.kind != "text":
        yield Record("", f"is a text, and the records are of format {schema.kind}", lambda: piece.path)
        return
    with open_input(Path(piece.path)) as file:
        raw = file.read()
    try:
        text = raw.decode().removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        yield Record("", _not_utf8(error), lambda: f"{piece.path}:{line}")
    else:
        line = text.count("\n", 0, text.find(ZEROS)) + 1
        yield Record("", HAS_ZEROS, lambda: f"{piece.path}:{line}") if ZEROS in text else Record(text)


def _read_lines(piece: FilePiece, schema: Schema) -> Iterator[Record]:
    """Yield the records of lines that begin inside the piece."""
    path = Path(piece.path)
    stop = sys.maxsize if is_compressed(path) else piece.stop
    with open_input(path) as file:
        if piece.start:
            file.seek(piece.start - 1)
            while file.tell() < stop and (rest := file.readline(BLOCK_BYTES)) and not rest.endswith(b"\n"):
                pass  # its line began in an earlier piece, and may end in a later one
        first = position = file.tell() if piece.start else 0
        line = 0
        while position < stop and (raw := file.readline()):
            position, line = position + len(raw), line + 1
            if not raw.strip():
                continue
            yield _of_line(raw.removeprefix(b"\xef\xbb\xbf"), schema, partial(_place_of_line, path, first, line))


def _read_json(piece: FilePiece, schema: Schema) -> Iterator[Record]:
    with open_text(Path(piece.path)) as file:
        for number, value in enumerate(json_values(file, of_array=piece.kind == "json"), start=1):
            yield _of_object(value, schema, partial("{}, record {}".format, piece.path, number))


def _read_csv(piece: FilePiece, schema: Schema) -> Iterator[Record]:
    with open_text(Path(piece.path)) as file:
        rows = csv_rows(file, piece.kind)
        names = next(rows, (0, []))[1]
        for line, row in rows:
            where = partial("{}:{}".format, piece.path, line)
            if len(row) == len(names):
                yield _of_object(dict(zip(names, row, strict=True)), schema, where)
            else:
                yield Record("", f"has {len(row)} fields, and the header {len(names)}", where)


def _read_parquet(piece: FilePiece, schema: Schema) -> Iterator[Record]:
    path = Path(piece.path)
    columns = columns_of(schema.kind, parquet_columns(path), schema.text_key)
    return _of_rows(parquet_rows(path, columns, piece.start, piece.stop), piece, schema)


def _read_arrow(piece: FilePiece, schema: Schema) -> Iterator[Record]:
    path = Path(piece.path)
    return _of_rows(arrow_rows(path, columns_of(schema.kind, arrow_columns(path), schema.text_key)), piece, schema)


READERS = {
    "text": _read_text,
    "jsonl": _read_lines,
    "json": _read_json,
    "lists": _read_json,
    "csv": _read_csv,
    "tsv": _read_csv,
    "parquet": _read_parquet,
    "arrow": _read_arrow,
}


def _of_line(raw: bytes, schema: Schema, where: Callable[[], str]) -> Record:
    try:
        value = JSON_DECODER.decode(raw.decode())
    except UnicodeDecodeError as error:
        return Record("", _not_utf8(error), where)
    except RecordError as error:
        return Record("", str(error), where)
    except (ValueError, RecursionError) as error:
        return Record("", f"cannot be read as JSON: {why_unreadable(error)}", where)
    return _of_object(value, schema, where)


def _of_object(value: object, schema: Schema, where: Callable[[], str]) -> Record:
    value = value if schema.kind == "text" else record_of(value)
    if isinstance(value, RecordError):
        return Record("", str(value), where)
    if not isinstance(value, dict):
        return Record("", f"is a {type(value).__name__}, not an object", where)
    if schema.kind != "text":
        return _of_conversation(value, schema, where)
    key = schema.text_key
    if key not in value:
        listed = ", ".join(list(value)[:5]) or "none"
        way_out = f"set text_key to its text{MESSAGES_AT}"
        return Record("", f'has no key "{key}" (it has {listed}): {way_out}', where)
    return _of_text(value[key], key, where)


def _of_conversation(value: dict[str, Any], schema: Schema, where: Callable[[], str]) -> Record:
    try:
        return Record(conversation_of(value, schema.kind, schema.text_key), "", where)
    except RecordError as error:
        return Record("", str(error), where)


def _of_text(text: object, text_key: str, where: Callable[[], str]) -> Record:
    if not isinstance(text, str):
        return Record("", f'"{text_key}" is {type(text).__name__}, not a string', where)
    try:
        text.encode()
    except UnicodeEncodeError as error:  # half of a surrogate pair, escaped in JSON, or a byte, see `_open_text`
        byte = ord(text[error.start]) - 0xDC00
        problem = "holds half of a surrogate pair"
        if 0x80 <= byte <= 0xFF:
            problem = f"is not UTF-8: byte 0x{byte:02x}"
        return Record("", f'"{text_key}" {problem}', where)
    if ZEROS in text:
        return Record("", f'"{text_key}" {HAS_ZEROS}', where)
    return Record(text, "", where)


def _of_rows(
    rows: "Iterator[tuple[int, dict[str, pyarrow.Scalar]]]", piece: FilePiece, schema: Schema
) -> Iterator[Record]:
    for number, row in rows:
        where = partial("{}:{}".format, piece.path, number)
        try:
            values = {name: _without_nulls(scalar.as_py()) for name, scalar in row.items()}
        except UnicodeDecodeError as error:
            yield Record("", _not_utf8(error), where)
        else:
            yield _of_object(values, schema, where)


def _without_nulls(value: Any) -> Any:
    """Return a table's value without the keys that are null, which the arguments of another row's tool call brought."""
    if isinstance(value, dict):
        return {name: _without_nulls(entry) for name, entry in value.items() if entry is not None}
    return [_without_nulls(entry) for entry in value] if isinstance(value, list) else value


def _not_utf8(error: UnicodeDecodeError) -> str:
    return f"is not UTF-8: byte 0x{error.object[error.start]:02x}, {error.reason}"


def _place_of_line(path: Path, start: int, number: int) -> str:
    """Return the place of the line `number` (from 1) after the byte `start`."""
    return f"{path}:{_count_lines(path, start) + number}"


def _count_lines(path: Path, stop: int) -> int:
    """Return the number of lines that end before a byte, counted on from the last such byte of the file, if any.

    A process reads the pieces of a file in order, so it reads the file once, however many pieces have bad records.
    """
    status = path.stat()
    key = path, status.st_size, status.st_mtime_ns
    at, lines = _COUNTED.get(key, (0, 0))
    if at > stop:
        at, lines = 0, 0
    with path.open("rb") as file:
        file.seek(at)
        while at < stop and (block := file.read(min(stop - at, 1 << 20))):
            lines, at = lines + block.count(b"\n"), at + len(block)
    _COUNTED[key] = at, lines
    return lines
