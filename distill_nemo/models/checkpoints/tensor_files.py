"""Write safetensors files in any order, from any rank: each writes its rows of a tensor in their place."""

import contextlib
import json
import os
from collections.abc import Iterator
from math import prod
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

import torch
from torch import Tensor

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
LABELS = {dtype: label for label, dtype in DTYPES.items()}


class Entry(NamedTuple):
    """Dtype, as safetensors names it, and shape of a tensor; its name in the file, if that differs."""

    dtype: str
    shape: tuple[int, ...]
    name: str | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of its values."""
        return prod(self.shape) * DTYPES[self.dtype].itemsize


Entries = dict[str, Entry]  # in the order of their file


def as_in_file(entries: Entries) -> Entries:
    """Return the same entries by their names in the file."""
    return {entry.name or name: entry._replace(name=None) for name, entry in entries.items()}


class TensorFiles:
    """Context manager that writes the tensors of several files.

    Args:
        directory: of the files.
        files: the tensors of each file.
        metadata: texts of every header.
    """

    def __init__(self, directory: Path, files: dict[str, Entries], metadata: dict[str, str]) -> None:
        self.directory = directory
        self._headers: dict[str, bytes] = {}
        self._sizes: dict[str, int] = {}
        self._places: dict[str, tuple[str, int]] = {}  # file and offset of every tensor
        for file, entries in files.items():
            header = self._headers[file] = _header(entries, metadata)
            end = len(header)
            for name, entry in entries.items():
                self._places[name] = file, end
                end += entry.nbytes
            self._sizes[file] = end
        self._open: tuple[str, int] | None = None  # the file of the latest rows, and its descriptor

    def __contains__(self, name: str) -> bool:
        return name in self._places

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._close()

    def create(self, file: str) -> None:
        """Write a file of zeros, in the place of any other, before any rank writes rows into it.

        Raises:
            OSError: if it cannot be written.
        """
        path = self.directory / file
        with _naming(path):
            path.write_bytes(self._headers[file])
            os.truncate(path, self._sizes[file])

    def write(self, name: str, rows: Tensor, first_row: int = 0) -> None:
        """Write rows of a tensor, from `first_row` on.

        Raises:
            OSError: if they cannot be written.
        """
        file, offset = self._places[name]
        values = rows.cpu().contiguous()
        content = memoryview(values.reshape(-1).view(torch.uint8).numpy())
        offset += first_row * (len(content) // len(values) if values.dim() else 0)
        descriptor = self._descriptor(file)
        with _naming(self.directory / file):
            while content:
                written = os.pwrite(descriptor, content, offset)
                content, offset = content[written:], offset + written

    def _descriptor(self, file: str) -> int:
        if self._open is None or self._open[0] != file:
            self._close()
            self._open = file, os.open(self.directory / file, os.O_WRONLY)
        return self._open[1]

    def _close(self) -> None:
        if self._open is not None:
            os.close(self._open[1])
            self._open = None


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Add the path to an error of an open file, which has none. A full disk's is one."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def _header(entries: Entries, metadata: dict[str, str]) -> bytes:
    described: dict[str, object] = {"__metadata__": metadata}
    end = 0
    for name, entry in as_in_file(entries).items():
        start, end = end, end + entry.nbytes
        described[name] = {"dtype": entry.dtype, "shape": entry.shape, "data_offsets": (start, end)}
    text = json.dumps(described, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # values begin at a multiple of 8 bytes
    return len(text).to_bytes(8, "little") + text
