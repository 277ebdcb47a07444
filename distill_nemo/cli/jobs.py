"""Commands that work in this process, or on the ranks of an executor."""

from collections.abc import Callable
from typing import Any, ClassVar

import fiddle as fdl
import nemo_run as run

from distill_nemo.cli.arguments import check_complete, override, parse_arguments
from distill_nemo.cli.entrypoint import Command
from distill_nemo.cli.help import ON_RANKS, STORE, VERIFY, command_help, config_help
from distill_nemo.cli.launch import TrainContext
from distill_nemo.config import ExportConfig, JobConfig, PruneConfig, StoreConfig, VerifyConfig
from distill_nemo.executors.worker_config import job_config_of
from distill_nemo.writing.entry import verify


class JobContext(TrainContext):
    """Context of `train` for a function whose arguments are the fields of another config than a run's."""

    config: ClassVar[type[JobConfig]]

    def _execute_task(self, fn: Callable[..., Any], task_args: list[str]) -> None:
        self.launch_job(fn, task_args, fn.__name__, self.config)

    def launch_job(self, fn: Callable[..., Any], arguments: list[str], command: str, kind: type[JobConfig]) -> None:
        """Call `fn` in this process if no executor is named, else on its ranks."""
        values = parse_arguments(fn, arguments, command)
        check_complete(fn, values, command)
        task = run.Partial(fn)
        override(task, values)
        config = job_config_of(task, kind)
        if self.executor is None and not self.dryrun:
            fdl.build(task)()
        else:
            self.launch_task(task, config)


class ExportContext(JobContext):
    """Context of `export`."""

    config = ExportConfig


class TeacherContext(JobContext):
    """Context of `teacher` and of `teacher verify`."""

    def _execute_task(self, fn: Callable[..., Any], task_args: list[str]) -> None:
        if task_args[:1] == ["verify"]:
            self.launch_job(verify, task_args[1:], "teacher", VerifyConfig)
        else:
            self.launch_job(fn, task_args, "teacher", StoreConfig)


class TeacherCommand(Command):
    """`teacher`."""

    def page(self) -> str:
        """Return the text of `--help`."""
        written = config_help("teacher", self.fn, StoreConfig, STORE)
        sections = "teacher.*, parallelism.*, run.executor.*: as above"
        return f"{written}\n\n{config_help('teacher verify', verify, VerifyConfig, VERIFY, sections)}"


class PruneContext(JobContext):
    """Context of `prune`."""

    config = PruneConfig


class JobCommand(Command):
    """`export` and `prune`."""

    def page(self) -> str:
        """Return the text of `--help`."""
        return command_help(self.name, self.fn, ON_RANKS)
