"""Put whole documents together in packs, by best fit decreasing over a window of them. No torch.

A pack fills a sample of training: `sequence_length` tokens and the last label. It depends on the documents and their
order only. Documents stay in their window, and within a pack in their order.
"""

import bisect
import contextlib
import functools
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import batched
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple

import numpy as np

from distill_nemo.data.parts import Part
from distill_nemo.data.token_files import write_index
from distill_nemo.data.token_masks import write_mask

WINDOW_DOCUMENTS = 1 << 16
TooLong = Literal["cut", "drop"]


@dataclass(frozen=True)
class Packing:
    """Tokens of a sample, and what becomes of documents that are longer than it and its last label."""

    length: int
    too_long: TooLong

    @property
    def capacity(self) -> int:
        """Tokens of a pack."""
        return self.length + 1


class Document(NamedTuple):
    """A range of the tokens of a part, whose files are mapped when they are read."""

    part: Part
    first: int
    stop: int

    @property
    def size(self) -> int:
        """Number of tokens."""
        return self.stop - self.first

    @property
    def ids(self) -> np.ndarray:
        """The tokens."""
        return _mapped(f"{self.part.prefix}.bin", self.part.dtype)[self.first : self.stop]

    @property
    def counts(self) -> np.ndarray:
        """1 for each token that counts; for conversations only."""
        return _mapped(f"{self.part.prefix}.mask", "uint8")[self.first : self.stop]


@functools.lru_cache(maxsize=64)  # each holds a file open, and a window may reach over a thousand parts
def _mapped(path: str, dtype: str) -> np.ndarray:
    return np.asarray(np.memmap(path, dtype, "r"))


def packing_of(length: int | None, too_long: TooLong | None, conversations: bool) -> Packing | None:
    """Return the packing that is asked for. Long texts are cut by default, and long conversations dropped.

    The later pieces of a conversation would lack what they answer.

    Raises:
        ValueError: for a pack without a label, or `too_long` without packs.
    """
    if length is None:
        if too_long is not None:
            raise ValueError(f"too_long = {too_long} is for packs: set pack, or leave it out")
        return None
    if length < 2:
        raise ValueError(
            f"pack must be at least 2 tokens, got {length}: set it to the data.sequence_length of training"
        )
    return Packing(length, too_long or ("drop" if conversations else "cut"))


def best_fit(lengths: list[int], capacity: int) -> list[list[int]]:
    """Return packs of the numbers of documents. The longest comes first, each into the fullest pack that takes it.

    Args:
        lengths: tokens of each document, at most `capacity`.
        capacity: tokens of a pack.
    """
    packs: list[list[int]] = []
    rooms: list[int] = []  # ascending
    with_room: list[list[int]] = []
    shortest = min(lengths, default=0)
    for number in sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True):
        at = bisect.bisect_left(rooms, lengths[number])
        if at == len(rooms):
            packs.append([])
            pack, room = packs[-1], capacity
        else:
            pack, room = with_room.pop(at), rooms.pop(at)
        pack.append(number)
        room -= lengths[number]
        if room >= shortest:
            at = bisect.bisect_right(rooms, room)
            rooms.insert(at, room)
            with_room.insert(at, pack)
    return packs


def write_packs(parts: list[Part], joined: Path, packing: Packing, occurs: np.ndarray) -> dict[str, Any]:
    """Write `<joined>.bin`, `.idx` and `.mask` from the parts. Return the fields of the manifest.

    Args:
        parts: whole, in order.
        joined: prefix of the files.
        packing: length of the packs.
        occurs: bool [ids of the tokenizer], set for ids that occur in packs.

    Raises:
        ValueError: if no document is left.
    """
    writer = _Writer(packing, occurs)
    masks = joined.with_name("packed.mask") if parts[0].chat is not None else None
    with open(f"{joined}.bin", "wb") as bin_, contextlib.ExitStack() as stack:
        mask = stack.enter_context(open(masks, "wb")) if masks else None
        stack.callback(_mapped.cache_clear)  # the parts are removed, and a later run makes others of the same name
        for window in batched(writer.pieces(parts), WINDOW_DOCUMENTS):
            writer.write(window, bin_, mask)
    if not writer.lengths:
        raise ValueError(
            f"no document is at most {packing.capacity} tokens long (pack + 1), the shortest has {writer.shortest:,}: "
            "set a larger pack, or too_long=cut"
        )
    write_index(Path(f"{joined}.idx"), np.array(writer.lengths, np.int32), parts[0].dtype, np.array(writer.bounds))
    if masks:
        write_mask(Path(f"{joined}.mask"), [masks])
    return writer.manifest()


