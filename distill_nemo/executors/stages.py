"""An experiment whose tasks are seen, and that fails when one of them does."""

import contextlib
import shutil
import sys
from pathlib import Path
from typing import Any

import nemo_run as run
from invoke.exceptions import UnexpectedExit
from nemo_run.core.frontend.console.api import CONSOLE

from distill_nemo.executors.endings import why_it_ended
from distill_nemo.executors.interrupts import left_running
from distill_nemo.executors.screen import JobOutput
from distill_nemo.executors.slurm_jobs import SlurmJob


class Stages(run.Experiment):
    """Tasks of which one sees what their ranks say, and that exit 1 at the first that fails.

    NeMo-Run itself would go on after a failure and exit 0, and tells every step of its own.
    """

    def __enter__(self) -> "Stages":
        super().__enter__()
        return self

    @classmethod
    def titled(cls, title: str) -> "Stages":
        """Without NeMo-Run's own words."""
        return cls(title, clean_mode=True, enable_goodbye_message=False, log_level="ERROR", skip_status_at_exit=True)

    def run(self, **options: Any) -> None:
        """As NeMo-Run's.

        Raises:
            ValueError: in the scheduler's words, when it refuses a job.
        """
        try:
            super().run(**options)
        except UnexpectedExit as error:
            shutil.rmtree(self._exp_dir)
            said = (error.result.stderr or error.result.stdout).strip().splitlines()
            raise ValueError(f"`{error.result.command.split()[0]}` failed: {'; '.join(said[-2:])}") from None

    def _prepare(self, exist_ok: bool = False) -> None:
        CONSOLE.quiet, before = True, CONSOLE.quiet  # NeMo-Run tells how it sets its launcher
        try:
            super()._prepare(exist_ok)
        finally:
            CONSOLE.quiet = before

    def show(self) -> None:
        """Print the command and the batch script that would submit each task; nothing is left of it."""
        with contextlib.redirect_stdout(sys.stderr):
            self.dryrun(log=False, delete_exp_dir=False)
        try:
            jobs: list[Any] = list(self.jobs)
            for job in jobs:
                path = Path(self._exp_dir, f"{job.executor.job_name}_sbatch.sh")
                command = " ".join(job._dryrun_info.request.launch_cmd)
                print(f"# {command} {job.executor.tunnel.job_dir}/{path.name}")
                print(path.read_text())
        finally:
            shutil.rmtree(self._exp_dir)

    def _wait_for_jobs(self, jobs: list[Any]) -> None:
        on_slurm = [job for job in jobs if isinstance(job.executor, run.SlurmExecutor)]
        self._wait_here([job for job in jobs if job not in on_slurm])
        for job in on_slurm:
            print(submitted(SlurmJob.of(job), self._id), flush=True)
            watch(SlurmJob.of(job), self._id)

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


def submitted(job: SlurmJob, experiment: str) -> str:
    """The first line of a run on SLURM."""
    return f"{job.name}: submitted as job {job.id}, experiment {experiment}; logs in {job.folder}"


def watch(job: SlurmJob, experiment: str) -> None:
    """Show a job on SLURM until its end; exits 1 when it did not complete."""
    with left_running(f"job {job.id} goes on; `nemo distill cancel experiment={experiment}` ends it"):
        state = job.follow(sys.stdout)
    if state.name != "COMPLETED":
        print(f"{job.name}: job {job.id} {state}; logs in {job.folder}", file=sys.stderr)
        print(job.why(state), file=sys.stderr)
        sys.exit(1)
