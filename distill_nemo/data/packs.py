"""Packs: whole documents, put together by `nemo distill prepare` so that they fill a sample."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from distill_nemo.data.chat_template import LossOn
from distill_nemo.data.token_files import index_layout
from distill_nemo.data.token_masks import mask_of
from distill_nemo.data.windows import Windows, inside_documents
from distill_nemo.runtime.watched_file import WatchedFile

PADDING = 0  # an id that every model has


class Packs(Windows):
    """Packs of a pair of token files, whose groups of documents they are.

    A pack holds up to `sequence_length` + 1 tokens. The first ones are inputs, those after the first are labels. The
    rest of a sample is padding, a document of its own that does not count.
    """

    def __init__(self, prefix: str, length: int, loss_on: LossOn | None) -> None:
        """Open the files.

        Args:
            prefix: of the token files; `check_files` has accepted them.
            length: tokens of a sample.
            loss_on: see `DataConfig`.
        """
        self._prefix, self._length = prefix, length
        self._layout = index_layout(prefix)
        self._index, self._ids = WatchedFile(f"{prefix}.idx"), WatchedFile(f"{prefix}.bin")
        self._mask = mask_of(prefix, loss_on)

    @property
    def files(self) -> list[Path]:
        """Tokens first, which errors name."""
        return [Path(f"{self._prefix}.bin"), Path(f"{self._prefix}.idx")]

    def __len__(self) -> int:
        return self._layout.groups

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        """Return a pack with its document_starts."""
        layout = self._layout
        first, stop = self._index.read(np.int64, 2, layout.bounds_at + 8 * number).tolist()
        lengths = self._index.read(np.int32, stop - first, layout.lengths_at + 4 * first).astype(np.int64)
        begin = int(self._index.read(np.int64, 1, layout.starts_at + 8 * first)[0])
        num_tokens = int(lengths.sum())
        padding = self._length + 1 - num_tokens
        ids = np.full(self._length + 1, PADDING, np.int64)
        ids[:num_tokens] = self._ids.read(layout.dtype, num_tokens, begin)
        sample = inside_documents(np.append(lengths, padding))
        counts = np.zeros(self._length + 1, np.float32)
        counts[:num_tokens] = self._counts(begin // np.dtype(layout.dtype).itemsize, lengths)
        text = torch.from_numpy(ids)
        return sample | {
            "tokens": text[:-1],
            "labels": text[1:],
            "loss_mask": sample["loss_mask"] * torch.from_numpy(counts)[1:],
        }

    def _counts(self, first: int, lengths: np.ndarray) -> np.ndarray:
        """Return 1 for tokens that count, of consecutive documents of which the first begins at token `first`."""
        if self._mask is None:
            return np.ones(lengths.sum(), np.uint8)
        firsts = first + np.cumsum(lengths) - lengths
        places = np.stack([firsts, lengths], axis=1).tolist()
        return np.concatenate([self._mask.of_document(begin, length) for begin, length in places])

    def check(self) -> None:
        """Refuse a file that became shorter since it was opened."""
        for file in (self._ids, self._index, *([self._mask] if self._mask else [])):
            file.check()
