"""TrainJobs on a Kubernetes cluster: how they are, what their pods say, and their end."""

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from distill_nemo.executors.cluster_jobs import INTERVAL, ClusterJob, UnseenError
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
    _asked: dict[str, float] = field(default_factory=dict)  # pod -> when
    _lines: dict[str, RankLines] = field(default_factory=dict)
    _restarts: dict[str, int] = field(default_factory=dict)

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
        job = asked(lambda: api.get_namespaced_custom_object(**TRAIN_JOBS, **where))
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
        for pod in self._pods():
            for line in self._new(pod):
                yield f"node {_node(pod)} {line}" if self.executor.nnodes() > 1 else line

    new_text = new_lines

    def new_shown(self) -> Iterator[str]:
        """What the ranks have said since the last call, as it is shown."""
        for pod in self._pods():
            name, first_rank = pod["metadata"]["name"], _node(pod) * self.executor.nproc_per_node()
            before = self._restarts.get(name, 0)
            if _restarts(pod) > before and name in self._lines:
                for line in self._new(pod, previous=True):
                    yield self._lines[name].shown(line)
                why = why_a_log_ended("".join(line for _, line in self._log(pod, previous=True)), first_rank)
                yield f"{self.name}: node {_node(pod)} is started again, because of {why}\n"
            if _restarts(pod) > before or name not in self._lines:
                self._lines[name] = RankLines(torchrun=True, first_rank=first_rank)
                self._restarts[name] = _restarts(pod)
            for line in self._new(pod):
                yield self._lines[name].shown(line)

    def until_the_end(self) -> Iterator[str]:
        """Lines as they come."""
        ended = False
        while not ended:
            ended = self.state().ended
            yield from self.new_lines()
            time.sleep(0 if ended else INTERVAL)

    def why(self, state: State) -> str:
        """`error: ...` of a job that did not complete."""
        pods = self._pods()
        for pod in pods:
            list(self._new(pod))
        logs = {path: path.read_text() for path in sorted(Path(self.folder).glob("log-*.out"))}
        saved = any("checkpoint written" in text for text in logs.values())
        comes_back = f"{'its ranks had saved; ' if saved else ''}{COMES_BACK}"
        if state.name == "Deleted":
            return f"error: the TrainJob was deleted, by `cancel` or by somebody else; {comes_back}"
        if state.reason == "DeadlineExceeded":
            return f"error: it ran into its time limit after {state.elapsed}; {comes_back}"
        if not state.ended:
            return f"error: it does not start: {state.reason}"
        for pod in pods:
            if said := _killed(pod):
                return f"error: node {_node(pod)} {said}; {comes_back}"
        if not "".join(logs.values()).strip():
            return f"error: no rank started: {state.reason}; `kubectl describe trainjob {self.id}` may tell more"
        devices = self.executor.nproc_per_node()
        return why_nodes_ended([(int(path.stem.split("-")[1]) * devices, text) for path, text in logs.items()])

    def cancel(self) -> None:
        """Delete it: the ranks get SIGTERM, and the time that the pods are given to save.

        Raises:
            RuntimeError: in Kubernetes' words, when it does not.
        """
        api, where = self.executor._custom_objects_api, {"namespace": self.executor.namespace, "name": self.id}
        try:
            asked(lambda: api.delete_namespaced_custom_object(**TRAIN_JOBS, **where))
        except UnseenError as error:
            raise RuntimeError(f"job {self.id} could not be deleted: {error}") from None

    def _pods(self) -> list[dict[str, Any]]:
        """Those of its ranks, by node and age."""
        api, label = self.executor._core_v1_api, f"{OF_JOB}={self.id}"
        where = {"namespace": self.executor.namespace, "label_selector": label, "_preload_content": False}
        listed = asked(lambda: json.loads(api.list_namespaced_pod(**where).data)) or {"items": []}
        return sorted(listed["items"], key=lambda pod: (_node(pod), pod["metadata"].get("creationTimestamp", "")))

    def _new(self, pod: dict[str, Any], previous: bool = False) -> Iterator[str]:
        """The lines that are new; kept in `folder` too, because a pod's log goes with the pod."""
        name = pod["metadata"]["name"]
        path = Path(self.folder, f"log-{_node(pod)}-{name}.out")
        first = name not in self._last
        lines = [(stamp, line) for stamp, line in self._log(pod, previous) if stamp > self._last.get(name, "")]
        if lines:
            self._last[name] = lines[-1][0]
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("w" if first else "a") as file:
                file.writelines(line for _, line in lines)
        yield from (line for _, line in lines)

    def _log(self, pod: dict[str, Any], previous: bool = False) -> list[tuple[str, str]]:
        """The last lines of a pod, at least those since the last call, each with its time."""
        name, container = pod["metadata"]["name"], pod["spec"]["containers"][0]["name"]
        options: dict[str, Any] = {"container": container, "timestamps": True, "previous": previous}
        if name in self._last and not previous:
            options["since_seconds"] = int(time.monotonic() - self._asked[name]) + OVERLAP
        now, api = time.monotonic(), self.executor._core_v1_api
        call = {"name": name, "namespace": self.executor.namespace, "_preload_content": False, **options}
        data = asked(lambda: api.read_namespaced_pod_log(**call).data)
        if data is None:
            return []
        self._asked[name] = now
        stamped = (line.partition(" ") for line in data.decode(errors="replace").splitlines())
        return [(_sortable(stamp), f"{line}\n") for stamp, _, line in stamped]


def _node(pod: dict[str, Any]) -> int:
    return int(pod["metadata"].get("labels", {}).get(NODE, 0))


def _containers(pod: dict[str, Any]) -> list[dict[str, Any]]:
    return pod.get("status", {}).get("containerStatuses") or []


def _restarts(pod: dict[str, Any]) -> int:
    return sum(each.get("restartCount", 0) for each in _containers(pod))


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
        for state in (each.get("state") or {}, each.get("lastState") or {}):
            if (state.get("terminated") or {}).get("reason") == "OOMKilled":
                return "was killed because it used more memory than run.executor.memory"
    return ""


def _sortable(stamp: str) -> str:
    """A time of Kubernetes' logs, with all its nine decimals."""
    seconds, _, fraction = stamp.rstrip("Z").partition(".")
    return f"{seconds}.{fraction:0<9}"


def _elapsed(begin: str | None, end: str | None) -> str:
    if begin is None:
        return "00:00:00"
    until = datetime.fromisoformat(end) if end else datetime.now(UTC)
    seconds = max(0, int((until - datetime.fromisoformat(begin)).total_seconds()))
    return f"{seconds // 3600:02}:{seconds // 60 % 60:02}:{seconds % 60:02}"
