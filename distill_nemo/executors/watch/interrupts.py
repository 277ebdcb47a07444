"""Handle Ctrl-C, SIGTERM and a closed terminal while a run is watched."""

import contextlib
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import psutil

signalled = threading.Event()  # set once a signal is passed on, as jobs that end then have not failed


@contextlib.contextmanager
def passing_on_signals() -> Iterator[None]:
    """Pass Ctrl-C and SIGTERM on to the ranks, which write a checkpoint and end.

    NeMo-Run starts local jobs in sessions of their own. Ctrl-C in the terminal does not reach them, and they keep
    running when NeMo-Run is terminated.
    """

    def stop() -> None:
        signalled.set()
        children = psutil.Process().children()
        for child in children:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.terminate()
        if children:
            print("stopping: waiting for the checkpoint; the same command resumes", file=sys.stderr)

    with _ending_after(stop):
        yield


@contextlib.contextmanager
def left_running(advice: str) -> Iterator[None]:
    """Leave the job running on Ctrl-C: print `advice` to stderr and end this command."""
    with _ending_after(lambda: print(advice, file=sys.stderr)):
        yield


@contextlib.contextmanager
def _ending_after(first: Callable[[], None]) -> Iterator[None]:
    """Call `first` on a signal, then exit with 128 + its number."""

    def stop(signum: int, frame: Any) -> None:
        with contextlib.suppress(OSError):  # printing to a closed terminal fails
            first()
        raise SystemExit(128 + signum)

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
