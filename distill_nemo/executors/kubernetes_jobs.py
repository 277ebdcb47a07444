"""TrainJobs on a Kubernetes cluster: how they are, what their pods say, and their end."""

import json
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from distill_nemo.executors.cluster_jobs import INTERVAL, UNSEEN, ClusterJob, UnseenError
from distill_nemo.executors.endings import why_a_log_ended, why_nodes_ended
from distill_nemo.executors.kubernetes_api import TRAIN_JOBS, asked
from distill_nemo.executors.screen import RankLines

OF_JOB = "jobset.sigs.k8s.io/jobset-name"  # label of its pods
NODE = "batch.kubernetes.io/job-completion-index"  # label of a pod: which node it is
STUCK = (  # reasons for which a container does not start, and that seldom pass
    "ErrImagePull ImagePullBackOff InvalidImageName ErrImageNeverPull ImageInspectError RegistryUnavailable "
    "CreateContainerConfigError CreateContainerError RunContainerError"
).split()
PASSING = ("ContainerCreating", "PodInitializing")
STAMP = re.compile(r"\d{4}-\d\d-\d\dT\S+ ")  # before each line of a log
OVERLAP = 30  # seconds of a log that are asked for again: clocks differ
COMES_BACK = "the same command goes on from the last checkpoint"


@dataclass
class State:
    """A job now."""

    name: str  # Pending, Running, Suspended, Complete, Failed, Deleting, Deleted
    reason: str = ""  # why it waits, or Kubernetes' word for its end
    elapsed: str = "00:00:00"
    num_pods: int = 0
    restarts: int = 0
    stuck: bool = False

    @property
    def ended(self) -> bool:
        """Whether nothing more will come of it."""
        return self.name in ("Complete", "Failed", "Deleted")

    @property
    def completed(self) -> bool:
        """Whether it ended well."""
        return self.name == "Complete"

    @property
    def waits(self) -> str:
        """Why it, or one of its pods, does not run yet."""
        return "" if self.ended else self.reason

    def __str__(self) -> str:
        why = f" ({self.reason})" if self.reason and not self.completed else ""
        again = f", started again {self.restarts} times" if self.restarts else ""
        return f"{self.name}{why}, {self.num_pods} pods, {self.elapsed}{again}"


