"""A queue in a process of its own that lives exactly as long as this one. Light: the process imports this file.

Megatron-Core 0.19's checkpoint writers answer through such a queue. Its own helper process is ended by the SIGTERM that
a scheduler sends to every process of a job, and is missed when the ranks then save; and after a kill -9 it lives on for
ever, and with it whatever waits for the end of its output.
"""

import ctypes
import multiprocessing
import signal
import sys
import types
from multiprocessing import resource_tracker
from multiprocessing.managers import SyncManager
from typing import Any

PR_SET_PDEATHSIG = 1  # linux/prctl.h


def queue_of_helper() -> Any:
    """Start the process; a SIGTERM that comes for this one meanwhile is not lost."""
    resource_tracker.ensure_running()  # or its own start, below, would unblock the signal
    manager = SyncManager(ctx=multiprocessing.get_context("spawn"))
    main, sys.modules["__main__"] = sys.modules["__main__"], types.ModuleType("__main__")  # which it would import
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # which it inherits
    try:
        manager.start(_end_with_parent)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        sys.modules["__main__"] = main
    return manager.Queue()


def _end_with_parent() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C is for the ranks
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
