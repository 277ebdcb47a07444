"""Token files written by Megatron's own builder, without our manifest, or with its length of packs only."""

import json
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder


def write_documents(prefix: Path, documents: Sequence[Any], dtype: type[np.number] = np.uint16) -> str:
    """Write one document for each list of ids. Return the prefix."""
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for ids in documents:
        builder.add_document(torch.from_numpy(np.array(ids, dtype=dtype)), [len(ids)])
    builder.finalize(f"{prefix}.idx")
    return str(prefix)


def write_packs(prefix: Path, packs: Sequence[list[list[int]]], length: int, counts: Any = None) -> str:
    """Write packs of documents, and of the same shape 1 for each id that counts. Return the prefix."""
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    for pack in packs:
        builder.add_document(torch.tensor([*chain(*pack)]), [len(document) for document in pack])
    builder.finalize(f"{prefix}.idx")
    Path(f"{prefix}.json").write_text(json.dumps({"pack": length}))
    if counts:
        bits = np.array([bit for pack in counts for document in pack for bit in document], np.uint8)
        Path(f"{prefix}.mask").write_bytes(np.packbits(bits, bitorder="little"))
    return str(prefix)


def write_tokens(prefix: Path, first: int, documents: int = 40, length: int = 50) -> str:
    """Write documents of consecutive ids from `first` on, so that every token shows its position."""
    starts = range(first, first + documents * length, length)
    return write_documents(prefix, [range(start, start + length) for start in starts])
