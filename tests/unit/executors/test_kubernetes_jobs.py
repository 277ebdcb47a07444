"""State and logs of a TrainJob over real HTTP: several attempts, odd lines, several watchers, failing calls."""

import io
import socket
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from types import SimpleNamespace

import pytest
import yaml

from distill_nemo.executors import kubernetes
from distill_nemo.executors.kubernetes import api
from distill_nemo.executors.kubernetes import pods as kubernetes_pods
from distill_nemo.executors.kubernetes.api import Refused, created
from distill_nemo.executors.kubernetes.jobs import KubernetesJob, State
from distill_nemo.executors.kubernetes.pods import NODE_LABEL
from distill_nemo.executors.watch import jobs
from distill_nemo.executors.watch.jobs import MAX_UNSEEN_POLLS, UnseenError
from tests.launch.kubernetes.api import ApiError, serve

FAILED = State("Failed", "BackoffLimitExceeded")
KILLED = """\
[default0]:step 1/9
[default0]:stopped by signal 15; checkpoint written; the same command resumes
  rank      : 1 (local_rank: 1)
  exitcode  : -9 (pid: 77)
"""
NOT_FINITE = "[default0]:step 2/9\n[default0]:error: step 2: lm_loss is not finite\n"
GONE = "Get https://node-1:10250/containerLogs/default/p/node: dial tcp: i/o timeout"


@dataclass
class Pod:
    """A pod with one container."""

    cluster: "Cluster"
    name: str
    node: int = 0
    created: str = "2026-01-01T00:00:00Z"
    attempts: list[str] = field(default_factory=lambda: [""])  # logs of the attempts
    state: dict = field(default_factory=lambda: {"running": {}})
    last: dict = field(default_factory=dict)
    lost: bool = False  # together with its machine

    def says(self, text):
        self.attempts[-1] += "".join(f"{self.cluster.stamp()} {line}\n" for line in text.removesuffix("\n").split("\n"))

    def starts_again(self, text=""):
        self.attempts.append("")
        if text:
            self.says(text)

    def shown(self):
        about = {"name": self.name, "labels": {NODE_LABEL: str(self.node)}, "creationTimestamp": self.created}
        count = len(self.attempts) - 1
        status = {"name": "node", "restartCount": count, "state": self.state, "lastState": self.last}
        return {
            "metadata": about,
            "spec": {"containers": [{"name": "node"}]},
            "status": {"phase": "Running", "containerStatuses": [status]},
        }


@dataclass
class Cluster:
    """One TrainJob, as the API shows it."""

    pods: list[Pod] = field(default_factory=list)
    conditions: list[dict] = field(default_factory=list)
    now: float = 1_800_000_000.0
    looks: int = 0
    before_a_look: object = lambda cluster: None

    def pod(self, name="p", **about):
        self.pods.append(Pod(self, name, **about))
        return self.pods[-1]

    def stamp(self):
        self.now += 0.1
        return f"{datetime.fromtimestamp(self.now, UTC):%Y-%m-%dT%H:%M:%S.%f}000Z"

    def end(self, kind="Complete", reason="JobsCompleted"):
        self.conditions = [{"type": kind, "status": "True", "reason": reason}]

    def get(self, kind, namespace, name):
        self.looks += 1
        self.before_a_look(self)
        return {"metadata": {"creationTimestamp": "2026-01-01T00:00:00Z"}, "status": {"conditions": self.conditions}}

    def list(self, kind, namespace, selector):
        return [pod.shown() for pod in self.pods]

    def log(self, namespace, name, options):
        pod = next(pod for pod in self.pods if pod.name == name)
        if pod.lost:
            raise ApiError(500, "InternalError", GONE)
        attempt = len(pod.attempts) - 1 - (options["previous"] == "true")
        if attempt < 0:
            raise ApiError(400, "BadRequest", "previous terminated container not found")
        since = self.now - float(options.get("sinceSeconds", "inf"))
        when = lambda line: datetime.fromisoformat(f"{line[:26]}+00:00").timestamp()  # noqa: E731
        lines = pod.attempts[attempt].split("\n")
        return "\n".join(line for line in lines if not line.startswith("20") or when(line) >= since)


@pytest.fixture
def connect(tmp_path, monkeypatch):
    """Return a function that makes a watcher of a job, as a new process would, for the API at a port."""

    def job(port, nodes=1):
        cluster = {"name": "here", "cluster": {"server": f"http://127.0.0.1:{port}"}}
        context = {"name": "here", "context": {"cluster": "here", "user": "me"}}
        config = {"clusters": [cluster], "users": [{"name": "me", "user": {}}], "contexts": [context]}
        config |= {"apiVersion": "v1", "kind": "Config", "current-context": "here"}
        (tmp_path / "config").write_text(yaml.dump(config))
        monkeypatch.setenv("KUBECONFIG", str(tmp_path / "config"))
        executor = kubernetes(image="x", nodes=nodes, devices=2)
        return KubernetesJob("train", "train-1", executor, str(tmp_path / "logs"))

    monkeypatch.setattr(jobs, "POLL_SECONDS", 0)
    return job


