"""An experiment whose tasks are seen, and that fails when one of them does."""

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

from distill_nemo.executors.known import cluster_job, descriptor_of
from distill_nemo.executors.kubernetes.api import Refused
from distill_nemo.executors.watch.endings import why_it_ended
from distill_nemo.executors.watch.interrupts import left_running
from distill_nemo.executors.watch.jobs import ClusterJob
from distill_nemo.executors.watch.screen import JobOutput


class WatchedExperiment(run.Experiment):
    """Tasks of which one sees what their ranks say, and that exit 1 at the first that fails.

    NeMo-Run itself would go on after a failure and exit 0, and tells every step of its own.
    """

    def __enter__(self) -> "WatchedExperiment":
        super().__enter__()
        return self

    @classmethod
    def titled(cls, title: str) -> "WatchedExperiment":
        """Without NeMo-Run's own words.

        Raises:
            ValueError: if NeMo-Run's records cannot be written where it keeps them.
        """
        _check_home(Path(get_nemorun_home()))
        return cls(title, clean_mode=True, enable_goodbye_message=False, log_level="ERROR", skip_status_at_exit=True)

    def run(self, **options: Any) -> None:
        """Run as NeMo-Run does.

        Raises:
            ValueError: in its words, when a cluster refuses a job.
        """
        try:
            super().run(**options)
        except UnexpectedExit as error:
            shutil.rmtree(self._exp_dir)
            said = (error.result.stderr or error.result.stdout).strip().splitlines()
            raise ValueError(f"`{error.result.command.split()[0]}` failed: {'; '.join(said[-2:])}") from None
        except Refused:
            shutil.rmtree(self._exp_dir)
            raise

    def _prepare(self, exist_ok: bool = False) -> None:
        CONSOLE.quiet, before = True, CONSOLE.quiet  # NeMo-Run tells how it sets its launcher
        try:
            super()._prepare(exist_ok)
        finally:
            CONSOLE.quiet = before

    def show(self) -> None:
        """Print the manifest of each task, as its descriptor makes it; leave nothing behind."""
        with contextlib.redirect_stdout(sys.stderr):
            self.dryrun(log=False, delete_exp_dir=False)
        try:
            for job in typing.cast(list[Any], self.jobs):
                manifest = descriptor_of(job.executor).manifest
                assert manifest is not None, "an executor of a cluster of ours"
                print(manifest(job, Path(self._exp_dir)))
        finally:
            shutil.rmtree(self._exp_dir)

    def _wait_for_jobs(self, jobs: list[Any]) -> None:
        self._wait_here([job for job in jobs if cluster_job(job) is None])
        for job in filter(None, map(cluster_job, jobs)):
            watch(job, self._id, submitted(job, self._id) + "\n")

    def _wait_here(self, jobs: list[Any]) -> None:
        if not jobs:
            return
        for job in jobs:
            print(f"{job.id}: started; logs in {job.executor.job_dir}", flush=True)
        out: Any = JobOutput(sys.stdout, jobs)
        with contextlib.redirect_stdout(out):
            super()._wait_for_jobs(jobs)
        for job in jobs:
            if str(job.state) != "SUCCEEDED":
                print(f"{job.id}: {job.state}; logs in {job.executor.job_dir}", file=sys.stderr)
                print(why_it_ended(Path(job.executor.job_dir)), file=sys.stderr)
                sys.exit(1)


def _check_home(home: Path) -> None:
    why = ""
    try:
        home.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        why = f"cannot be made: {error.strerror}"
    if not why and not os.access(home, os.W_OK | os.X_OK):
        why = "cannot be written"
    elif not why and shlex.quote(str(home)) != str(home):
        why = "has characters that NeMo-Run does not quote"
    if why:
        raise ValueError(f"NeMo-Run keeps its records in {home}, which {why}; set NEMORUN_HOME to another directory")


def submitted(job: ClusterJob, experiment: str) -> str:
    """The first line of a run on a cluster."""
    return f"{job.name}: submitted as job {job.id}, experiment {experiment}; logs in {job.folder}"


def watch(job: ClusterJob, experiment: str, first: str = "") -> None:
    """Say `first`, and show a job until its end; exits 1 when it did not complete, or cannot start."""
    with left_running(f"job {job.id} goes on; `nemo distill cancel experiment={experiment}` ends it"):
        print(first, end="", flush=True)
        state = job.follow(sys.stdout)
    if not state.completed:
        print(f"{job.name}: job {job.id} {state}; logs in {job.folder}", file=sys.stderr)
        print(job.why(state), file=sys.stderr)
        if not state.ended:
            print(f"it still waits; `nemo distill cancel experiment={experiment}` ends it", file=sys.stderr)
        sys.exit(1)
