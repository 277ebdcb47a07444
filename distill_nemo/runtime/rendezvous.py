"""torchrun's rendezvous on one machine, on loopback alone: `torchrun --rdzv-backend loopback ...`.

Torch's own, c10d and static, listen on all interfaces, and c10d unpickles what it finds there: whoever reaches the port
runs code. This one has nothing to agree on, so nothing is unpickled. pyproject.toml names it to torchrun
(`torchrun.handlers`).
"""

import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from datetime import timedelta

from torch.distributed import PrefixStore, TCPStore
from torch.distributed.elastic.rendezvous import (
    RendezvousHandler,
    RendezvousInfo,
    RendezvousParameters,
    RendezvousStoreInfo,
)

LOOPBACK = "127.0.0.1"
LAUNCHER = "DISTILL_NEMO_LAUNCHER"  # process that torchrun must not outlive
TIMEOUT = timedelta(minutes=10)
LOOK_SECONDS = 1.0


class LoopbackRendezvous(RendezvousHandler):
    """One agent, and the store that its ranks meet at."""

    def __init__(self, run_id: str) -> None:
        self._run_id = run_id
        listener = socket.create_server((LOOPBACK, 0))
        self._port = listener.getsockname()[1]
        self._store = TCPStore(
            LOOPBACK, self._port, is_master=True, timeout=TIMEOUT, master_listen_fd=listener.detach()
        )

    def get_backend(self) -> str:
        """Return the name that torchrun knows it by."""
        return "loopback"

    @property
    def use_agent_store(self) -> bool:
        """True: the ranks are clients of this store, and none opens another."""
        return True

    def next_rendezvous(self) -> RendezvousInfo:
        """Return what the agent needs: it is alone, and first."""
        store = PrefixStore(self._run_id, self._store)
        return RendezvousInfo(store, 0, 1, RendezvousStoreInfo(LOOPBACK, self._port))

    def is_closed(self) -> bool:
        """Return False: a single agent closes nothing on others."""
        return False

    def set_closed(self) -> None:
        """Do nothing."""

    def num_nodes_waiting(self) -> int:
        """Return 0: no other agent can join."""
        return 0

    def get_run_id(self) -> str:
        """Return `--rdzv-id`."""
        return self._run_id

    def shutdown(self) -> bool:
        """Return True: the store ends with its process."""
        return True


def _create(parameters: RendezvousParameters) -> RendezvousHandler:
    if parameters.max_nodes != 1:
        raise ValueError(f"--rdzv-backend loopback is for one machine, got --nnodes {parameters.max_nodes}")
    _end_with_launcher()
    return LoopbackRendezvous(parameters.run_id)


def handler() -> Callable[[RendezvousParameters], RendezvousHandler]:
    """Return the factory that torchrun registers."""
    return _create


def _end_with_launcher() -> None:
    """End this torchrun by SIGTERM, so that its ranks save, once the `nemo` that started it is gone."""
    launcher = os.getppid()
    if os.environ.get(LAUNCHER) != str(launcher):
        return

    def watch() -> None:
        while os.getppid() == launcher:
            time.sleep(LOOK_SECONDS)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, name="launcher", daemon=True).start()
