"""Status, logs and cancellation of cluster jobs after the submitting command has returned, by experiment id."""

import sys
from pathlib import Path
from typing import Any

import nemo_run as run
from nemo_run.config import get_nemorun_home

from distill_nemo.executors.experiment import WatchedExperiment, submission_line, watch
from distill_nemo.executors.known import cluster_job
from distill_nemo.executors.watch.jobs import ClusterJob
from distill_nemo.fields import suggest


def print_submitted(experiment: WatchedExperiment) -> None:
    """Print what was submitted and how to follow it. A local run has already been waited for and prints nothing."""
    jobs = _cluster_jobs(experiment)
    for job in jobs:
        print(submission_line(job, experiment._id))
    if jobs:
        print(f"see to it with `nemo distill status|logs|cancel experiment={experiment._id}`")


def status(experiment: str) -> None:
    """Print a line for each job. Exit with 1 if one has ended without completing."""
    failed = False
    for job in _jobs(experiment):
        state = job.state()
        print(f"{job.name}: job {job.id} {state}; logs in {job.folder}")
        if state.ended and not state.completed:
            failed = True
            print(job.why(state), file=sys.stderr)
    if failed:
        sys.exit(1)


def logs(experiment: str, follow: bool = False) -> None:
    """Print the output of the ranks. With `follow`, continue until the end and exit with the run's exit code."""
    for job in _jobs(experiment):
        if follow:
            if not watch(job, experiment).completed:
                sys.exit(1)
        else:
            for text in job.new_text():
                print(text, end="")


def cancel(experiment: str) -> None:
    """Cancel the jobs that have not ended."""
    for job in _jobs(experiment):
        state = job.state()
        if state.ended:
            print(f"{job.name}: job {job.id} had already ended: {state}")
        else:
            job.cancel()
            print(f"{job.name}: job {job.id} cancelled; it was {state}")


def _jobs(experiment: str) -> list[ClusterJob]:
    jobs = _cluster_jobs(_open(experiment))
    if not jobs:
        raise ValueError(f"experiment {experiment} has no jobs on a cluster: a local run ends with its command")
    return jobs


def _open(experiment: str) -> run.Experiment:
    root = Path(get_nemorun_home(), "experiments")
    directory = root / experiment.rpartition("_")[0] / experiment
    if not (directory / "_CONFIG").is_file():
        newest = sorted(root.glob("*/*/_TASKS"), key=lambda path: path.stat().st_mtime, reverse=True)
        known = suggest(experiment, [path.parent.name for path in newest[:5]]) if newest else " There are none."
        raise ValueError(f'no experiment "{experiment}" in {root}.{known}')
    return run.Experiment.from_id(experiment)


def _cluster_jobs(experiment: Any) -> list[ClusterJob]:
    return [job for job in map(cluster_job, experiment.jobs) if job is not None]
