"""Megatron's token files: their names in a config, and checks before Megatron maps them. No torch.

`<prefix>.bin` holds the ids of all documents. `<prefix>.idx` holds a header, the length of every document in tokens
(int32), its first byte in the `.bin` (int64), and the bounds of groups of documents (int64).
"""

import hashlib
import math
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from distill_nemo.config import DataConfig
from distill_nemo.data.manifest import keeps_documents_apart, max_token_id, name_of, pack_length, read_manifest

INDEX_HEADER = struct.Struct("<9sQBQQ")  # magic, version, code of the ids' type, documents, bounds
MAGIC = b"MMIDIDX\x00\x00"
INTEGER_TYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}  # 6 and 7 are floats
BLOCK_DOCUMENTS = 1 << 20  # read at a time
SAMPLE_BYTES = 1 << 12
ADVICE = "make the token files again with `nemo distill prepare`"
OWN_TOKENIZER = "prepare the text again with the model's own tokenizer"
Blend = tuple[list[str], list[float] | None]


def parse_blend(field: str, values: list[str]) -> Blend:
    """Return (prefixes, weights or None) of `["a"]`, `["a", "b"]` or `["30", "a", "70", "b"]`.

    Raises:
        ValueError: for an empty list, weights for some prefixes only, or a weight that is not positive and finite.
    """
    numbers = [to_number(value) for value in values]
    prefixes, weights = values[1::2], numbers[0::2]
    if not any(number is not None for number in numbers):
        prefixes, weights = values, None
    shape = f'{field} must be ["a"], ["a", "b"] or ["30", "a", "70", "b"] (weight, prefix, ...), got {values}'
    if not values or (weights is not None and (len(values) % 2 or None in weights)):
        raise ValueError(shape)
    if weights is None:
        return list(prefixes), None
    checked = [weight for weight in weights if weight is not None and weight > 0]
    if len(checked) != len(weights) or not math.isfinite(sum(checked)):
        raise ValueError(f"{field}: every weight must be a positive number, got {values[0::2]}")
    return list(prefixes), checked


def named_corpora(data: DataConfig) -> list[tuple[str, str]]:
    """Return (field, prefix) of every corpus that a config names."""
    blends = [("data.train", data.train), *([("data.valid", data.valid)] if data.valid else [])]
    return [(field, prefix) for field, values in blends for prefix in parse_blend(field, values)[0]]


def to_number(value: str) -> float | None:
    """Return the number that a text holds, or None."""
    try:
        return float(value)
    except ValueError:
        return None


def check_files(field: str, prefix: str, data: DataConfig) -> None:
    """Refuse token files that are missing, empty, truncated or inconsistent.

    Megatron maps them and would read beyond their end. Sizes are compared before anything is read, and the index is
    read in blocks, so a wrong header costs no memory.

    Raises:
        ValueError: naming the file, what it holds, and what to do.
    """
    tokens = _check_pair(field, Path(f"{prefix}.idx"), Path(f"{prefix}.bin"))
    _check_packs(field, prefix, tokens, data.sequence_length)
    _check_mask(field, prefix, tokens, data.loss_on)


class IndexLayout(NamedTuple):
    """Places of an index's numbers, in bytes from the beginning of the file."""

    dtype: type  # of the ids
    documents: int
    groups: int  # of documents, such as packs
    lengths_at: int
    starts_at: int
    bounds_at: int


def index_layout(prefix: str) -> IndexLayout:
    """Return the layout of `<prefix>.idx`, of files that `check_files` accepts."""
    with open(f"{prefix}.idx", "rb") as file:
        _, _, code, documents, bounds = INDEX_HEADER.unpack(file.read(INDEX_HEADER.size))
    lengths_at = INDEX_HEADER.size
    places = lengths_at, lengths_at + 4 * documents, lengths_at + 12 * documents
    return IndexLayout(INTEGER_TYPES[code], documents, bounds - 1, *places)


def document_lengths(prefix: str) -> np.ndarray:
    """Return the number of tokens of every document, int32 [documents], of files that `check_files` accepts."""
    layout = index_layout(prefix)
    return np.memmap(f"{prefix}.idx", np.int32, "r", layout.lengths_at, (layout.documents,))


