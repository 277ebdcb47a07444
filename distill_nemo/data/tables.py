"""Read rows of CSV, TSV, parquet and Arrow files. pyarrow is imported only for a file that needs it."""

import csv
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    import pyarrow

END_OF_STREAM = b"\xff\xff\xff\xff\x00\x00\x00\x00"  # of Arrow: a message without length
DELIMITERS = {"csv": ",", "tsv": "\t"}


def csv_rows(file: TextIO, kind: str) -> Iterator[tuple[int, list[str]]]:
    """Yield the rows that are not empty, header first, each with the number of its first line.

    Raises:
        ValueError: for a quote that is not closed, or is closed inside a field.
    """
    csv.field_size_limit(sys.maxsize)
    rows = csv.reader(file, delimiter=DELIMITERS[kind], strict=True)
    line = 1
    try:
        for row in rows:
            if row:
                yield line, row
            line = rows.line_num + 1
    except csv.Error as error:
        raise ValueError(f"line {line} is not valid {kind.upper()}: {error}") from None


def row_groups(path: Path, max_bytes: int) -> list[tuple[int, int, int]]:
    """Return runs of row groups of a parquet file, of about `max_bytes` each: (first, past the last, bytes)."""
    import pyarrow.parquet

    metadata = pyarrow.parquet.read_metadata(path)
    groups: list[tuple[int, int, int]] = []
    for i in range(metadata.num_row_groups):
        size = metadata.row_group(i).total_byte_size
        if groups and groups[-1][2] + size <= max_bytes:
            groups[-1] = (groups[-1][0], i + 1, groups[-1][2] + size)
        else:
            groups.append((i, i + 1, size))
    return groups


def parquet_columns(path: Path) -> list[str]:
    """Return the names of a parquet file's columns."""
    import pyarrow.parquet

    return pyarrow.parquet.read_schema(path).names


def parquet_rows(
    path: Path, columns: list[str], start: int, stop: int
) -> "Iterator[tuple[int, dict[str, pyarrow.Scalar]]]":
    """Yield the rows of the row groups [start, stop) in some columns, each with its number, from 1."""
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path, page_checksum_verification=True) as file:
        row = sum(file.metadata.row_group(i).num_rows for i in range(start))
        for batch in file.iter_batches(batch_size=1024, row_groups=list(range(start, stop)), columns=columns):
            yield from enumerate(_rows(batch, columns), start=row + 1)
            row += batch.num_rows


def arrow_columns(path: Path) -> list[str]:
    """Return the names of an Arrow file's columns."""
    import pyarrow

    with pyarrow.OSFile(str(path)) as file:
        return _open_arrow(file).schema.names


def arrow_rows(path: Path, columns: list[str]) -> "Iterator[tuple[int, dict[str, pyarrow.Scalar]]]":
    """Yield the rows of an Arrow file in some columns, each with its number, from 1."""
    import pyarrow

    row = 0
    with pyarrow.OSFile(str(path)) as file:
        reader = _open_arrow(file)
        random_access = isinstance(reader, pyarrow.ipc.RecordBatchFileReader)
        for batch in map(reader.get_batch, range(reader.num_record_batches)) if random_access else reader:
            batch.validate()
            yield from enumerate(_rows(batch, columns), start=row + 1)
            row += batch.num_rows


def _rows(batch: "pyarrow.RecordBatch", columns: list[str]) -> "Iterator[dict[str, pyarrow.Scalar]]":
    for values in zip(*(batch.column(name) for name in columns), strict=True):
        yield dict(zip(columns, values, strict=True))


def _open_arrow(file: "pyarrow.OSFile") -> "pyarrow.ipc.RecordBatchFileReader | pyarrow.ipc.RecordBatchStreamReader":
    """Open either kind of Arrow file: one with an index at its end, or a stream, as `datasets` writes.

    Raises:
        ValueError: for a stream without its end mark, which pyarrow would read as if it were whole.
    """
    import pyarrow

    magic = file.read(6)
    file.seek(max(file.size() - len(END_OF_STREAM), 0))
    last = file.read()
    file.seek(0)
    if magic == b"ARROW1":
        return pyarrow.ipc.open_file(file)
    if last != END_OF_STREAM:
        raise ValueError("it is not a whole Arrow stream: its end mark is missing")
    return pyarrow.ipc.open_stream(file)
