"""SIGTERM, SIGINT and SIGURG ask for a stop at the end of the step; all ranks agree on it."""

import signal
from types import FrameType, TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_early: list[int] = []


def heed_early_warnings() -> None:
    """From here on a SIGURG is not lost that comes while models load: `StopSignal` begins with it."""
    signal.signal(signal.SIGURG, lambda number, frame: _early.append(number))


class StopSignal:
    """`with StopSignal() as stop:` then `stop.requested()` once a step, on every rank.

    A second SIGINT ends the process at once, as the user expects of a second Ctrl-C. More SIGTERMs are the same
    request: a scheduler sends it to torchrun and to the ranks, and torchrun sends it to its ranks again. SIGURG is what
    SLURM is asked to send before a time limit, because whoever does not know it, torchrun included, is left alone.
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
        """The signal that any rank received, or None. One small all-reduce: every rank must call it."""
        import torch
        import torch.distributed as dist

        flag = torch.tensor([self.received or 0], dtype=torch.int32, device=device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return int(flag) or None
