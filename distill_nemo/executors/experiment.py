"""A NeMo-Run experiment that shows its ranks' output and fails when a task fails."""

import contextlib
import os
import shlex
import shutil
import sys
import typing
from pathlib import Path
from typing import Any

import nemo_run as run
from invoke.exceptions import UnexpectedExit
from nemo_run.config import get_nemorun_home
from nemo_run.core.frontend.console.api import CONSOLE
from nemo_run.run.torchx_backend.launcher import ContextThread
from torchx.specs.api import is_terminal

from distill_nemo.executors.known import cluster_job, descriptor_of
from distill_nemo.executors.kubernetes.api import Refused
from distill_nemo.executors.watch.endings import why_it_ended
from distill_nemo.executors.watch.interrupts import left_running, signalled
from distill_nemo.executors.watch.jobs import ClusterJob
from distill_nemo.executors.watch.screen import JobOutput


class WatchedExperiment(run.Experiment):
    """Experiment that prints the output of its ranks and exits with 1 at the first task that fails.

    NeMo-Run's own continues after a failure, exits with 0, and logs each of its internal steps.
    """

    _beside: str | None = None  # id of the job beside the first one
    _advice = ""

    def __enter__(self) -> "WatchedExperiment":
        super().__enter__()
        return self

    @classmethod
    def titled(cls, title: str) -> "WatchedExperiment":
        """Make an experiment that hides NeMo-Run's own messages.

        Raises:
            ValueError: if the directory of NeMo-Run's records is not writable.
        """
        _check_home(Path(get_nemorun_home()))
        return cls(title, clean_mode=True, enable_goodbye_message=False, log_level="ERROR", skip_status_at_exit=True)

    def add_beside(self, task: run.Partial, executor: run.Executor, name: str, advice: str, **options: Any) -> None:
        """Add a job beside the first one. It is ended if that fails; its own failure is reported when that has ended.

        Args:
            task: what it runs.
            executor: as the descriptor's `beside` returns it.
            name: of the job.
            advice: what to do if it alone fails.
            options: as of `add`.
        """
        before = [self.jobs[0].id] if descriptor_of(executor).waits_for_the_first else None
        self._beside = self.add(task, executor=executor, name=name, dependencies=before, **options)
        self._advice = advice

    def run(self, **options: Any) -> None:
        """Run as NeMo-Run does.

        Raises:
            ValueError: if a cluster refuses a job, with the cluster's message. Jobs before it are cancelled.
        """
        try:
            super().run(**options)
        except UnexpectedExit as error:
            self._withdraw()
            output = (error.result.stderr or error.result.stdout).strip().splitlines()
            raise ValueError(f"`{error.result.command.split()[0]}` failed: {'; '.join(output[-2:])}") from None
        except Refused:
            self._withdraw()
            raise

    def _withdraw(self) -> None:
        """Cancel the jobs that were submitted before one was refused, and remove their files."""
        for job in filter(None, map(cluster_job, self.jobs)):
            with contextlib.suppress(RuntimeError):  # the cluster's refusal is what the user must see
                if not job.state().ended:
                    job.cancel()
        shutil.rmtree(self._exp_dir)

    def _prepare(self, exist_ok: bool = False) -> None:
        CONSOLE.quiet, before = True, CONSOLE.quiet  # NeMo-Run reports which launcher it sets
        try:
            super()._prepare(exist_ok)
        finally:
            CONSOLE.quiet = before

    def show(self) -> None:
        """Print the manifest of each task and leave nothing on disk."""
        with contextlib.redirect_stdout(sys.stderr):
            self.dryrun(log=False, delete_exp_dir=False)
        try:
            for job in typing.cast(list[Any], self.jobs):
                manifest = descriptor_of(job.executor).manifest
                assert manifest is not None, "only executors with manifests are shown"
                if job.id == self._beside:
                    print(f"# {job.id}, beside {self.jobs[0].id}")
                elif job.dependencies:
                    print(f"# {job.id}, after {' and '.join(job.dependencies)}")
                print(manifest(job, Path(self._exp_dir)))
        finally:
            shutil.rmtree(self._exp_dir)

    def _wait_for_jobs(self, jobs: list[Any]) -> None:
        self._wait_here([job for job in jobs if cluster_job(job) is None])
        for job in filter(None, map(cluster_job, jobs)):
            beside = [] if job.name == self._beside else self._jobs_beside()
            shown = [] if job.name == self._beside else [job, *beside]
            state = watch(job, self._id, "".join(submission_line(each, self._id) + "\n" for each in shown))
            if state.completed:
                continue
            for other in beside if state.ended else []:
                with contextlib.suppress(RuntimeError):  # it ends by itself a little later
                    other.cancel()
                    print(f"{other.name}: job {other.id} cancelled with it", file=sys.stderr)
            if job.name == self._beside:
                print(self._advice, file=sys.stderr)
            sys.exit(1)

    def _jobs_beside(self) -> list[ClusterJob]:
        return [job for job in map(cluster_job, self.jobs) if job is not None and job.name == self._beside]

    def _wait_here(self, jobs: list[Any]) -> None:
        if not jobs:
            return
        for job in jobs:
            print(f"{job.id}: started; logs in {job.executor.job_dir}", flush=True)
        out: Any = JobOutput(sys.stdout, jobs)
        with contextlib.redirect_stdout(out):
            self._wait_until_all_end(jobs)
        for job in jobs:
            if str(job.state) != "SUCCEEDED":
                print(f"{job.id}: {job.state}; logs in {job.executor.job_dir}", file=sys.stderr)
                print(why_it_ended(Path(job.executor.job_dir)), file=sys.stderr)
                if job.id == self._beside:
                    print(self._advice, file=sys.stderr)
                sys.exit(1)

    def _wait_until_all_end(self, jobs: list[Any]) -> None:
        """Wait as NeMo-Run does, but end the job beside the first one if that fails."""
        wait = super()._wait_for_jobs
        beside = [job for job in jobs if job.id == self._beside]
        first = [job for job in jobs if job.id != self._beside]

        def wait_for(job: Any) -> None:
            wait([job])
            if str(job.state) != "SUCCEEDED" and not is_terminal(first[0].state) and not signalled.is_set():
                print(f"{job.id}: {job.state}; {first[0].id} goes on", file=sys.stderr)
                print(why_it_ended(Path(job.executor.job_dir)), file=sys.stderr, flush=True)

        threads = [ContextThread(target=wait_for, args=(job,)) for job in beside]
        for thread in threads:
            thread.start()
        wait(first)
        for job, thread in zip(beside, threads, strict=True):
            if str(first[0].state) != "SUCCEEDED":
                job.cancel(self._runner)
            thread.join()


