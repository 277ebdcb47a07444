"""Watchdog that names a rank that hangs and ends the run, instead of letting all wait in a collective.

A thread on every rank reports the rank's progress and place in the code through a store, even while the rank hangs in
C++. If a thread falls silent, its process was stopped or its machine is gone.
"""

import json
import os
import sys
import threading
import time
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import torch.distributed as dist

from distill_nemo.fields import first_few
from distill_nemo.runtime.everyone import open_store

SILENT_INTERVALS = 5  # without a report
GRACE_SECONDS = 5.0  # for one rank to print the error, before the others end


class _Progress:
    """Activity of this rank, and when it began; None if it may take any time."""

    doing: str = "starting"
    at: float | None = None


def heartbeat(doing: str, watched: bool = True) -> None:
    """Report that this rank starts an activity. Unless `watched`, it may take any time.

    Collectives keep their own timeout.
    """
    _Progress.doing, _Progress.at = doing, time.monotonic() if watched else None


class Watchdog:
    """Context manager that ends this process if its block calls no `heartbeat` for `seconds`."""

    def __init__(self, seconds: float) -> None:
        self.interval = max(0.1, min(5.0, seconds / 20))
        self.seconds = seconds - 2 * self.interval  # before the collectives' own timeout, which names no rank
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._watched, self._ended = threading.get_ident(), threading.Event()
        self._store: Any = None

    def __enter__(self) -> "Watchdog":
        if self.world_size > 1:
            self._store = open_store()
        heartbeat("starting")
        self._thread.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        looked = 0.0
        before: list[Any] | None = None
        while not self._ended.wait(self.interval):
            since = _Progress.at
            waited = time.monotonic() - since if since is not None else 0.0
            try:
                self._report()
                if waited < self.seconds - (SILENT_INTERVALS + 2) * self.interval:
                    before = None
                elif before is None:
                    before, looked = self._reports(), time.monotonic()
                elif waited > self.seconds and time.monotonic() - looked > SILENT_INTERVALS * self.interval:
                    self._end(before)
            except (RuntimeError, OSError):  # the process with the store, rank 0's or torchrun's, is gone or stopped
                if waited > self.seconds:
                    self._exit("the store on rank 0's machine does not answer")

    def _own_report(self) -> dict[str, Any]:
        where = _place(sys._current_frames()[self._watched])
        return {"clock": time.monotonic(), "doing": _Progress.doing, "where": where}

    def _report(self) -> None:
        if self._store is not None:
            self._store.set(f"watchdog/{self.rank}", json.dumps(self._own_report()))

    def _end(self, before: list[Any]) -> None:
        """End this process. A rank is silent if its report equals the one `before`; no clocks are compared."""
        now = self._reports()
        silent = [rank for rank, report in enumerate(now) if report == before[rank]]
        alive = [rank for rank in range(self.world_size) if rank not in silent]
        if self.rank != min(alive, default=self.rank):
            time.sleep(GRACE_SECONDS)
            os._exit(1)
        lines = [f"rank {rank} gives no sign of life, last in: {_place_of(now[rank])}" for rank in silent]
        lines += [f"rank {rank} is in: {_place_of(now[rank])}" for rank in alive]
        self._exit("; ".join(first_few(lines)))

    def _reports(self) -> list[Any]:
        """Return the last report of every rank; None for a rank without one."""
        if self._store is None:
            return [self._own_report()]
        keys = [f"watchdog/{rank}" for rank in range(self.world_size)]
        return [json.loads(self._store.get(key)) if self._store.check([key]) else None for key in keys]

    def _exit(self, problem: str) -> None:
        print(
            f"error: no progress for {self.seconds:.0f} s (parallelism.timeout_minutes): {problem}. Run the same "
            "command again to resume from the last checkpoint",
            file=sys.stderr,
            flush=True,
        )
        os._exit(1)


def _place_of(report: dict[str, Any] | None) -> str:
    return f"{report['doing']}, {report['where']}" if report else "no report"


def _place(frame: FrameType | None) -> str:
    """Return the waiting collective and its caller, else the innermost call, and our line that led there."""
    calls: list[str] = []
    waits = False  # in torch.distributed
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        place = f"{frame.f_code.co_name} ({path.name}:{frame.f_lineno})"
        if "distributed_c10d" in path.name:
            calls, waits = [place], True  # the collective itself rather than its inner calls
        elif not calls or "distill_nemo" in path.parts:
            calls.append(place)
        elif waits and "torch" not in path.parts and path.name != "contextlib.py":
            calls.append(place)  # names the caller of _coalescing_manager
            waits = False
        if "distill_nemo" in path.parts:
            break
        frame = frame.f_back
    return " from ".join(calls) or "no Python code"
