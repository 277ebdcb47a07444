"""Files of shards: safetensors whose header, size and places all follow from the manifest.

So nothing of a file is parsed: its first bytes are those that the manifest asks for, or it is refused.

Legend: W windows of a shard, L tokens of a window, M tokens that count, P pairs; b bytes of an id.
"""

import itertools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from distill_nemo.fields import require
from distill_nemo.runtime.watched_file import WatchedFile
from distill_nemo.teacher_store.codecs.codec import DTYPES, Arrays, Axis, Column
from distill_nemo.teacher_store.manifest import Manifest, ShardFacts, shard_name
from distill_nemo.teacher_store.packing import unpack_bits, unpack_numbers

NUMBERS = ("entropy", "label_logprob", "entropy_at_1")  # float32, of every token that counts, whatever the codec
WRITE_AGAIN = "write the store again with `nemo distill teacher`"


def columns_of(manifest: Manifest) -> dict[str, Column]:
    """Return the columns of a shard in the order of the file, the widest numbers first."""
    bits, id_bytes = (-(-manifest.sequence_length // 8),), manifest.coding.id_bytes
    targets = {
        "entropy": Column("F32", (), "tokens"),
        "label_logprob": Column("F32", (), "tokens"),
        "top1": Column("U8", (id_bytes,), "tokens"),
        **({"entropy_at_1": Column("F32", (), "tokens")} if manifest.temperature != 1 else {}),
        **manifest.coding.columns,
    }
    axes = [axis for axis in ("tokens", "pairs") if any(column.axis == axis for column in targets.values())]
    columns = {
        "tokens": Column("U8", (manifest.sequence_length + 1, id_bytes), "windows"),
        "loss_mask": Column("U8", bits, "windows"),
        **({"document_begins": Column("U8", bits, "windows")} if manifest.documents_apart else {}),
        **{f"{axis}_bounds": Column("I64", (), "bounds") for axis in axes},
        **targets,
    }
    return dict(sorted(columns.items(), key=lambda item: (-DTYPES[item[1].dtype].itemsize, item[0])))


def shared_row_bytes(manifest: Manifest, axis: Axis) -> int:
    """Return the bytes of a row of the columns that every codec has."""
    own = manifest.coding.columns
    shared = [column for name, column in columns_of(manifest).items() if name not in own]
    return sum(column.row_bytes for column in shared if column.axis == axis)


@dataclass(frozen=True)
class Layout:
    """Places in a shard's file.

    Args:
        header: the file's first bytes, with their length.
        starts: first byte of each column.
        size: bytes of the file.
    """

    header: bytes
    starts: dict[str, int]
    size: int


def layout_of(columns: dict[str, Column], rows: Mapping[Axis, int]) -> Layout:
    """Return the layout of a file with `columns`, from the number of rows of each axis."""
    ends = [0, *itertools.accumulate(rows[column.axis] * column.row_bytes for column in columns.values())]
    entries = {
        name: {"dtype": column.dtype, "shape": [rows[column.axis], *column.shape], "data_offsets": ends[i : i + 2]}
        for i, (name, column) in enumerate(columns.items())
    }
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    starts = dict(zip(columns, (len(header) + end for end in ends), strict=False))
    return Layout(header, starts, len(header) + ends[-1])


def shard_layout(manifest: Manifest, shard: int, facts: ShardFacts) -> Layout:
    """Return the layout of a shard."""
    windows = len(manifest.windows_of(shard))
    rows: dict[Axis, int] = {"windows": windows, "bounds": windows + 1, "tokens": facts.tokens, "pairs": facts.pairs}
    return layout_of(columns_of(manifest), rows)


def shard_size(manifest: Manifest, shard: int, facts: ShardFacts) -> int:
    """Return the bytes of a shard."""
    return shard_layout(manifest, shard, facts).size


def check_size(path: Path, size: int) -> None:
    """Refuse a file of a store that is missing, or of another size.

    Raises:
        ValueError: with both sizes.
    """
    try:
        found = path.stat().st_size
    except FileNotFoundError:
        raise ValueError(f"{path} is missing; {WRITE_AGAIN}") from None
    require(
        found == size,
        f"{path} is {'truncated' if found < size else 'too long'}: {found} bytes instead of {size} (by its manifest); "
        f"{WRITE_AGAIN}",
    )


class ColumnFile:
    """An open file of columns, read by position.

    Raises:
        ValueError: if it is missing, or its size or its header is not as the layout says.
    """

    def __init__(self, path: Path, columns: dict[str, Column], layout: Layout) -> None:
        self.path, self._columns, self._starts = path, columns, layout.starts
        check_size(path, layout.size)
        self._file = WatchedFile(str(path))
        if bytes(self._file.read(np.uint8, len(layout.header), 0)) != layout.header:
            raise self.damaged("its header is not as its manifest says")

    def check(self) -> None:
        """Refuse a file that became shorter since it was opened."""
        self._file.check()

    def rows(self, name: str, first: int, count: int) -> np.ndarray:
        """Return rows of a column, [count, ...].

        Raises:
            ValueError: if the file is shorter than when it was opened.
        """
        column = self._columns[name]
        kind, row = DTYPES[column.dtype], column.row_bytes
        numbers = self._file.read(kind.type, count * row // kind.itemsize, self._starts[name] + first * row)
        return numbers.reshape(count, *column.shape)

    def damaged(self, what: str) -> ValueError:
        """Return the error of a file that holds what nobody wrote."""
        return ValueError(f"{self.path} is damaged: {what}; {WRITE_AGAIN}")


class Shard:
    """An open shard.

    Raises:
        ValueError: if the file is missing, or not as the manifest says.
    """

    def __init__(self, store: Path, manifest: Manifest, number: int, facts: ShardFacts) -> None:
        self._manifest, self._columns = manifest, columns_of(manifest)
        self._file = ColumnFile(store / shard_name(number), self._columns, shard_layout(manifest, number, facts))
        windows, sizes = len(manifest.windows_of(number)), {"tokens": facts.tokens, "pairs": facts.pairs}
        there = {axis: size for axis, size in sizes.items() if f"{axis}_bounds" in self._columns}
        self._bounds = {axis: self._read_bounds(axis, windows, size) for axis, size in there.items()}

    def check(self) -> None:
        """Refuse a file that became shorter since it was opened."""
        self._file.check()

    def window(self, place: int, with_targets: bool = True) -> Arrays:
        """Return a window by its place in the shard.

        Args:
            place: of the window, from 0.
            with_targets: False: tokens, mask and documents only.

        Raises:
            ValueError: if the file is damaged, or shorter than when it was opened.
        """
        manifest, length = self._manifest, self._manifest.sequence_length
        window = {
            "tokens": unpack_numbers(self._file.rows("tokens", place, 1)[0]),
            "loss_mask": unpack_bits(self._file.rows("loss_mask", place, 1)[0], length),
        }
        if manifest.documents_apart:
            begins = unpack_bits(self._file.rows("document_begins", place, 1)[0], length)
            window["document_starts"] = np.maximum.accumulate(np.where(begins, np.arange(length), 0)).astype(np.int32)
        return window | (self._targets(place, int(window["loss_mask"].sum())) if with_targets else {})

    def _targets(self, place: int, num_tokens: int) -> Arrays:
        spans = {axis: bounds[place : place + 2].tolist() for axis, bounds in self._bounds.items()}
        first, stop = spans["tokens"]
        if num_tokens != stop - first:
            raise self._file.damaged(f"window {place} has {stop - first} targets for {num_tokens} tokens that count")
        columns = {
            name: self._file.rows(name, spans[column.axis][0], spans[column.axis][1] - spans[column.axis][0])
            for name, column in self._columns.items()
            if column.axis in spans
        }
        try:
            targets = self._manifest.coding.unpack(columns)
        except ValueError as error:
            raise self._file.damaged(f"window {place} {error}") from None
        numbers = {name: columns[name] for name in NUMBERS if name in columns}
        return numbers | {"top1": unpack_numbers(columns["top1"])} | targets

    def _read_bounds(self, axis: str, windows: int, size: int) -> np.ndarray:
        bounds = self._file.rows(f"{axis}_bounds", 0, windows + 1)
        if bounds[0] != 0 or bounds[-1] != size or (np.diff(bounds) < 0).any():
            raise self._file.damaged(f"the bounds of its windows do not part {size} {axis}")
        return bounds
