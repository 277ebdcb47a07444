"""Documents out of text, JSONL and parquet files, cut into pieces that can be read apart from each other.

Nothing heavy is imported here: the worker processes of `prepare` start with this module.
"""

import glob
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

TEXT_SUFFIXES = (".txt", ".md", ".py")
JSONL_SUFFIXES = (".jsonl", ".ndjson", ".json")
DIRECTORY_SUFFIXES = (*TEXT_SUFFIXES, ".jsonl", ".parquet")  # what is picked up inside a directory


@dataclass(frozen=True)
class Piece:
    """A part of one file: bytes [start, stop) of text and JSONL, row groups [start, stop) of parquet."""

    path: str
    kind: str  # text | jsonl | parquet
    start: int
    stop: int
    num_bytes: int
    mtime_ns: int


@dataclass(frozen=True)
class Record:
    """One document, or, with `problem` set, what came instead of one and `where` ("file:line") it stands."""

    text: str = ""
    where: str = ""
    problem: str = ""


def find_files(inputs: list[str]) -> list[Path]:
    """Files named by `inputs` (files, directories, globs): in the order given, sorted inside each, no file twice.

    Raises:
        ValueError: an input names nothing.
    """
    found: dict[Path, None] = {}
    for entry in inputs:
        path = Path(entry).expanduser()
        matches = [path] if path.exists() else [Path(m) for m in sorted(glob.glob(str(path), recursive=True))]
        files = [file for match in matches for file in (_inside(match) if match.is_dir() else [match])]
        if not files:
            allowed = " ".join(f"*{suffix}" for suffix in DIRECTORY_SUFFIXES)
            raise ValueError(
                f'no input found for "{entry}": looked for a file, for {allowed} below a directory, and for a glob'
            )
        found |= dict.fromkeys(files)
    if not found:
        raise ValueError("no input given: name files, directories or globs of text, JSONL or parquet")
    return list(found)


def _inside(directory: Path) -> list[Path]:
    return sorted(p for p in directory.rglob("*") if p.suffix in DIRECTORY_SUFFIXES and p.is_file())


def cut(path: Path, text_key: str, max_bytes: int) -> list[Piece]:
    """Cut a file into pieces of about `max_bytes`; a text file is one document and stays whole.

    Raises:
        ValueError: a parquet file that cannot be read or has no column `text_key`.
    """
    stat = path.stat()
    if path.suffix == ".parquet":
        return [
            Piece(str(path), "parquet", *group, stat.st_mtime_ns) for group in _row_groups(path, text_key, max_bytes)
        ]
    if path.suffix not in JSONL_SUFFIXES:
        return [Piece(str(path), "text", 0, stat.st_size, stat.st_size, stat.st_mtime_ns)]
    ends = [(start, min(start + max_bytes, stat.st_size)) for start in range(0, stat.st_size, max_bytes)]
    return [Piece(str(path), "jsonl", start, stop, stop - start, stat.st_mtime_ns) for start, stop in ends]


def _row_groups(path: Path, text_key: str, max_bytes: int) -> list[tuple[int, int, int]]:
    """Consecutive row groups of about `max_bytes`, as (first, past the last, bytes)."""
    import pyarrow.parquet

    try:
        metadata = pyarrow.parquet.read_metadata(path)
    except (ValueError, OSError) as error:
        raise ValueError(f"{path} is not a readable parquet file: {error}") from None
    names = metadata.schema.to_arrow_schema().names
    if text_key not in names:
        raise ValueError(f'{path} has no column "{text_key}"; it has {", ".join(names)}. Set text_key to one of them')
    groups: list[tuple[int, int, int]] = []
    for i in range(metadata.num_row_groups):
        size = metadata.row_group(i).total_byte_size
        if groups and groups[-1][2] + size <= max_bytes:
            groups[-1] = (groups[-1][0], i + 1, groups[-1][2] + size)
        else:
            groups.append((i, i + 1, size))
    return groups


def read(piece: Piece, text_key: str) -> Iterator[Record]:
    """Documents of one piece, in file order. Blank JSONL lines are skipped; all else without text is a bad record."""
    if piece.kind == "text":
        return _read_text(piece)
    return _read_jsonl(piece, text_key) if piece.kind == "jsonl" else _read_parquet(piece, text_key)


def _read_text(piece: Piece) -> Iterator[Record]:
    raw = Path(piece.path).read_bytes()
    try:
        yield Record(raw.decode().removeprefix("\ufeff"))
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        yield Record(where=f"{piece.path}:{line}", problem=_not_utf8(error))


def _read_jsonl(piece: Piece, text_key: str) -> Iterator[Record]:
    """Lines that begin inside the piece. The line number costs a read of all before: paid by bad records only."""
    with open(piece.path, "rb") as file:
        if piece.start:
            file.seek(piece.start - 1)
            file.readline()  # belongs to the piece before, whose line it began
        first = position = file.tell()
        before, line = None, 0
        while position < piece.stop and (raw := file.readline()):
            position, line = position + len(raw), line + 1
            if not raw.strip():
                continue
            text, problem = _parse(raw.removeprefix(b"\xef\xbb\xbf"), text_key)
            if problem:
                before = _count_lines(piece.path, first) if before is None else before
            yield Record(text, f"{piece.path}:{before + line}" if before is not None and problem else "", problem)


def _parse(raw: bytes, text_key: str) -> tuple[str, str]:
    """(text, "") or ("", what is wrong)."""
    try:
        value = json.loads(raw.decode())
        if not isinstance(value, dict):
            return "", f"is a {type(value).__name__}, not an object"
        if text_key not in value:
            return "", f'has no key "{text_key}" (it has {", ".join(list(value)[:5]) or "none"})'
        text = value[text_key]
        if not isinstance(text, str):
            return "", f'"{text_key}" is {type(text).__name__}, not a string'
        text.encode()  # JSON can spell half of a surrogate pair, which no tokenizer takes
        return text, ""
    except UnicodeDecodeError as error:
        return "", _not_utf8(error)
    except UnicodeEncodeError:
        return "", f'"{text_key}" holds half of a surrogate pair'
    except (ValueError, RecursionError) as error:
        return "", f"is not valid JSON: {error}"


def _read_parquet(piece: Piece, text_key: str) -> Iterator[Record]:
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(piece.path) as file:
        row = sum(file.metadata.row_group(i).num_rows for i in range(piece.start))
        groups = list(range(piece.start, piece.stop))
        for batch in file.iter_batches(batch_size=1024, row_groups=groups, columns=[text_key]):
            for value in batch.column(0):
                row += 1
                try:
                    text = value.as_py()
                    problem = "" if isinstance(text, str) else f'"{text_key}" is {type(text).__name__}, not a string'
                except UnicodeDecodeError as error:
                    text, problem = "", _not_utf8(error)
                yield Record(where=f"{piece.path}:{row}", problem=problem) if problem else Record(text)


def _not_utf8(error: UnicodeDecodeError) -> str:
    return f"is not UTF-8: byte 0x{error.object[error.start]:02x}, {error.reason}"


def _count_lines(path: str, stop: int) -> int:
    lines = 0
    with open(path, "rb") as file:
        while stop > 0 and (block := file.read(min(stop, 1 << 20))):
            lines, stop = lines + block.count(b"\n"), stop - len(block)
    return lines
