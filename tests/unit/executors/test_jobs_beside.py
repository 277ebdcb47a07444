"""Two jobs on a cluster, one beside the other: which is cancelled, and what the command says."""

from dataclasses import dataclass

import pytest

from distill_nemo.executors import WatchedExperiment, experiment
from distill_nemo.executors.watch.jobs import ClusterJob


@dataclass
class State:
    """Every state of a job at once."""

    completed: bool = True
    ended: bool = True
    stuck: bool = False
    waits: str = ""

    def __str__(self):
        return "COMPLETED" if self.completed else "FAILED"


class Job(ClusterJob):
    """A job that has ended, or waits for ever, when it is first asked."""

    def __init__(self, name, state):
        self.name, self.id, self.folder, self._state, self.cancelled = name, f"id of {name}", "logs", state, False

    def state(self):
        return self._state

    def new_text(self):
        yield from ()

    def new_shown(self):
        yield f"output of {self.name}\n"

    def why(self, state):
        return f"error: {self.name} failed"

    def cancel(self):
        self.cancelled = True


@pytest.fixture
def wait(monkeypatch, capsys):
    """Return a function that waits for a run and its benchmarks. It returns exit code, output, cancelled jobs."""
    monkeypatch.setattr(experiment, "cluster_job", lambda job: job)
    monkeypatch.setattr("distill_nemo.executors.watch.jobs.POLL_SECONDS", 0.0)

    def waiting(run, benchmarks):
        jobs = [Job("train", run), Job("train-benchmarks", benchmarks)]
        watched = WatchedExperiment.__new__(WatchedExperiment)
        watched._jobs, watched._id, watched._beside, watched._advice = jobs, "x", "train-benchmarks", "what to do"
        code = 0
        try:
            watched._wait_for_jobs(jobs)
        except SystemExit as ended:
            code = ended.code
        return code, capsys.readouterr(), [job.name for job in jobs if job.cancelled]

    return waiting


def test_both_are_announced_and_followed_one_after_the_other(wait):
    code, (out, err), cancelled = wait(State(), State())
    assert (code, err, cancelled) == (0, "", [])
    lines = [line.split(";")[0] for line in out.splitlines()]
    assert lines == [
        "train: submitted as job id of train, experiment x",
        "train-benchmarks: submitted as job id of train-benchmarks, experiment x",
        "output of train",
        "output of train-benchmarks",
    ]


def test_the_benchmarks_of_a_run_that_fails_are_cancelled(wait):
    code, (_, err), cancelled = wait(State(completed=False), State(completed=False, ended=False))
    assert (code, cancelled) == (1, ["train-benchmarks"])
    assert err.splitlines()[1:] == [
        "error: train failed",
        "train-benchmarks: job id of train-benchmarks cancelled with it",
    ]


def test_a_run_that_cannot_start_yet_keeps_its_benchmarks_in_the_queue(wait):
    code, (_, err), cancelled = wait(State(completed=False, ended=False, stuck=True), State(ended=False))
    assert (code, cancelled) == (1, []) and "it is still queued" in err


def test_benchmarks_that_fail_are_told_when_the_run_has_ended(wait):
    code, (out, err), cancelled = wait(State(), State(completed=False))
    assert (code, cancelled) == (1, []) and "output of train\n" in out
    assert err.splitlines()[1:] == ["error: train-benchmarks failed", "what to do"]