def documents_apart(data: DataConfig) -> bool:
    """Return True if attention and positions stay inside a document: as told, or because some corpus is cut so."""
    named = named_corpora(data) if data.train else []
    return data.reset_at_documents or any(keeps_documents_apart(prefix) for _, prefix in named)


def write_index(path: Path, lengths: np.ndarray, dtype: str, bounds: np.ndarray | None = None) -> None:
    """Write the `.idx` of a `.bin` that holds documents one after another.

    Args:
        path: file to write.
        lengths: number of tokens of every document, int32 [documents].
        dtype: type of the ids.
        bounds: first document of each group, and the number of documents, int64; None for groups of one.
    """
    code = next(code for code, kind in INTEGER_TYPES.items() if np.dtype(kind) == dtype)
    ends = np.cumsum(lengths, dtype=np.int64) * np.dtype(dtype).itemsize
    starts = np.concatenate([np.zeros(1, np.int64), ends[:-1]])
    bounds = np.arange(len(lengths) + 1, dtype=np.int64) if bounds is None else bounds
    with open(path, "wb") as file:
        file.write(INDEX_HEADER.pack(MAGIC, 1, code, len(lengths), len(bounds)))
        for numbers in (lengths, starts, bounds):
            file.write(numbers.tobytes())


def sample_sha256(path: Path) -> str:
    """Return the SHA-256 of up to 64 blocks that are spread over a file, which is read in no time at any size."""
    size, found = path.stat().st_size, hashlib.sha256()
    with open(path, "rb") as file:
        for start in sorted({i * max(size - SAMPLE_BYTES, 0) // 63 for i in range(64)}):
            file.seek(start)
            found.update(file.read(SAMPLE_BYTES))
    return found.hexdigest()


def iter_blocks(path: Path) -> Iterator[bytes]:
    """Yield a file's content, a MiB at a time."""
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            yield block


def check_vocabulary(data: DataConfig, vocab_size: int) -> None:
    """Refuse token files whose manifest has an id that the model lacks.

    Files without our manifest are checked sample by sample when they are read.

    Raises:
        ValueError: naming the file, its largest id and the model's size.
    """
    for field, prefix in named_corpora(data):
        manifest = read_manifest(prefix)
        largest = max_token_id(manifest)
        if largest is not None and largest >= vocab_size:
            raise ValueError(
                f"{field}: {name_of(prefix)} holds the token id {largest} (made with {manifest.get('tokenizer')}), but "
                f"the model's vocab_size is {vocab_size}: {OWN_TOKENIZER}"
            )


def _check_packs(field: str, prefix: str, tokens: int, sequence_length: int) -> None:
    """Refuse packs of another length than a sample's, and bounds that make no packs."""
    length, layout = pack_length(prefix), index_layout(prefix)
    if length is None:
        if layout.groups < layout.documents:
            raise ValueError(
                f"{field}: {prefix}.idx puts documents together, as in packs, but {prefix}.json, which says of what "
                "length, is missing or does not: copy that file too, or prepare the text again"
            )
        return
    if length != sequence_length:
        raise ValueError(
            f"{field}: {prefix}.bin holds packs of {length} tokens, but data.sequence_length = {sequence_length}: set "
            f"it to {length}, or prepare the text again with pack={sequence_length}"
        )
    bounds = np.fromfile(f"{prefix}.idx", np.int64, layout.groups + 1, offset=layout.bounds_at)
    ascending = layout.groups > 0 and bounds[0] == 0 and (np.diff(bounds) > 0).all()
    ends = np.concatenate([[0], np.cumsum(document_lengths(prefix), dtype=np.int64)])
    if not ascending or np.diff(ends[bounds]).max() > length + 1:
        raise ValueError(f"{field}: {prefix}.idx is damaged: it bounds no packs of {length} tokens; {ADVICE}")


def _check_mask(field: str, prefix: str, tokens: int, loss_on: str | None) -> None:
    mask, manifest = Path(f"{prefix}.mask"), read_manifest(prefix)
    prepared = manifest.get("loss_on")
    if mask.exists():
        _check_size(field, mask, -(-tokens // 8), f"one bit for each of {tokens} tokens")
        if manifest.get("mask_sample_sha256") not in (None, sample_sha256(mask)):
            raise ValueError(f"{field}: {mask} is another one than was prepared with {prefix}.bin; {ADVICE}")
    elif prepared is not None:
        raise ValueError(f"{field}: no file {mask}, which says which tokens count; {ADVICE}")
    if loss_on in ("assistant", "last") and prepared not in (loss_on, "assistant", None):
        raise ValueError(
            f"{field}: data.loss_on = {loss_on}, but {prefix}.bin was prepared with loss_on={prepared}; leave it "
            f"unset, or prepare with loss_on={loss_on}"
        )
    last_shown = manifest.get("last_apart") is True and not manifest.get("pieces")
    if loss_on == "last" and prepared == "assistant" and not last_shown:
        raise ValueError(
            f"{field}: data.loss_on = last, but {mask} does not show where the last answer of every document begins, "
            "as some adjoin another, do not count or were cut off; prepare with loss_on=last"
        )


def _check_pair(field: str, idx: Path, bin_: Path) -> int:
    """Compare the sizes of both files. Return the number of tokens."""
    for path in (idx, bin_):
        if not path.is_file():
            raise ValueError(f"{field}: no file {path}; {ADVICE}")
        if not path.stat().st_size:
            raise ValueError(f"{field}: {path} is empty (0 bytes); {ADVICE}")
    with open(idx, "rb") as file:
        head = file.read(INDEX_HEADER.size)
    magic, version, code, documents, bounds = INDEX_HEADER.unpack(head.ljust(INDEX_HEADER.size, b"\0"))
    if magic != MAGIC or version != 1 or code not in INTEGER_TYPES:
        raise ValueError(f"{field}: {idx} is not a Megatron index of integer ids; {ADVICE}")
    if not documents or not bounds:
        raise ValueError(f"{field}: {idx} holds no documents; {ADVICE}")
    _check_size(
        field, idx, INDEX_HEADER.size + documents * 12 + bounds * 8, f"its header promises {documents} documents"
    )
    itemsize = np.dtype(INTEGER_TYPES[code]).itemsize
    if documents > bin_.stat().st_size // itemsize:
        raise ValueError(
            f"{field}: {idx} holds {documents} documents, more than the {bin_.stat().st_size // itemsize} tokens of "
            f"{bin_}; {ADVICE}"
        )
    tokens = _count_tokens(field, idx, documents, bounds, itemsize)
    _check_size(field, bin_, tokens * itemsize, f"{idx} promises {tokens} tokens")
    return tokens


def _count_tokens(field: str, idx: Path, documents: int, bounds: int, itemsize: int) -> int:
    """Return the sum of all lengths. Refuse documents that do not follow each other in the `.bin` without gaps."""
    tokens, starts_at = 0, INDEX_HEADER.size + documents * 4
    for first in range(0, documents, BLOCK_DOCUMENTS):
        count = min(BLOCK_DOCUMENTS, documents - first)
        lengths = np.fromfile(idx, np.int32, count, offset=INDEX_HEADER.size + first * 4)
        starts = np.fromfile(idx, np.int64, count, offset=starts_at + first * 8)
        ends = tokens + np.cumsum(lengths, dtype=np.int64)
        wrong = np.flatnonzero((lengths < 0) | (starts != (ends - lengths) * itemsize))
        if wrong.size:
            raise ValueError(f"{field}: {idx} is damaged at document {first + wrong[0]} (from 0); {ADVICE}")
        tokens = int(ends[-1])
    last_bound = np.fromfile(idx, np.int64, 1, offset=starts_at + documents * 8 + (bounds - 1) * 8)[0]
    if last_bound != documents:
        raise ValueError(f"{field}: {idx} is damaged: it ends at document {last_bound} of {documents}; {ADVICE}")
    return tokens


def _check_size(field: str, path: Path, expected: int, why: str) -> None:
    actual = path.stat().st_size
    if actual != expected:
        what = "truncated" if actual < expected else "too long"
        raise ValueError(f"{field}: {path} is {what}: {actual} bytes instead of {expected} ({why}); {ADVICE}")
