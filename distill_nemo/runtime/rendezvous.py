"""Rendezvous of torchrun's agents: `--rdzv-backend loopback` on one machine, `--rdzv-backend nodes` on several.

Torch's own backends are not used, for three reasons. c10d unpickles data from its port, so whoever reaches the port can
run code. With static, a node that restarts while the first node's torchrun is still ending joins that dying run, and
both wait for each other until a timeout. Both backends listen on all interfaces.

Here nothing is unpickled, a node starts its ranks only after the first node has answered it, and the store listens at
one address. pyproject.toml registers both backends with torchrun (`torchrun.handlers`).
"""

import ipaddress
import json
import os
import signal
import socket
import threading
import time
import uuid
from collections.abc import Callable
from datetime import timedelta

from torch.distributed import DistError, PrefixStore, TCPStore
from torch.distributed.elastic.rendezvous import (
    RendezvousHandler,
    RendezvousInfo,
    RendezvousParameters,
    RendezvousStoreInfo,
    RendezvousTimeoutError,
)
from torch.distributed.elastic.rendezvous.utils import parse_rendezvous_endpoint

LOOPBACK = "127.0.0.1"
LAUNCHER = "DISTILL_NEMO_LAUNCHER"  # variable with the process id that torchrun must not outlive
STORE_TIMEOUT = timedelta(minutes=10)  # of one operation on the store
JOIN_SECONDS = 1800.0  # a node may have to pull its image first
CONNECT_SECONDS = 5.0
POLL_SECONDS = 1.0


class LoopbackRendezvous(RendezvousHandler):
    """Rendezvous of a single agent, with the store at which its ranks meet."""

    def __init__(self, run_id: str) -> None:
        self._run_id = run_id
        self._store, port = _serve((LOOPBACK, 0))
        self._bootstrap = RendezvousStoreInfo(LOOPBACK, port)

    def get_backend(self) -> str:
        """Return the name of the backend."""
        return "loopback"

    @property
    def use_agent_store(self) -> bool:
        """True: the ranks are clients of this store and open no other."""
        return True

    def next_rendezvous(self) -> RendezvousInfo:
        """Return at once, as there is only one agent."""
        return RendezvousInfo(PrefixStore(self._run_id, self._store), 0, 1, self._bootstrap)

    def is_closed(self) -> bool:
        """Return False: the scheduler ends a run, not an agent."""
        return False

    def set_closed(self) -> None:
        """Do nothing."""

    def num_nodes_waiting(self) -> int:
        """Return 0: the number of nodes is fixed."""
        return 0

    def get_run_id(self) -> str:
        """Return `--rdzv-id`."""
        return self._run_id

    def shutdown(self) -> bool:
        """Return True: the store ends with its process."""
        return True


class NodesRendezvous(LoopbackRendezvous):
    """Rendezvous of a fixed number of agents, one per node; the first node holds the store.

    Every agent writes a new ticket to the store. The first node waits for a ticket of each node and publishes them all.
    An agent has joined once it finds its own ticket among them. A first node that is already training, or about to end,
    publishes nothing. A node that restarts meanwhile waits until that store is gone, and joins the next one.
    """

    def __init__(self, run_id: str, host: str, port: int, node: int, nodes: int, join_seconds: float) -> None:
        self._run_id, self._node, self._nodes, self._join_seconds = run_id, node, nodes, join_seconds
        self._bootstrap = RendezvousStoreInfo(host, port)
        self._answered: dict[int, str] = {}  # the last published ticket of each node
        if node == 0:
            self._store, _ = _serve(_address_of_this_node(host, port))

    def get_backend(self) -> str:
        """Return the name of the backend."""
        return "nodes"

    def next_rendezvous(self) -> RendezvousInfo:
        """Wait for all nodes.

        Raises:
            RendezvousTimeoutError: naming the nodes that are missing, or the address that does not answer.
        """
        ticket, deadline = uuid.uuid4().hex, time.monotonic() + self._join_seconds
        joined = self._publish(ticket, deadline) if self._node == 0 else self._join(ticket, deadline)
        store = PrefixStore(f"{self._run_id}/{joined}", self._store)
        return RendezvousInfo(store, self._node, self._nodes, self._bootstrap)

    def _publish(self, ticket: str, deadline: float) -> str:
        """Wait for a new ticket of every other node and publish them all. Return the first node's ticket."""
        tickets = {0: ticket}
        while missing := [node for node in range(self._nodes) if node not in tickets]:
            for node in missing:
                if self._store.check([f"ticket/{node}"]):
                    found = self._store.get(f"ticket/{node}").decode()
                    if found != self._answered.get(node):
                        tickets[node] = found
            if time.monotonic() > deadline:
                where = f"{self._bootstrap.master_addr}:{self._bootstrap.master_port}"
                names = ", ".join(map(str, missing))
                raise RendezvousTimeoutError(
                    f"waited {self._join_seconds:.0f} s at {where}: node {names} of {self._nodes} did not come"
                )
            time.sleep(POLL_SECONDS / 10)
        self._answered = tickets
        self._store.set("tickets", json.dumps([tickets[node] for node in range(self._nodes)]))
        return ticket

    def _join(self, ticket: str, deadline: float) -> str:
        """Write a ticket to the store, and to the next one if that is gone, until it is published.

        Returns:
            The first node's ticket.
        """
        address = (self._bootstrap.master_addr, self._bootstrap.master_port)
        while time.monotonic() < deadline:
            try:
                socket.create_connection(address, CONNECT_SECONDS).close()  # TCPStore ignores signals while it connects
                self._store = TCPStore(*address, is_master=False, timeout=STORE_TIMEOUT)
                self._store.set(f"ticket/{self._node}", ticket)
                while time.monotonic() < deadline:
                    if self._store.check(["tickets"]):
                        tickets = json.loads(self._store.get("tickets"))
                        if tickets[self._node] == ticket:
                            return str(tickets[0])
                    time.sleep(POLL_SECONDS / 10)
            except (OSError, DistError):
                time.sleep(POLL_SECONDS)
        raise RendezvousTimeoutError(
            f"node {self._node} waited {self._join_seconds:.0f} s for the first node at {address[0]}:{address[1]}"
        )