@pytest.fixture
def cluster():
    return Cluster()


@pytest.fixture
def watcher(cluster, connect):
    server = serve(cluster)
    yield lambda nodes=1: connect(server.server_address[1], nodes)
    server.shutdown()
    server.server_close()


def kept(tmp_path):
    """Return the logs kept on this machine, without times, by the ends of their names."""
    files = sorted((tmp_path / "logs").iterdir())
    return {
        path.stem.rpartition("-")[2]: [line.partition(" ")[2] for line in path.read_text().splitlines()]
        for path in files
    }


# -- failing calls


def two_nodes(cluster, ends_at):
    """Show one more step of each node at every look at the job. Node 1 is lost from look 2 until `found`."""
    pods = [cluster.pod(f"p{node}", node=node) for node in (0, 1)]

    def look(cluster):
        for pod in pods:
            pod.says(f"[default0]:step {cluster.looks}")
        pods[1].lost = 2 <= cluster.looks < cluster.found
        if cluster.looks == ends_at:
            cluster.end()

    cluster.before_a_look = look


def steps(last, mark=""):
    return {f"{mark}step {step}" for step in range(1, last + 1)}


def test_a_log_that_is_not_shown_for_a_while_loses_and_repeats_no_line(cluster, watcher):
    cluster.found = 2 * MAX_UNSEEN_POLLS
    two_nodes(cluster, ends_at=cluster.found + 1)
    out = io.StringIO()
    assert watcher(2).follow(out).completed
    shown = out.getvalue().splitlines()
    assert set(shown) == steps(cluster.looks) | steps(cluster.looks, "rank 2: ") and len(shown) == 2 * cluster.looks


def test_a_log_that_is_not_shown_for_a_while_loses_no_line_for_nemo_run(cluster, watcher):
    cluster.found = 2 * MAX_UNSEEN_POLLS
    two_nodes(cluster, ends_at=cluster.found + 1)
    lines = list(watcher(2).until_the_end())
    assert len(set(lines)) == len(lines) == 2 * cluster.looks


def test_the_end_of_a_job_is_reported_even_if_its_logs_are_not(cluster, watcher):
    cluster.pod(lost=True)
    cluster.end("Failed", "BackoffLimitExceeded")
    job = watcher()
    state = job.follow(io.StringIO())
    assert (state.name, cluster.looks) == ("Failed", MAX_UNSEEN_POLLS)
    why = job.why(state)
    assert why.startswith("error: BackoffLimitExceeded; not all of its logs could be read: ") and GONE in why


def test_why_tells_what_could_be_read(cluster, watcher):
    cluster.pod("p0", lost=True)
    cluster.pod("p1", node=1).says(NOT_FINITE)
    why = watcher(2).why(FAILED)
    assert why.startswith("error: step 2: lm_loss is not finite; not all") and GONE in why


@pytest.mark.timeout(30)
def test_a_call_that_is_never_answered_ends(connect, monkeypatch):
    assert api.TIMEOUT == (10, 60)
    monkeypatch.setattr(api, "TIMEOUT", (1, 0.5))
    with socket.create_server(("127.0.0.1", 0)) as silent:
        job = connect(silent.getsockname()[1])
        pod = Pod(Cluster(), "p").shown()
        for call in (job.state, job._pods, lambda: job._logs._log(None, pod, False)):
            with pytest.raises(UnseenError, match=r"Kubernetes does not answer: .*timed out"):
                call()
        assert job.executor.status("train-1") is None, "NeMo-Run asks again"
        with pytest.raises(RuntimeError, match="could not be deleted: Kubernetes does not answer"):
            job.cancel()
        for kind in ("TrainJob", "ConfigMap", "PersistentVolumeClaim"):
            with pytest.raises(Refused, match="Kubernetes does not answer"):
                created(job.executor, {"kind": kind})
        silent.setblocking(False)
        for _ in range(8):
            silent.accept()[0].close()
        with pytest.raises(BlockingIOError):  # urllib3 would retry some of them up to four times
            silent.accept()


# -- attempts


def test_the_reason_is_the_last_attempts(cluster, watcher):
    pod, job = cluster.pod(), watcher()
    pod.says(KILLED)
    shown = list(job.new_shown())
    pod.starts_again(NOT_FINITE)
    shown += job.new_shown()
    again = [line for line in shown if "is started again" in line]
    assert len(again) == 1 and "node 0 is started again, because of error: rank 1 was killed by SIGKILL" in again[0]
    assert job.why(FAILED) == watcher().why(FAILED) == "error: step 2: lm_loss is not finite"
    assert "saved" not in job.why(State("Failed", "DeadlineExceeded"))


def test_the_reason_is_the_last_pods_of_a_node(cluster, watcher):
    cluster.pod("z", created="2026-01-01T00:00:00Z").says(KILLED)
    cluster.pod("a", created="2026-01-01T00:01:00Z").says(NOT_FINITE)
    job = watcher()
    (again,) = (line for line in job.new_shown() if "is started again" in line)
    assert "killed by SIGKILL" in again
    assert job.why(FAILED) == "error: step 2: lm_loss is not finite"


