"""Stop at the end of a step on SIGTERM, SIGINT or SIGURG; all ranks agree on it."""

import os
import signal
from types import FrameType, TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_early: list[int] = []


def keep_early_sigurg() -> None:
    """Keep a SIGURG that arrives while models load, so that `StopSignal` starts with it."""
    signal.signal(signal.SIGURG, lambda number, frame: _early.append(number))


def end_at_sigurg() -> None:
    """End this process at SIGURG, which SLURM sends before a time limit, so that the job is queued again.

    For work that a killed process can leave at any moment, and that the next one goes on with.
    """

    def end(number: int, frame: FrameType | None) -> None:
        if os.environ.get("RANK", "0") == "0":
            print(f"stopped by signal {number}; the same command resumes", flush=True)
        os._exit(128 + number)  # no cleaning up, which would wait for the other ranks

    signal.signal(signal.SIGURG, end)


class StopSignal:
    """Context manager that records signals: `with StopSignal() as stop:`, then `stop.requested()` once a step.

    A second SIGINT ends the process at once, as the user expects of a second Ctrl-C. Further SIGTERMs are the same
    request: a scheduler signals torchrun and the ranks, and torchrun passes its own on to the ranks. Before a time
    limit SLURM sends SIGURG, since a process without a handler for it, such as torchrun, ignores it.
    """

    def __init__(self) -> None:
        self.received: int | None = _early.pop() if _early else None
        self._previous: dict[int, object] = {}

    def __enter__(self) -> "StopSignal":
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGURG):
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == self.received == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = self.received or number

    def requested(self, device: "torch.device") -> int | None:
        """Return the signal that any rank received, or None. One small all-reduce; every rank must call it."""
        import torch
        import torch.distributed as dist

        flag = torch.tensor([self.received or 0], dtype=torch.int32, device=device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return int(flag) or None