@dataclass
class KubernetesJob(ClusterJob):
    """One TrainJob."""

    name: str
    id: str
    executor: Any
    folder: str  # here: what has been read of its logs
    _last: dict[str, str] = field(default_factory=dict)  # pod -> time of the last line read
    _size: dict[Path, int] = field(default_factory=dict)  # file -> when it was last read or written
    _asked: dict[Path, tuple[float, float]] = field(default_factory=dict)  # file -> when its log was, by two clocks
    _lines: dict[Path, RankLines] = field(default_factory=dict)

    @classmethod
    def of(cls, job: Any) -> "KubernetesJob":
        """The one behind a NeMo-Run job."""
        return cls(job.id, job.handle.rpartition("___")[2], job.executor, job.executor.job_dir)

    @classmethod
    def named(cls, executor: Any, name: str) -> "KubernetesJob":
        """A TrainJob by its name."""
        return cls(name, name, executor, executor.job_dir)

    def state(self) -> State:
        """How it is.

        Raises:
            UnseenError: when Kubernetes does not answer.
        """
        api, where = self.executor._custom_objects_api, {"namespace": self.executor.namespace, "name": self.id}
        job = asked(api.get_namespaced_custom_object, **TRAIN_JOBS, **where)
        pods = self._pods()
        if job is None:
            return State("Deleting" if pods else "Deleted", num_pods=len(pods))
        true = {each["type"]: each for each in job.get("status", {}).get("conditions", []) if each["status"] == "True"}
        last = true.get("Complete") or true.get("Failed")
        elapsed = _elapsed(job["metadata"].get("creationTimestamp"), last and last.get("lastTransitionTime"))
        about: dict[str, Any] = {"elapsed": elapsed, "num_pods": len(pods), "restarts": sum(map(_restarts, pods))}
        if last:
            return State(last["type"], last.get("reason", ""), **about)
        if "Suspended" in true:
            return State("Suspended", true["Suspended"].get("message", ""), **about)
        waiting = [(pod["metadata"]["name"], *why) for pod in pods if (why := _waits(pod))]
        running = any(pod["status"].get("phase") in ("Running", "Succeeded") for pod in pods)
        reason = f"{waiting[0][0]}: {waiting[0][1]}: {waiting[0][2]}".rstrip(": ") if waiting else ""
        stuck = any(why in STUCK for _, why, _ in waiting)
        return State("Running" if running else "Pending", reason, stuck=stuck, **about)

    def new_lines(self) -> Iterator[str]:
        """What the pods have said since the last call, each line with its node where there are several."""
        for path, lines in self._new():
            for line in lines:
                yield f"node {_node_of(path)} {line}" if self.executor.nnodes() > 1 else line

    new_text = new_lines

    def new_shown(self) -> Iterator[str]:
        """What the ranks have said since the last call, as it is shown."""
        before: dict[int, Path] = {}
        for path, lines in self._new():
            node = _node_of(path)
            first_rank = node * self.executor.nproc_per_node()
            if path not in self._lines:
                if node in before:
                    why = why_a_log_ended(_text(before[node]), first_rank)
                    yield f"{self.name}: node {node} is started again, because of {why}\n"
                self._lines[path] = RankLines(torchrun=True, first_rank=first_rank)
            yield from map(self._lines[path].shown, lines)
            before[node] = path

    def until_the_end(self) -> Iterator[str]:
        """Lines as they come.

        Raises:
            UnseenError: as `follow`.
        """
        ended, unseen = False, 0
        while not ended:
            try:
                state = self.state()
                yield from self.new_lines()
                ended, unseen = state.ended, 0
            except UnseenError:
                unseen += 1
                if unseen == UNSEEN:
                    raise
            time.sleep(0 if ended else INTERVAL)

    def why(self, state: State) -> str:
        """`error: ...` of a job that did not complete."""
        pods, unread = [], ""
        try:
            pods = self._pods()
            for _ in self._new():
                pass
        except UnseenError as error:
            unread = f"; not all of its logs could be read: {error}"
        # The newest of each node that says something: a last attempt may be ended as soon as it begins.
        logs = {_node_of(path): text for path in self._kept() if (text := _text(path)).strip()}
        saved = any("checkpoint written" in text for text in logs.values())
        comes_back = f"{'its ranks had saved; ' if saved else ''}{COMES_BACK}"
        if state.name == "Deleted":
            return f"error: the TrainJob was deleted, by `cancel` or by somebody else; {comes_back}"
        if state.reason == "DeadlineExceeded":
            return f"error: it ran into its time limit after {state.elapsed}; {comes_back}"
        if not state.ended:
            return f"error: it does not start: {state.reason}"
        for node, pod in {_node(pod): pod for pod in pods}.items():
            if said := _killed(pod):
                return f"error: node {node} {said}; {comes_back}"
        if not logs:
            none = "" if unread else "no rank started: "
            return f"error: {none}{state.reason}{unread}; `kubectl describe trainjob {self.id}` may tell more"
        devices = self.executor.nproc_per_node()
        return why_nodes_ended([(node * devices, text) for node, text in logs.items()]) + unread

    def cancel(self) -> None:
        """Delete it: the ranks get SIGTERM, and the time that the pods are given to save.

        Raises:
            RuntimeError: in Kubernetes' words, when it does not.
        """
        api, where = self.executor._custom_objects_api, {"namespace": self.executor.namespace, "name": self.id}
        try:
            asked(api.delete_namespaced_custom_object, **TRAIN_JOBS, **where)
        except UnseenError as error:
            raise RuntimeError(f"job {self.id} could not be deleted: {error}") from None

    def _pods(self) -> list[dict[str, Any]]:
        """Those of its ranks, by node and age."""
        api, label = self.executor._core_v1_api, f"{OF_JOB}={self.id}"
        listed = asked(api.list_namespaced_pod, raw=True, namespace=self.executor.namespace, label_selector=label)
        return sorted(
            json.loads(listed or '{"items": []}')["items"],
            key=lambda pod: (_node(pod), pod["metadata"].get("creationTimestamp", "")),
        )

    def _kept(self) -> list[Path]:
        """What is in `folder`: a file for each attempt, by node and age."""
        return sorted(Path(self.folder).glob("log-[0-9]*.out"), key=_by_age)

    def _new(self) -> Iterator[tuple[Path, list[str]]]:
        """The lines of each attempt that are new, by node and age.

        Raises:
            UnseenError: when a log is not shown; after all those that are.
        """
        logs: dict[Path, dict[str, Any]] = {}
        for pod in self._pods():
            attempt, path = _restarts(pod), self._path(pod, _restarts(pod))
            if attempt and path not in self._asked and not _between(pod):
                logs[self._path(pod, attempt - 1)] = {"pod": pod, "previous": True}
            logs[path] = {"pod": pod, "previous": False}
        unseen: dict[int, UnseenError] = {}
        for path in sorted({*self._kept(), *logs}, key=_by_age):
            if _node_of(path) in unseen:
                continue
            log = None
            try:
                log = self._log(path, **logs[path]) if path in logs else None
            except UnseenError as error:
                unseen[_node_of(path)] = error
            if path.exists() or log is not None:
                yield path, self._keep(path, log or [])
        for error in unseen.values():
            raise error

    def _path(self, pod: dict[str, Any], attempt: int) -> Path:
        """Its file: names of a node sort by age."""
        about = pod["metadata"]
        created = re.sub(r"\D", "", about.get("creationTimestamp", ""))
        return Path(self.folder, f"log-{_node(pod)}-{created}-{about['name']}-{attempt:03}.out")

    def _keep(self, path: Path, log: list[str]) -> list[str]:
        """Write down what is new, because a pod's log goes with the pod; returns it, and what another process wrote."""
        pod = path.stem.rpartition("-")[0]
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a+b") as file:
            new = []
            if file.tell() != self._size.get(path, 0):
                file.seek(0)
                new = self._after(pod, _lines(file.read()))
            more = self._after(pod, log)
            file.write("".join(more).encode())
            self._size[path] = file.tell()
        return [_said(line) for line in new + more]

    def _after(self, pod: str, lines: list[str]) -> list[str]:
        """Those that are later than all that was read of a pod."""
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
        ended = previous or not any("running" in each.get("state", {}) for each in _containers(pod))
        return _lines(data + b"\n" if ended else data)