def _check_home(home: Path) -> None:
    problem = ""
    try:
        home.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        problem = f"cannot be made: {error.strerror}"
    if not problem and not os.access(home, os.W_OK | os.X_OK):
        problem = "cannot be written"
    elif not problem and shlex.quote(str(home)) != str(home):
        problem = "has characters that NeMo-Run does not quote"
    if problem:
        raise ValueError(
            f"NeMo-Run keeps its records in {home}, which {problem}; set NEMORUN_HOME to another directory"
        )


def submission_line(job: ClusterJob, experiment: str) -> str:
    """Return the first line that a run on a cluster prints."""
    return f"{job.name}: submitted as job {job.id}, experiment {experiment}; logs in {job.folder}"


def watch(job: ClusterJob, experiment: str, first: str = "") -> Any:
    """Print `first`, then the job's output until its end. Say why if it does not complete. Return its last state."""
    with left_running(f"job {job.id} continues; `nemo distill cancel experiment={experiment}` ends it"):
        print(first, end="", flush=True)
        state = job.follow(sys.stdout)
    if not state.completed:
        print(f"{job.name}: job {job.id} {state}; logs in {job.folder}", file=sys.stderr)
        print(job.why(state), file=sys.stderr)
        if not state.ended:
            print(f"it is still queued; `nemo distill cancel experiment={experiment}` ends it", file=sys.stderr)
    return state
