"""N gloo processes on loopback, started once, in which a test runs any number of functions."""

import atexit
import contextlib
import multiprocessing
import os
import pickle
import socket
import time
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed as dist

from distill_nemo.runtime.gloo import share_gloo_device

GRACE_SECONDS = 5.0  # for the other ranks to answer after one has failed


class ProcessEndedError(RuntimeError):
    """A process died before it answered."""


class Gloo:
    """A process group of `world_size` CPU processes.

    ```
    with Gloo(2) as group:
        results = group.run(function, *args)  # one result per rank
    ```

    Functions, arguments and results are pickled, so a function must be at a module's top level. Each process sees
    `RANK`, `WORLD_SIZE`, `LOCAL_RANK`, `MASTER_ADDR` and `MASTER_PORT` as under torchrun, has one thread and no GPU.
    All are forked, in 50 ms, from one process that has set up the device and imported Megatron (`tests/preloaded.py`).
    Those of a gloo group stay from the first `run` on, unless some ranks fail or hang while others do not.

    Args:
        world_size: number of processes.
        init: join them in a gloo group. False leaves `init_process_group` to the function, and forks for every run.
        timeout: limit in seconds of one `run`, or of one collective.
        fresh: start processes that have imported nothing.
    """

    def __init__(self, world_size: int, init: bool = True, timeout: float = 120.0, fresh: bool = False) -> None:
        self.world_size, self.init, self.timeout, self.fresh = world_size, init, timeout, fresh
        self._processes: list[Any] = []
        self._connections: list[Connection] = []

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """Return `[function(*args) on rank r for r in ranks]`.

        Raises:
            Exception: the lowest failing rank's, with every failing rank's traceback as a note.
            TimeoutError: if no rank failed and some rank has not answered in time.
        """
        if not self.init:
            self.close()
        if not self._processes:
            self._start()
        with reserved_port() as port:
            message = pickle.dumps((port, function, args))
            for connection in self._connections:
                connection.send_bytes(message)
            return self._collect()

    def close(self) -> None:
        """End the processes, and kill those that do not end by themselves."""
        atexit.unregister(self.close)
        for connection in self._connections:
            connection.close()  # the child's recv ends with EOFError
        deadline = time.monotonic() + 1.0
        for process in self._processes:
            process.join(max(0.0, deadline - time.monotonic()))
            if process.is_alive():
                process.kill()
                process.join()
        self._processes, self._connections = [], []

    def __enter__(self) -> "Gloo":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn" if self.fresh else "forkserver")
        multiprocessing.set_forkserver_preload(["tests.preloaded"])
        atexit.register(self.close)
        with reserved_port() as port:
            for rank in range(self.world_size):
                ours, theirs = context.Pipe()
                args = (theirs, rank, self.world_size, port, self.init, self.timeout)
                # Not daemonic: asynchronous checkpoint writers are children of these processes.
                process = context.Process(target=_serve, args=args)
                process.start()
                theirs.close()
                self._processes.append(process)
                self._connections.append(ours)
            try:
                self._collect()
            except Exception:
                self.close()
                raise

    def _collect(self) -> list[Any]:
        answers: dict[int, tuple[bool, Any]] = {}
        deadline = time.monotonic() + self.timeout
        while len(answers) < self.world_size and time.monotonic() < deadline:
            waiting = {c: rank for rank, c in enumerate(self._connections) if rank not in answers}
            for connection in wait(list(waiting), timeout=max(0.0, deadline - time.monotonic())):
                assert isinstance(connection, Connection)
                answers[waiting[connection]] = _receive(connection)
            if any(not ok for ok, _ in answers.values()):
                deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
        failed = {rank: value for rank, (ok, value) in sorted(answers.items()) if not ok}
        silent = [rank for rank in range(self.world_size) if rank not in answers]
        ended = any(isinstance(error, ProcessEndedError) for error, _ in failed.values())
        if silent or ended or 0 < len(failed) < self.world_size:
            self.close()  # the ranks no longer agree on which collective comes next
        if failed:
            error, _ = next(iter(failed.values()))
            for rank, (_, text) in failed.items():
                error.add_note(f"rank {rank}{f' (no answer from ranks {silent})' if silent else ''}:\n{text}")
            raise error
        if silent:
            raise TimeoutError(f"ranks {silent} of {self.world_size} gave no answer in {self.timeout} s")
        return [answers[rank][1] for rank in range(self.world_size)]


@contextlib.contextmanager
def reserved_port() -> Iterator[int]:
    """Hold a port of loopback that nobody else is given meanwhile, and that a store can listen on.

    A port that was merely free a moment ago goes to the next who asks: two runs with one store hang, or fail to listen.
    """
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        # After the bind: only those who name the port and say the same (as torch's store does) may share it.
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        yield holder.getsockname()[1]


def _receive(connection: Connection) -> tuple[bool, Any]:
    try:
        return pickle.loads(connection.recv_bytes())
    except (EOFError, ConnectionResetError):
        return False, (ProcessEndedError("the process ended without an answer"), "(see its own output above)")


def _serve(connection: Connection, rank: int, world_size: int, port: int, init: bool, timeout: float) -> None:
    """Answer the start, then every function sent, until the parent closes the pipe. Runs in the child."""
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",  # for the children's children
    }
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # as under torchrun, for data workers and checkpoint writers
    limit = timedelta(seconds=timeout)
    share_gloo_device()
    connection.send_bytes(_answer(lambda: dist.init_process_group("gloo", timeout=limit) if init else None))
    with contextlib.suppress(EOFError, ConnectionError):  # the parent has closed the pipe
        while True:
            message = connection.recv_bytes()
            connection.send_bytes(_answer(lambda message=message: _call(message, init)))
    if dist.is_initialized():
        dist.destroy_process_group()


def _call(message: bytes, init: bool) -> Any:
    port, function, args = pickle.loads(message)
    if not init:
        os.environ["MASTER_PORT"] = str(port)
    return function(*args)


def _answer(call: Callable[[], Any]) -> bytes:
    """Pickle `(True, result)` or `(False, (exception, traceback))`, plainly, so that no shared memory outlives us."""
    try:
        return pickle.dumps((True, call()))
    except Exception as error:
        text = traceback.format_exc()
        try:
            pickle.loads(answer := pickle.dumps((False, (error, text))))
        except Exception:
            return pickle.dumps((False, (RuntimeError(f"{type(error).__name__}: {error}"), text)))
        return answer