def _lines(log: bytes) -> list[str]:
    """Whole lines that have a time; the rest is the kubelet's word, or comes again when it is whole."""
    whole = log.decode(errors="replace").split("\n")[:-1]
    return [line.removesuffix("\r") + "\n" for line in whole if STAMP.match(line)]


def _stamp(line: str) -> str:
    """Its time, with all of the nine decimals."""
    seconds, _, fraction = line.partition(" ")[0].rstrip("Z").partition(".")
    return f"{seconds}.{fraction:0<9}"


def _said(line: str) -> str:
    return line.partition(" ")[2]


def _text(path: Path) -> str:
    """What an attempt has said."""
    return "".join(map(_said, _lines(path.read_bytes())))


def _by_age(path: Path) -> tuple[int, str]:
    return _node_of(path), path.name


def _node_of(path: Path) -> int:
    return int(path.name.split("-")[1])


def _node(pod: dict[str, Any]) -> int:
    return int(pod["metadata"].get("labels", {}).get(NODE, 0))


def _containers(pod: dict[str, Any]) -> list[dict[str, Any]]:
    return pod.get("status", {}).get("containerStatuses") or []


def _restarts(pod: dict[str, Any]) -> int:
    return sum(each.get("restartCount", 0) for each in _containers(pod))


def _between(pod: dict[str, Any]) -> bool:
    """Whether the last attempt has ended and the next has not begun: then it is `lastState`, and `previous`."""
    return any("waiting" in each.get("state", {}) for each in _containers(pod))


def _waits(pod: dict[str, Any]) -> tuple[str, str] | None:
    """Reason and message of a pod that does not run."""
    for each in _containers(pod):
        waiting = each.get("state", {}).get("waiting") or {}
        if waiting.get("reason", PASSING[0]) not in PASSING:
            return waiting["reason"], waiting.get("message", "")
    for each in pod.get("status", {}).get("conditions") or []:
        if each["type"] == "PodScheduled" and each["status"] == "False":
            return each.get("reason", ""), each.get("message", "")
    return None


def _killed(pod: dict[str, Any]) -> str:
    """How Kubernetes ended a pod; empty when it ended by itself."""
    if pod["status"].get("reason"):  # such as Evicted
        return f"ended by Kubernetes: {pod['status']['reason']}: {pod['status'].get('message', '')}".rstrip(": ")
    for each in _containers(pod):
        state = each.get("lastState" if _between(pod) else "state") or {}
        if (state.get("terminated") or {}).get("reason") == "OOMKilled":
            return "was killed because it used more memory than run.executor.memory"
    return ""


def _elapsed(begin: str | None, end: str | None) -> str:
    if begin is None:
        return "00:00:00"
    until = datetime.fromisoformat(end) if end else datetime.now(UTC)
    seconds = max(0, int((until - datetime.fromisoformat(begin)).total_seconds()))
    return f"{seconds // 3600:02}:{seconds // 60 % 60:02}:{seconds % 60:02}"