def test_an_attempt_that_is_ended_before_it_says_anything_is_not_the_reason(cluster, watcher):
    pod, job = cluster.pod(), watcher()
    pod.says(NOT_FINITE)
    pod.starts_again()
    assert job.why(FAILED) == "error: step 2: lm_loss is not finite"


def test_memory_that_an_earlier_attempt_lacked_is_not_the_reason(cluster, watcher):
    ended = {"terminated": {"reason": "OOMKilled", "exitCode": 137}}
    pod = cluster.pod(last=ended, state={"terminated": {"reason": "Error", "exitCode": 1}})
    pod.says(KILLED)
    pod.starts_again(NOT_FINITE)
    assert watcher().why(FAILED) == "error: step 2: lm_loss is not finite"
    pod.state = {"waiting": {"reason": "CrashLoopBackOff"}}
    assert watcher().why(FAILED).startswith("error: node 0 was killed because it used more memory")


def test_what_waits_to_be_started_again_is_its_own_previous(cluster, watcher, tmp_path, monkeypatch):
    pod = cluster.pod(last={"terminated": {}}, state={"waiting": {"reason": "CrashLoopBackOff"}})
    pod.starts_again("[default0]:step 2")
    monkeypatch.setattr(cluster, "log", lambda *_: pod.attempts[-1])
    assert list(watcher().new_text()) == ["[default0]:step 2\n"] and list(kept(tmp_path)) == ["001"]


# -- lines


@pytest.mark.parametrize("odd", ["a\fb", "a\vb", "a\x85b", "a\u2028b", "a\rb", "", "a\u2028"])
def test_only_a_line_feed_ends_a_line(cluster, watcher, odd):
    pod, job = cluster.pod(), watcher()
    pod.says(f"[default0]:{odd}")
    assert list(job.new_shown()) == [f"{odd}\n"]
    pod.says("[default0]:step 1\r")
    assert list(job.new_shown()) == ["step 1\n"]
    assert list(watcher().new_shown()) == [f"{odd}\n", "step 1\n"], "as it was kept"


def test_what_is_no_whole_line_of_a_container(cluster, watcher):
    pod, job = cluster.pod(), watcher()
    pod.attempts[0] = "unable to retrieve container logs for containerd://1\n"
    pod.says("[default0]:step 1")
    pod.attempts[0] += f"{cluster.stamp()} [default0]:st"
    assert list(job.new_shown()) == ["step 1\n"]
    pod.attempts[0] += "ep 2\n"
    assert list(job.new_shown()) == ["step 2\n"]
    pod.attempts[0] += f"{cluster.stamp()} [default0]:last words"
    pod.state = {"terminated": {}}
    assert list(job.new_shown()) == ["last words\n"]


def test_what_was_said_while_the_watching_laptop_slept(cluster, watcher, monkeypatch):
    clock = SimpleNamespace(monotonic=lambda: 1.0, time=lambda: cluster.now, sleep=time.sleep)
    monkeypatch.setattr(kubernetes_pods, "time", clock)
    pod, job = cluster.pod(), watcher()
    pod.says("[default0]:step 1")
    shown = list(job.new_shown())
    pod.says("[default0]:step 2")
    cluster.now += 3600
    assert [*shown, *job.new_shown()] == ["step 1\n", "step 2\n"]


# -- other watchers


def test_what_one_process_kept_another_leaves_and_goes_on_with(cluster, watcher, tmp_path):
    pod = cluster.pod()
    pod.says("[default0]:step 1")
    first = watcher()
    list(first.new_shown())
    pod.attempts[0] = ""  # rotated away
    pod.says("[default0]:step 2")
    second = watcher()
    assert list(second.new_text()) == ["[default0]:step 1\n", "[default0]:step 2\n"]
    assert list(first.new_shown()) == ["step 2\n"]
    pod.says("[default0]:step 3")
    assert [*first.new_shown(), *second.new_shown()] == ["step 3\n", "step 3\n"]
    assert kept(tmp_path) == {"000": ["[default0]:step 1", "[default0]:step 2", "[default0]:step 3"]}
    assert list(second.new_text()) == list(first.new_text()) == []


def test_every_attempt_is_shown_also_when_its_pod_is_gone(cluster, watcher, tmp_path):
    pod = cluster.pod()
    pod.says("[default0]:step 1")
    list(watcher().new_text())
    pod.says("[default0]:step 2")
    pod.starts_again("[default0]:step 3")
    pod.starts_again("[default0]:step 4")
    both = [f"[default0]:step {step}\n" for step in (1, 3, 4)]
    assert list(watcher().new_text()) == both, "the end of the first is two restarts ago"
    again = [line for line in watcher().new_shown() if line.startswith("train: node 0 is started again")]
    assert len(again) == 2
    cluster.pods.clear()
    assert list(watcher().new_text()) == both
    assert kept(tmp_path) == {f"{attempt:03}": [line.strip()] for attempt, line in enumerate(both)}
