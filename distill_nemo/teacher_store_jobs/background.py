"""Write shards beside the teacher's next forward passes."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, Self


class Background:
    """A thread that has one task at a time. A task's error is raised by the next call."""

    def __init__(self) -> None:
        self._pool, self._task = ThreadPoolExecutor(1, "shard writer"), None
        self._task: Future[None] | None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._pool.shutdown()

    def start(self, task: Callable[..., None], *arguments: Any) -> None:
        """Wait for the task before, then start this one."""
        self.wait()
        self._task = self._pool.submit(task, *arguments)

    def wait(self) -> None:
        """Wait until nothing is left to do."""
        task, self._task = self._task, None
        if task is not None:
            task.result()
