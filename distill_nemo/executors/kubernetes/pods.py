"""The pods of a job: their nodes, restarts and output."""

import fcntl
import os
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from distill_nemo.executors.kubernetes.api import answer_to
from distill_nemo.executors.watch.jobs import UnseenError

NODE_LABEL = "batch.kubernetes.io/job-completion-index"  # label of a pod: the number of its node
STAMP = re.compile(r"\d{4}-\d\d-\d\dT\S+ ")  # precedes each line of a log
OVERLAP_SECONDS = 30  # of a log that are requested again, because clocks differ


@dataclass
class PodLogs:
    """Copies of the pods' logs in `folder`, one file per attempt, since a log is deleted with its pod."""

    executor: Any
    folder: str
    _last: dict[str, str] = field(default_factory=dict)  # pod -> time of the last line read
    _size: dict[Path, int] = field(default_factory=dict)  # file -> its size when it was last read or written
    _asked: dict[Path, tuple[float, float]] = field(default_factory=dict)  # file -> time of its last request

    def kept(self) -> list[Path]:
        """List the files in `folder`, one per attempt, by node and age."""
        return sorted(Path(self.folder).glob("log-[0-9]*.out"), key=_by_age)

    def new(self, pods: list[dict[str, Any]]) -> Iterator[tuple[Path, list[str]]]:
        """Yield the file and the new lines of each attempt, by node and age.

        Raises:
            UnseenError: if a log cannot be read, once all the others have been yielded.
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
                if not logs[path]["pod"]["metadata"].get("deletionTimestamp"):  # set when its node is lost
                    unseen[node_of(path)] = error
            if path.exists() or log is not None:
                yield path, self._keep(path, log or [])
        for error in unseen.values():
            raise error

    def _path(self, pod: dict[str, Any], attempt: int) -> Path:
        """Return the file of an attempt. The names of a node's files sort by age."""
        about = pod["metadata"]
        created = re.sub(r"\D", "", about.get("creationTimestamp", ""))
        return Path(self.folder, f"log-{node_of_pod(pod)}-{created}-{about['name']}-{attempt:03}.out")

    def _keep(self, path: Path, log: list[str]) -> list[str]:
        """Append the new lines to the file. Return them and those that another process has appended."""
        pod = path.stem.rpartition("-")[0]
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # another process may watch the same job
            file.seek(0, os.SEEK_END)
            new = []
            if file.tell() != self._size.get(path, 0):
                file.seek(0)
                new = self._after(pod, _lines(file.read()))
            more = self._after(pod, log)
            file.write("".join(more).encode())
            self._size[path] = file.tell()
        return [_without_stamp(line) for line in new + more]

    def _after(self, pod: str, lines: list[str]) -> list[str]:
        """Return the lines that are later than all those read so far of a pod."""
        new = [line for line in lines if _stamp(line) > self._last.get(pod, "")]
        if new:
            self._last[pod] = _stamp(new[-1])
        return new

    def _log(self, path: Path, pod: dict[str, Any], previous: bool) -> list[str] | None:
        """Return a container's lines with their times, at least those since the last call; None if it has no log."""
        options: dict[str, Any] = {"container": pod["spec"]["containers"][0]["name"], "previous": previous}
        now = time.monotonic(), time.time()  # the first stops while a laptop sleeps; the second may be set back
        if before := self._asked.get(path):
            options["since_seconds"] = int(max(now[0] - before[0], now[1] - before[1])) + OVERLAP_SECONDS
        where = {"name": pod["metadata"]["name"], "namespace": self.executor.namespace, "timestamps": True}
        data = answer_to(self.executor._core_v1_api.read_namespaced_pod_log, raw=True, **where, **options)
        if data is None:
            return None
        self._asked[path] = now
        ended = previous or not any("running" in each.get("state", {}) for each in containers(pod))
        return _lines(data + b"\n" if ended else data)


def _lines(log: bytes) -> list[str]:
    """Return the complete lines that have a time; others are the kubelet's, and an incomplete one is read again."""
    complete = log.decode(errors="replace").split("\n")[:-1]
    return [line.removesuffix("\r") + "\n" for line in complete if STAMP.match(line)]


def _stamp(line: str) -> str:
    """Return a line's time with nine decimals, so that times sort as text."""
    seconds, _, fraction = line.partition(" ")[0].rstrip("Z").partition(".")
    return f"{seconds}.{fraction:0<9}"


def _without_stamp(line: str) -> str:
    return line.partition(" ")[2]


def text_of(path: Path) -> str:
    """Return the output of an attempt."""
    return "".join(map(_without_stamp, _lines(path.read_bytes())))


def _by_age(path: Path) -> tuple[int, str]:
    return node_of(path), path.name


def node_of(path: Path) -> int:
    """Return the number of the node whose output a file holds."""
    return int(path.name.split("-")[1])


def node_of_pod(pod: dict[str, Any]) -> int:
    """Return the number of a pod's node in the job."""
    return int(pod["metadata"].get("labels", {}).get(NODE_LABEL, 0))


def containers(pod: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the status of a pod's containers; empty if Kubernetes gives none yet."""
    return pod.get("status", {}).get("containerStatuses") or []


def restarts(pod: dict[str, Any]) -> int:
    """Return how often a pod's containers were restarted."""
    return sum(each.get("restartCount", 0) for each in containers(pod))


def is_between(pod: dict[str, Any]) -> bool:
    """Return True between two attempts, when the last one is `lastState` and its log `previous`."""
    return any("waiting" in each.get("state", {}) for each in containers(pod))
