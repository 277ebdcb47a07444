"""Ctrl-C, SIGTERM and a closed terminal while a run is watched: what becomes of it, and of this command."""

import contextlib
import signal
import sys
from collections.abc import Callable, Iterator
from typing import Any

import psutil


@contextlib.contextmanager
def passing_on_signals() -> Iterator[None]:
    """Ctrl-C and SIGTERM reach the ranks, which write a checkpoint and end.

    NeMo-Run starts local jobs in sessions of their own, where a terminal's Ctrl-C does not come, and when it is itself
    terminated it leaves them running.
    """

    def stop() -> None:
        children = psutil.Process().children()
        for child in children:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.terminate()
        if children:
            print("stopping: waiting for the checkpoint; the same command resumes", file=sys.stderr)

    with _ending_after(stop):
        yield


@contextlib.contextmanager
def left_running(told: str) -> Iterator[None]:
    """Ctrl-C ends the watching, not the job; `told` says what to type."""
    with _ending_after(lambda: print(told, file=sys.stderr)):
        yield


@contextlib.contextmanager
def _ending_after(first: Callable[[], None]) -> Iterator[None]:
    """On a signal do `first`, and exit with 128 + its number."""

    def stop(signum: int, frame: Any) -> None:
        with contextlib.suppress(OSError):  # a closed terminal takes no words
            first()
        raise SystemExit(128 + signum)

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
