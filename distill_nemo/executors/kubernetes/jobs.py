"""State, output and end of TrainJobs on a Kubernetes cluster."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from distill_nemo.executors.kubernetes.api import TRAIN_JOBS, answer_to
from distill_nemo.executors.kubernetes.pods import (
    PodLogs,
    containers,
    is_between,
    node_of,
    node_of_pod,
    restarts,
    text_of,
)
from distill_nemo.executors.watch.endings import RESUME, why_a_log_ended, why_nodes_ended
from distill_nemo.executors.watch.jobs import ClusterJob, UnseenError
from distill_nemo.executors.watch.screen import RankLines

JOB_LABEL = "jobset.sigs.k8s.io/jobset-name"  # label of a job's pods
STUCK_REASONS = (  # reasons for a container not to start that seldom go away
    "ErrImagePull ImagePullBackOff InvalidImageName ErrImageNeverPull ImageInspectError RegistryUnavailable "
    "CreateContainerConfigError CreateContainerError RunContainerError"
).split()
PASSING = ("ContainerCreating", "PodInitializing")


@dataclass
class State:
    """State of a job at one moment."""

    name: str  # Pending, Running, Suspended, Complete, Failed, Deleting, Deleted
    reason: str = ""  # for waiting, or Kubernetes' reason for its end
    elapsed: str = "00:00:00"
    num_pods: int = 0
    restarts: int = 0
    stuck: bool = False

    @property
    def ended(self) -> bool:
        """True when the job is over."""
        return self.name in ("Complete", "Failed", "Deleted")

    @property
    def completed(self) -> bool:
        """True when the job succeeded."""
        return self.name == "Complete"

    @property
    def waits(self) -> str:
        """Reason that the job, or one of its pods, does not run yet."""
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
    folder: str  # on this machine: the logs read so far
    _lines: dict[Path, RankLines] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._logs = PodLogs(self.executor, self.folder)

    @classmethod
    def of(cls, job: Any) -> "KubernetesJob":
        """Wrap a NeMo-Run job."""
        return cls(job.id, job.handle.rpartition("___")[2], job.executor, job.executor.job_dir)

    @classmethod
    def named(cls, executor: Any, name: str) -> "KubernetesJob":
        """Return the TrainJob of this name."""
        return cls(name, name, executor, executor.job_dir)

    def state(self) -> State:
        """Return the job's state.

        Raises:
            UnseenError: if Kubernetes does not answer.
        """
        api, where = self.executor._custom_objects_api, {"namespace": self.executor.namespace, "name": self.id}
        job = answer_to(api.get_namespaced_custom_object, **TRAIN_JOBS, **where)
        pods = self._pods()
        if job is None:
            return State("Deleting" if pods else "Deleted", num_pods=len(pods))
        true = {each["type"]: each for each in job.get("status", {}).get("conditions", []) if each["status"] == "True"}
        last = true.get("Complete") or true.get("Failed")
        elapsed = _elapsed(job["metadata"].get("creationTimestamp"), last and last.get("lastTransitionTime"))
        about: dict[str, Any] = {"elapsed": elapsed, "num_pods": len(pods), "restarts": sum(map(restarts, pods))}
        if last:
            return State(last["type"], last.get("reason", ""), **about)
        if "Suspended" in true:
            return State("Suspended", true["Suspended"].get("message", ""), **about)
        waiting = [(pod["metadata"]["name"], *why) for pod in pods if (why := _waits(pod))]
        running = any(pod["status"].get("phase") in ("Running", "Succeeded") for pod in pods)
        reason = f"{waiting[0][0]}: {waiting[0][1]}: {waiting[0][2]}".rstrip(": ") if waiting else ""
        stuck = any(why in STUCK_REASONS for _, why, _ in waiting)
        return State("Running" if running else "Pending", reason, stuck=stuck, **about)

    def new_lines(self) -> Iterator[str]:
        """Return the pods' output since the last call; with several nodes, each line begins with its node."""
        for path, lines in self._logs.new(self._pods()):
            for line in lines:
                yield f"node {node_of(path)} {line}" if self.executor.nnodes() > 1 else line

    new_text = new_lines

    def new_shown(self) -> Iterator[str]:
        """Return the ranks' output since the last call, filtered for the screen."""
        before: dict[int, Path] = {}
        for path, lines in self._logs.new(self._pods()):
            node = node_of(path)
            first_rank = node * self.executor.nproc_per_node()
            if path not in self._lines:
                if node in before:
                    why = why_a_log_ended(text_of(before[node]), first_rank)
                    yield f"{self.name}: node {node} is started again, because of {why}\n"
                self._lines[path] = RankLines(torchrun=True, first_rank=first_rank)
            yield from map(self._lines[path].shown, lines)
            before[node] = path

    def until_the_end(self) -> Iterator[str]:
        """Yield lines as they come, until the job has ended.

        Raises:
            UnseenError: as `watched`.
        """
        return (line for _, line in self.watched(self.new_lines) if line)

    def why(self, state: State) -> str:
        """Return the `error: ...` of a job that did not complete."""
        pods, unread = [], ""
        try:
            pods = self._pods()
            for _ in self._logs.new(pods):
                pass
        except UnseenError as error:
            unread = f"; not all of its logs could be read: {error}"
        # The newest log of each node that is not empty: a last attempt may be ended as soon as it begins.
        logs = {node_of(path): text for path in self._logs.kept() if (text := text_of(path)).strip()}
        saved = any("checkpoint written" in text for text in logs.values())
        resume = f"{'its ranks had saved; ' if saved else ''}{RESUME}"
        if state.name == "Deleted":
            return f"error: the TrainJob was deleted, by `cancel` or by somebody else; {resume}"
        if state.reason == "DeadlineExceeded":
            return f"error: it reached its time limit after {state.elapsed}; {resume}"
        if not state.ended:
            return f"error: it does not start: {state.reason}"
        for node, pod in {node_of_pod(pod): pod for pod in pods}.items():
            if killed := _killed(pod):
                return f"error: node {node} {killed}; {resume}"
        if not logs:
            none = "" if unread else "no rank started: "
            return f"error: {none}{state.reason}{unread}; `kubectl describe trainjob {self.id}` may tell more"
        devices = self.executor.nproc_per_node()
        return why_nodes_ended([(node * devices, text) for node, text in logs.items()]) + unread

    def cancel(self) -> None:
        """Delete the TrainJob: the ranks get SIGTERM, and the pods' grace period to save.

        Raises:
            RuntimeError: if Kubernetes refuses, with its message.
        """
        api, where = self.executor._custom_objects_api, {"namespace": self.executor.namespace, "name": self.id}
        try:
            answer_to(api.delete_namespaced_custom_object, **TRAIN_JOBS, **where)
        except UnseenError as error:
            raise RuntimeError(f"job {self.id} could not be deleted: {error}") from None

    def _pods(self) -> list[dict[str, Any]]:
        """Return the pods of the job's ranks, by node and age."""
        api, label = self.executor._core_v1_api, f"{JOB_LABEL}={self.id}"
        listed = answer_to(api.list_namespaced_pod, raw=True, namespace=self.executor.namespace, label_selector=label)
        return sorted(
            json.loads(listed or '{"items": []}')["items"],
            key=lambda pod: (node_of_pod(pod), pod["metadata"].get("creationTimestamp", "")),
        )


