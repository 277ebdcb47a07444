"""SIGTERM and SIGINT ask for a stop at the end of the step; all ranks agree on it."""

import signal
from types import FrameType, TracebackType

import torch
import torch.distributed as dist


class StopSignal:
    """`with StopSignal() as stop:` then `stop.requested()` once a step, on every rank.

    A second signal ends the process at once, as the user expects of a second Ctrl-C.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._previous: dict[int, object] = {}

    def __enter__(self) -> "StopSignal":
        for number in (signal.SIGTERM, signal.SIGINT):
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            raise KeyboardInterrupt
        self.received = number

    def requested(self, device: torch.device) -> int | None:
        """The signal that any rank received, or None. One small all-reduce: every rank must call it."""
        flag = torch.tensor([self.received or 0], dtype=torch.int32, device=device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return int(flag) or None
