"""Token files written by Megatron's own builder, without our manifest."""

from collections.abc import Sequence
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


def write_tokens(prefix: Path, first: int, documents: int = 40, length: int = 50) -> str:
    """Write documents of consecutive ids from `first` on, so that every token shows its position."""
    starts = range(first, first + documents * length, length)
    return write_documents(prefix, [range(start, start + length) for start in starts])