def _waits(pod: dict[str, Any]) -> tuple[str, str] | None:
    """Return the reason and message of a pod that does not run; None if it runs."""
    for each in containers(pod):
        waiting = each.get("state", {}).get("waiting") or {}
        if waiting.get("reason", PASSING[0]) not in PASSING:
            return waiting["reason"], waiting.get("message", "")
    for each in pod.get("status", {}).get("conditions") or []:
        if each["type"] == "PodScheduled" and each["status"] == "False":
            return each.get("reason", ""), each.get("message", "")
    return None


def _killed(pod: dict[str, Any]) -> str:
    """Describe how Kubernetes ended a pod; empty if it did not."""
    if pod["status"].get("reason"):  # such as Evicted
        return f"ended by Kubernetes: {pod['status']['reason']}: {pod['status'].get('message', '')}".rstrip(": ")
    for each in containers(pod):
        state = each.get("lastState" if is_between(pod) else "state") or {}
        if (state.get("terminated") or {}).get("reason") == "OOMKilled":
            return "was killed because it used more memory than run.executor.memory"
    return ""


def _elapsed(begin: str | None, end: str | None) -> str:
    if begin is None:
        return "00:00:00"
    until = datetime.fromisoformat(end) if end else datetime.now(UTC)
    seconds = max(0, int((until - datetime.fromisoformat(begin)).total_seconds()))
    return f"{seconds // 3600:02}:{seconds // 60 % 60:02}:{seconds % 60:02}"
