"""Pass the results of a write from the writing process to the training process."""

import os
import pickle
import queue
from typing import Any


class WriteResults:
    """Queue for one item between this process and its forks, held in a file in memory.

    Megatron-Core 0.19 would start a process to hold such a queue. It imports torch, which takes 4 to 12 s of the first
    save, and uses 550 MB per rank. The SIGTERM that a scheduler sends to every process of a job ends it, after
    which ranks cannot save. It also outlives a rank that is killed.
    """

    def __init__(self) -> None:
        self._file = os.memfd_create("write_results")

    def put(self, item: Any) -> None:
        """Store `item`, in place of one that was not taken."""
        data = pickle.dumps(item)
        os.ftruncate(self._file, 0)
        os.pwrite(self._file, data, 0)

    def get_nowait(self) -> Any:
        """Take the item.

        Raises:
            queue.Empty: if there is none, because the writing process ended early.
        """
        data = os.pread(self._file, os.fstat(self._file).st_size, 0)
        if not data:
            raise queue.Empty
        os.ftruncate(self._file, 0)
        return pickle.loads(data)