def handler() -> Callable[[RendezvousParameters], RendezvousHandler]:
    """Return the factory that torchrun registers for both backends."""
    return _create


def _create(parameters: RendezvousParameters) -> RendezvousHandler:
    nodes = parameters.max_nodes
    if parameters.backend == "loopback":
        if nodes != 1:
            raise ValueError(f"--rdzv-backend loopback is for one machine, got --nnodes {nodes}; use nodes")
        _end_with_launcher()
        return LoopbackRendezvous(parameters.run_id)
    if parameters.min_nodes != nodes:
        raise ValueError(
            f"--rdzv-backend nodes needs a fixed number of nodes, got --nnodes {parameters.min_nodes}:{nodes}"
        )
    host, port = parse_rendezvous_endpoint(parameters.endpoint or _endpoint_of_trainer(), default_port=29500)
    join_seconds = float(parameters.get("join_timeout", JOIN_SECONDS))
    return NodesRendezvous(parameters.run_id, host, port, _node(parameters), nodes, join_seconds)


def _endpoint_of_trainer() -> str:
    """Return the first node's address from Kubeflow Trainer's variables."""
    address, port = os.environ.get("PET_MASTER_ADDR"), os.environ.get("PET_MASTER_PORT")
    if address is None or port is None:
        raise ValueError("--rdzv-backend nodes needs --rdzv-endpoint HOST:PORT, the same on every node")
    return f"{address}:{port}"


def _node(parameters: RendezvousParameters) -> int:
    """Return this node's number, which torchrun passes to its static rendezvous only.

    NeMo-Run 0.11.1's `--node-rank` is no source under SLURM: the first node's shell writes its own into every command.
    """
    known = {
        "--rdzv-conf rank": parameters.get("rank"),
        "PET_NODE_RANK": os.environ.get("PET_NODE_RANK"),
        "SLURM_NODEID": os.environ.get("SLURM_NODEID"),
    }
    for name, value in known.items():
        if value is not None:
            if not value.isdecimal() or int(value) >= parameters.max_nodes:
                raise ValueError(f"{name} must be from 0 to {parameters.max_nodes - 1}, got {value}")
            return int(value)
    raise ValueError("--rdzv-backend nodes does not know which node this is; give --rdzv-conf rank=NUMBER")


def _serve(address: tuple[str, int]) -> tuple[TCPStore, int]:
    """Open a store that listens at this address only. Return it and its port."""
    family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
    listener = socket.create_server(address, family=family)
    port = listener.getsockname()[1]
    store = TCPStore(address[0], port, is_master=True, timeout=STORE_TIMEOUT, master_listen_fd=listener.detach())
    return store, port


def _address_of_this_node(host: str, port: int) -> tuple[str, int]:
    """Return the address to listen at so that the other nodes reach `host`.

    It is every IPv4 address if this node resolves `host` to loopback, as with Debian's /etc/hosts, or to an address
    that it does not have.
    """
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][4][0]
    address = ipaddress.ip_address(str(found).partition("%")[0])
    try:
        literal = ipaddress.ip_address(host) == address
    except ValueError:
        literal = False
    if address.is_loopback and not literal:
        return "0.0.0.0", port
    with socket.socket(socket.AF_INET6 if address.version == 6 else socket.AF_INET) as probe:
        try:
            probe.bind((str(address), 0))
        except OSError:
            return "0.0.0.0", port
    return str(address), port


def _end_with_launcher() -> None:
    """Send this torchrun SIGTERM, so that its ranks save, once the `nemo` that started it is gone."""
    launcher = os.getppid()
    if os.environ.get(LAUNCHER) != str(launcher):
        return

    def watch() -> None:
        while os.getppid() == launcher:
            time.sleep(POLL_SECONDS)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, name="launcher", daemon=True).start()
