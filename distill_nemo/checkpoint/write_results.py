"""Results of a write, passed from the process that wrote to the one that trains."""

import os
import pickle
import queue
from typing import Any


class WriteResults:
    """A queue of one place between this process and those that it forks: a file in memory.

    Megatron-Core 0.19 asks for such a queue, and would start a process to hold it: that one imports torch, 4 to 12 s of
    a first save, keeps 550 MB a rank, is ended by the SIGTERM that a scheduler sends to every process of a job, so that
    ranks could not save any more, and outlives a rank that is killed.
    """

    def __init__(self) -> None:
        self._file = os.memfd_create("write_results")

    def put(self, item: Any) -> None:
        """Leave `item`, in place of one that nobody took."""
        data = pickle.dumps(item)
        os.ftruncate(self._file, 0)
        os.pwrite(self._file, data, 0)

    def get_nowait(self) -> Any:
        """Take what is there.

        Raises:
            queue.Empty: when the process that should have written ended before.
        """
        data = os.pread(self._file, os.fstat(self._file).st_size, 0)
        if not data:
            raise queue.Empty
        os.ftruncate(self._file, 0)
        return pickle.loads(data)
