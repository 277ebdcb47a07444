"""Work of one rank that takes longer than a collective may: the others wait at the store."""

import json
import os
import uuid
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch.distributed as dist

ONE_DAY = timedelta(days=1)
PASSED_ON: dict[str, type[Exception]] = {"ValueError": ValueError, "OSError": OSError, "RuntimeError": RuntimeError}


class AgreedError(RuntimeError):
    """Failure that every rank raises. No rank has ended because of it."""


class Everyone:
    """All ranks of the job. Each makes one at the same time, and calls its methods in the same order."""

    def __init__(self) -> None:
        self.alone = dist.get_world_size() == 1
        self._meetings = 0
        if not self.alone:
            name = [uuid.uuid4().hex]  # of no attempt before: torchrun may keep their store
            dist.broadcast_object_list(name)
            self._name, self._store = name[0], open_store()

    def on_rank_0[T](self, function: Callable[[], T]) -> T:
        """Call a function on rank 0, and return on every rank what it returned. It may take a day.

        Args:
            function: returns plain values.

        Raises:
            ValueError, OSError, RuntimeError: as the function does, on every rank.
        """
        if self.alone:
            return function()
        key, failure = self._next_key(), None
        answer: dict[str, Any] = {}
        if dist.get_rank() == 0:
            try:
                answer["value"] = function()
            except tuple(PASSED_ON.values()) as error:
                kinds = [name for name, kind in PASSED_ON.items() if isinstance(error, kind)]
                answer, failure = {"error": kinds[0], "message": str(error)}, error
            self._store.set(key, json.dumps(answer))
        else:
            answer = self._wait(key)
            if "error" in answer:
                failure = PASSED_ON[answer["error"]](answer["message"])
        if failure is not None:
            raise failure
        return answer["value"]

    def raise_errors(self, error: Exception | None) -> None:
        """Wait for every rank, for up to a day; raise an `AgreedError` on each if any of them has an error."""
        if self.alone:
            if error is not None:
                raise error
            return
        key, size = self._next_key(), dist.get_world_size()
        self._store.set(f"{key}/{dist.get_rank()}", json.dumps(None if error is None else str(error)))
        if dist.get_rank() == 0:
            found = [self._wait(f"{key}/{rank}") for rank in range(size)]
            messages = [f"rank {rank}: {message}" for rank, message in enumerate(found) if message is not None]
            self._store.set(key, json.dumps(messages))
        if messages := self._wait(key):
            raise AgreedError(messages[0]) from error

    def _next_key(self) -> str:
        self._meetings += 1
        return f"{self._name}/{self._meetings}"

    def _wait(self, key: str) -> Any:
        self._store.wait([key], ONE_DAY)
        return json.loads(self._store.get(key))


def open_store() -> dist.TCPStore:
    """Open another connection to this run's store, so that waiting on it blocks no other use. Needs several ranks."""
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return dist.TCPStore(address, port, is_master=False, timeout=timedelta(seconds=10))
