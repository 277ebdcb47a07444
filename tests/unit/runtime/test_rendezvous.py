"""torchrun's agents meet through runtime/rendezvous.py: real agents in processes of their own, on loopback."""

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest
from torch.distributed import TCPStore
from torch.distributed.elastic.rendezvous import RendezvousParameters, RendezvousTimeoutError

from distill_nemo.runtime import rendezvous
from tests.spawn import reserved_port

PATIENCE = 240.0
RANK = """
import os, pathlib, sys, time
import torch.distributed as dist
place = pathlib.Path(sys.argv[1])
dist.init_process_group("gloo")
dist.barrier()
(place / f"met_{os.environ['RANK']}_of_{os.environ['WORLD_SIZE']}_{os.environ['NODE']}").touch()
while not (place / "end").exists():
    time.sleep(0.05)
dist.barrier()
"""


@pytest.fixture
def port():
    with reserved_port() as port:
        yield port


def parameters(port, backend="nodes", nodes=2, least=None, **configuration):
    return RendezvousParameters(backend, f"127.0.0.1:{port}", "7", least or nodes, nodes, **configuration)


class Agent:
    """torchrun of one node with one rank; `name` distinguishes its ranks' files from those of an earlier agent."""

    def __init__(self, place, port, node, name):
        (place / "rank.py").write_text(RANK)
        arguments = [
            "--nnodes",
            "2",
            "--rdzv-backend",
            "nodes",
            "--rdzv-endpoint",
            f"127.0.0.1:{port}",
            "--rdzv-id",
            "7",
        ]
        environment = {**os.environ, "SLURM_NODEID": str(node), "NODE": name, "GLOO_SOCKET_IFNAME": "lo"}
        environment |= {"LOGLEVEL": "ERROR", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "torch.distributed.run", *arguments, place / "rank.py", place]
        self.process = subprocess.Popen(list(map(str, command)), env=environment, start_new_session=True)

    def kill(self):
        for process in [*psutil.Process(self.process.pid).children(recursive=True), self.process]:
            process.kill()
        self.process.wait()

    def listening(self):
        connections = psutil.Process(self.process.pid).net_connections("inet")
        return {each.laddr.ip for each in connections if each.status == psutil.CONN_LISTEN}


def until(ready, what):
    end = time.monotonic() + PATIENCE
    while not ready():
        assert time.monotonic() < end, what
        time.sleep(0.05)


def marks(place):
    return sorted(path.name.removeprefix("met_") for path in place.glob("met_*"))


@pytest.mark.timeout(900)
def test_a_node_started_again_waits_for_the_next_run(tmp_path, port):
    """The first node's torchrun still runs when the second comes back. torch's static rendezvous would let it join."""
    agents = [Agent(tmp_path, port, node, "first") for node in (0, 1)]
    try:
        until(lambda: marks(tmp_path) == ["0_of_2_first", "1_of_2_first"], "the first two")
        assert agents[0].listening() == {"127.0.0.1"}
        rank_0 = psutil.Process(agents[0].process.pid).children()[0]
        rank_0.send_signal(signal.SIGSTOP)  # it does not notice its neighbour's end
        agents[1].kill()
        agents.append(Agent(tmp_path, port, 1, "again"))
        store = TCPStore("127.0.0.1", port, is_master=False)
        left = store.get("ticket/1")
        until(lambda: store.get("ticket/1") != left, "a ticket of the second node's second torchrun")
        time.sleep(2)
        assert not psutil.Process(agents[2].process.pid).children(), "a rank that nobody waits for"
        agents[0].kill()
        agents.append(Agent(tmp_path, port, 0, "again"))
        until(lambda: len(marks(tmp_path)) == 4, "both again")
        assert marks(tmp_path) == ["0_of_2_again", "0_of_2_first", "1_of_2_again", "1_of_2_first"]
        (tmp_path / "end").touch()
        assert [agent.process.wait(PATIENCE) for agent in agents[2:]] == [0, 0]
    finally:
        for agent in agents:
            if agent.process.poll() is None:
                agent.kill()


def test_agents_agree_on_rank_and_store_in_every_round(port):
    handlers = [rendezvous.handler()(parameters(port, nodes=3, rank=str(node))) for node in range(3)]
    for round_ in ("a", "b"):
        with ThreadPoolExecutor(3) as pool:
            found = list(pool.map(lambda handler: handler.next_rendezvous(), handlers))
        assert [(each.rank, each.world_size) for each in found] == [(0, 3), (1, 3), (2, 3)]
        found[0].store.set("round", round_)
        assert [each.store.get("round").decode() for each in found] == [round_] * 3
        assert {each.bootstrap_store_info.master_port for each in found} == {port}


def test_nodes_that_do_not_come_are_named(port):
    first = rendezvous.handler()(parameters(port, nodes=3, rank="0", join_timeout="0.3"))
    with pytest.raises(RendezvousTimeoutError, match=rf"127.0.0.1:{port}: node 1, 2 of 3 did not come"):
        first.next_rendezvous()
    with reserved_port() as silent:
        second = rendezvous.handler()(parameters(silent, rank="1", join_timeout="0.3"))
        with pytest.raises(RendezvousTimeoutError, match="node 1 waited 0 s for the first node at"):
            second.next_rendezvous()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"backend": "loopback"}, "for one machine, got --nnodes 2; use nodes"),
        ({"least": 1}, "needs a fixed number of nodes, got --nnodes 1:2"),
        ({}, "does not know which node this is; give --rdzv-conf rank=NUMBER"),
        ({"rank": "2"}, "--rdzv-conf rank must be from 0 to 1, got 2"),
        ({"rank": "first"}, "--rdzv-conf rank must be from 0 to 1, got first"),
    ],
)
def test_a_launch_that_cannot_meet_is_refused(monkeypatch, fields, message):
    monkeypatch.delenv("SLURM_NODEID", raising=False)
    monkeypatch.delenv("PET_NODE_RANK", raising=False)
    with pytest.raises(ValueError, match=message):
        rendezvous.handler()(parameters(1, **fields))


@pytest.mark.parametrize(
    ("host", "address"),
    [
        ("127.0.0.1", "127.0.0.1"),
        ("::1", "::1"),
        ("localhost", "0.0.0.0"),  # a name that only this node resolves so
        ("192.0.2.1", "0.0.0.0"),  # address of a router before this node
    ],
)
def test_the_store_listens_where_the_other_nodes_look(host, address):
    assert rendezvous._address_of_this_node(host, 1) == (address, 1)
