"""End a process whose parent has died, such as a rank without its torchrun or an export without its run. No torch."""

import os
import signal
import threading
import time

POLL_SECONDS = 1.0
GRACE_SECONDS = 600.0  # to save a checkpoint


def end_with_parent(grace: float = GRACE_SECONDS) -> None:
    """Send this process SIGTERM when its parent dies, and SIGKILL `grace` seconds later.

    On SIGTERM a training run saves a checkpoint and stops; anything else ends at once. A thread polls, because Linux's
    PR_SET_PDEATHSIG fires when the thread that started this process ends, not only when the parent does.
    """
    threading.Thread(target=_watch, args=(os.getppid(), grace), name="orphan watch", daemon=True).start()


def end_with_torchrun() -> None:
    """Call `end_with_parent` in a rank of torchrun. A shell's child may outlive the shell."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        end_with_parent()


def _watch(parent: int, grace: float) -> None:
    while os.getppid() == parent:
        time.sleep(POLL_SECONDS)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(grace)
    os.kill(os.getpid(), signal.SIGKILL)