class _Writer:
    """Packs that were written so far."""

    def __init__(self, packing: Packing, occurs: np.ndarray) -> None:
        self.packing, self.occurs = packing, occurs
        self.lengths: list[int] = []
        self.bounds = [0]
        self.shortest = sys.maxsize  # of the documents that are too long
        self.counted = self.num_too_long = self.num_pieces = self.dropped_tokens = 0

    def pieces(self, parts: list[Part]) -> Iterator[Document]:
        """Yield the documents, with long ones cut or left out."""
        capacity = self.packing.capacity
        for document in _documents(parts):
            if document.size <= capacity:
                yield document
                continue
            self.num_too_long += 1
            self.shortest = min(self.shortest, document.size)
            if self.packing.too_long == "drop":
                self.dropped_tokens += document.size
                continue
            for first in range(document.first, document.stop, capacity):
                self.num_pieces += 1
                yield Document(document.part, first, min(first + capacity, document.stop))

    def write(self, window: tuple[Document, ...], bin_: BinaryIO, mask: BinaryIO | None) -> None:
        """Write the packs of a window."""
        for numbers in best_fit([document.size for document in window], self.packing.capacity):
            pack = [window[number] for number in sorted(numbers)]
            ids = np.concatenate([document.ids for document in pack])
            bin_.write(ids)
            self.occurs[ids] = True
            self.lengths += [document.size for document in pack]
            self.bounds.append(len(self.lengths))
            if mask is None:
                self.counted += len(ids) - len(pack)  # nothing predicts a document's first token, nor a piece's
                continue
            counts = [document.counts for document in pack]
            mask.write(np.concatenate(counts))
            self.counted += sum(int(each[1:].sum()) for each in counts)

    def manifest(self) -> dict[str, Any]:
        tokens, packs = sum(self.lengths), len(self.bounds) - 1
        return {
            "documents": len(self.lengths),
            "tokens": tokens,
            "counted_tokens": self.counted,
            "pack": self.packing.length,
            "packs": packs,
            "fill": round(tokens / (packs * self.packing.capacity), 4),
            "too_long": self.packing.too_long,
            "too_long_documents": self.num_too_long,
            "pieces": self.num_pieces,
            "dropped_tokens": self.dropped_tokens,
        }


def _documents(parts: list[Part]) -> Iterator[Document]:
    """Yield the documents of the parts, in order. A window of them needs no memory of its own."""
    for part in parts:
        ends = np.cumsum(np.fromfile(f"{part.prefix}.len", np.int32), dtype=np.int64).tolist()
        for first, stop in zip([0, *ends], ends, strict=False):
            yield Document(part, first, stop)


def described(manifest: dict[str, Any]) -> str:
    """Return packs and fill of a manifest in words, and what became of long documents."""
    text = f"{manifest['packs']:,} packs of {manifest['pack']:,} tokens, {manifest['fill']:.1%} full"
    if long := manifest["too_long_documents"]:
        left_out = f"left out ({manifest['dropped_tokens']:,} tokens)"
        what = left_out if manifest["too_long"] == "drop" else f"cut into {manifest['pieces']:,} pieces"
        text += f"; {long:,} longer document{'s' * (long != 1)} {what}"
    return text
