"""Files that a run reads for days. No torch."""

import os

import numpy as np


class WatchedFile:
    """A file that is read by position, not mapped: a mapped file that becomes shorter ends its reader with SIGBUS.

    Has the method of Megatron's readers of a `.bin`.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self._file = open(path, "rb", buffering=0)
        self._size = os.fstat(self._file.fileno()).st_size

    def check(self) -> None:
        """Refuse a file that is shorter than when it was opened.

        Raises:
            ValueError: with both sizes.
            FileNotFoundError: if the file is gone.
        """
        if (now := os.stat(self.path).st_size) < self._size:
            raise self._too_short(now)

    def read(self, dtype: type, count: int, offset: int) -> np.ndarray:
        """Return `count` numbers from the byte `offset` on, read-only.

        Raises:
            ValueError: if the file ends before them.
        """
        size = count * np.dtype(dtype).itemsize
        blocks, left = [], size  # one call returns at most 2 GiB, which an output layer exceeds
        while left:
            block = os.pread(self._file.fileno(), left, offset + size - left)
            if not block:
                raise self._too_short(os.fstat(self._file.fileno()).st_size)
            blocks.append(block)
            left -= len(block)
        return np.frombuffer(blocks[0] if len(blocks) == 1 else b"".join(blocks), dtype)

    def _too_short(self, now: int) -> ValueError:
        return ValueError(
            f"{self.path} has {now} bytes now, and had {self._size} when this run began: restore it, then run the same "
            "command again to resume from the last checkpoint"
        )
