"""The pods of a job: which node each is, how often it began, and what it said."""

import fcntl
import os
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from distill_nemo.executors.kubernetes.api import asked
from distill_nemo.executors.watch.jobs import UnseenError

NODE = "batch.kubernetes.io/job-completion-index"  # label of a pod: which node it is
STAMP = re.compile(r"\d{4}-\d\d-\d\dT\S+ ")  # before each line of a log
OVERLAP = 30  # seconds of a log that are asked for again: clocks differ


@dataclass
class PodLogs:
    """Output of pods, an attempt a file in `folder`, because a pod's log goes with the pod."""

    executor: Any
    folder: str
    _last: dict[str, str] = field(default_factory=dict)  # pod -> time of the last line read
    _size: dict[Path, int] = field(default_factory=dict)  # file -> when it was last read or written
    _asked: dict[Path, tuple[float, float]] = field(default_factory=dict)  # file -> when its log was, by two clocks

    def kept(self) -> list[Path]:
        """List the files in `folder`, one an attempt, by node and age."""
        return sorted(Path(self.folder).glob("log-[0-9]*.out"), key=_by_age)

    def new(self, pods: list[dict[str, Any]]) -> Iterator[tuple[Path, list[str]]]:
        """The lines of each attempt that are new, by node and age.

        Raises:
            UnseenError: when a log is not shown; after all those that are.
        """
        logs: dict[Path, dict[str, Any]] = {}
        for pod in pods:
            attempt, path = restarts(pod), self._path(pod, restarts(pod))
            if attempt and path not in self._asked and not is_between(pod):
                logs[self._path(pod, attempt - 1)] = {"pod": pod, "previous": True}
            logs[path] = {"pod": pod, "previous": False}
        unseen: dict[int, UnseenError] = {}
        for path in sorted({*self.kept(), *logs}, key=_by_age):
            if node_of(path) in unseen:
                continue
            log = None
            try:
                log = self._log(path, **logs[path]) if path in logs else None
            except UnseenError as error:
                if not logs[path]["pod"]["metadata"].get("deletionTimestamp"):  # else of a node that is lost
                    unseen[node_of(path)] = error
            if path.exists() or log is not None:
                yield path, self._keep(path, log or [])
        for error in unseen.values():
            raise error

    def _path(self, pod: dict[str, Any], attempt: int) -> Path:
        """Return the file of an attempt; a node's names sort by age."""
        about = pod["metadata"]
        created = re.sub(r"\D", "", about.get("creationTimestamp", ""))
        return Path(self.folder, f"log-{node_of_pod(pod)}-{created}-{about['name']}-{attempt:03}.out")

    def _keep(self, path: Path, log: list[str]) -> list[str]:
        """Write down what is new; returns it, and what another process wrote."""
        pod = path.stem.rpartition("-")[0]
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # another process may watch too
            file.seek(0, os.SEEK_END)
            new = []
            if file.tell() != self._size.get(path, 0):
                file.seek(0)
                new = self._after(pod, _lines(file.read()))
            more = self._after(pod, log)
            file.write("".join(more).encode())
            self._size[path] = file.tell()
        return [_said(line) for line in new + more]

    def _after(self, pod: str, lines: list[str]) -> list[str]:
        """Keep the lines that are later than all that was read of a pod."""
        new = [line for line in lines if _stamp(line) > self._last.get(pod, "")]
        if new:
            self._last[pod] = _stamp(new[-1])
        return new

    def _log(self, path: Path, pod: dict[str, Any], previous: bool) -> list[str] | None:
        """The last lines of a container, at least those since the last call, each with its time; None without one."""
        options: dict[str, Any] = {"container": pod["spec"]["containers"][0]["name"], "previous": previous}
        now = time.monotonic(), time.time()  # the first stands still while a laptop sleeps, the second is set at times
        if before := self._asked.get(path):
            options["since_seconds"] = int(max(now[0] - before[0], now[1] - before[1])) + OVERLAP
        where = {"name": pod["metadata"]["name"], "namespace": self.executor.namespace, "timestamps": True}
        data = asked(self.executor._core_v1_api.read_namespaced_pod_log, raw=True, **where, **options)
        if data is None:
            return None
        self._asked[path] = now
        ended = previous or not any("running" in each.get("state", {}) for each in containers(pod))
        return _lines(data + b"\n" if ended else data)


def _lines(log: bytes) -> list[str]:
    """Whole lines that have a time; the rest is the kubelet's word, or comes again when it is whole."""
    whole = log.decode(errors="replace").split("\n")[:-1]
    return [line.removesuffix("\r") + "\n" for line in whole if STAMP.match(line)]


def _stamp(line: str) -> str:
    """Return a line's time, with all nine decimals."""
    seconds, _, fraction = line.partition(" ")[0].rstrip("Z").partition(".")
    return f"{seconds}.{fraction:0<9}"


def _said(line: str) -> str:
    return line.partition(" ")[2]


def text_of(path: Path) -> str:
    """Return the output of an attempt."""
    return "".join(map(_said, _lines(path.read_bytes())))


def _by_age(path: Path) -> tuple[int, str]:
    return node_of(path), path.name


def node_of(path: Path) -> int:
    """The node whose pod said what is in a file."""
    return int(path.name.split("-")[1])


def node_of_pod(pod: dict[str, Any]) -> int:
    """Return the number of a pod's node in the job."""
    return int(pod["metadata"].get("labels", {}).get(NODE, 0))


def containers(pod: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the status of a pod's containers, as far as Kubernetes says."""
    return pod.get("status", {}).get("containerStatuses") or []


def restarts(pod: dict[str, Any]) -> int:
    """Return how often a pod's containers were started again."""
    return sum(each.get("restartCount", 0) for each in containers(pod))


def is_between(pod: dict[str, Any]) -> bool:
    """Return True between two attempts: the last one is `lastState` then, and its log `previous`."""
    return any("waiting" in each.get("state", {}) for each in containers(pod))
