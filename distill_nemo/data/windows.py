"""Samples that were cut beforehand, such as packs."""

from abc import ABC, abstractmethod
from pathlib import Path

import numpy as np
import torch
from torch import Tensor


class Windows(ABC):
    """Samples that were cut beforehand, all of one length, each a dict of tensors [sequence_length].

    Every sample has tokens, labels, position_ids (int64) and loss_mask (float32). It may have further tensors.
    """

    @property
    @abstractmethod
    def files(self) -> list[Path]:
        """Files whose size and time change if the samples do."""

    @abstractmethod
    def __len__(self) -> int:
        """Return the number of windows."""

    @abstractmethod
    def __getitem__(self, number: int) -> dict[str, Tensor]:
        """Return a window."""

    @abstractmethod
    def check(self) -> None:
        """Refuse a file that became shorter since it was opened.

        Raises:
            ValueError: with both sizes.
            FileNotFoundError: if a file is gone.
        """


class WindowPasses:
    """Windows in passes, each in an order of its own."""

    def __init__(self, windows: Windows, order: np.ndarray) -> None:
        """Keep the windows and the number of the window that each sample is."""
        self._windows, self._order = windows, order

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, idx: int) -> dict[str, Tensor]:
        self._windows.check()
        return self._windows[int(self._order[idx])]

    def place(self, idx: int, position: int) -> str:
        """Return the name of a token of a sample, for errors."""
        return f"{self._windows.files[0]}: token {position} of window {self._order[idx]} (both from 0)"


def order_of_windows(indices: np.ndarray, num_samples: int, seed: int) -> np.ndarray:
    """Return as many permutations of the windows as make `num_samples`. A further one changes none before it."""
    random = np.random.RandomState(seed)
    num_passes = max(-(-num_samples // len(indices)), 1)
    return np.concatenate([random.permutation(indices) for _ in range(num_passes)])


def inside_documents(lengths: np.ndarray) -> dict[str, Tensor]:
    """Return what keeps a sample's documents apart, for all tokens but the last, which is only a label.

    Args:
        lengths: tokens of each document in the sample and its last label, [documents].

    Returns:
        position_ids in the document and document_starts in the sample, int64 [sequence_length]; loss_mask, float32, 0
        where the label is of the next document.
    """
    starts = torch.from_numpy(np.repeat(np.cumsum(lengths) - lengths, lengths).astype(np.int64))
    return {
        "position_ids": torch.arange(len(starts) - 1) - starts[:-1],
        "document_starts": starts[:-1],
        "loss_mask": (starts[1:] == starts[:-1]).float(),
    }
