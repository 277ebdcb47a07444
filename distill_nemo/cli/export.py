"""`nemo distill export`: in this process, or on the ranks of an executor."""

from collections.abc import Callable
from typing import Any

import fiddle as fdl
import nemo_run as run

from distill_nemo.cli.arguments import check_complete, override, parse_arguments
from distill_nemo.cli.entrypoint import Command
from distill_nemo.cli.help import EXPORT, command_help
from distill_nemo.cli.launch import TrainContext
from distill_nemo.config import ExportConfig


class ExportContext(TrainContext):
    """Context of `train` for a function whose arguments are those of `ExportConfig`."""

    def _execute_task(self, fn: Callable[..., Any], task_args: list[str]) -> None:
        values = parse_arguments(fn, task_args, "export")
        check_complete(fn, values, "export")
        task = run.Partial(fn, parallelism=None)
        override(task, values)
        call = fdl.build(task)
        if self.executor is None and not self.dryrun:
            call()
        else:
            self.launch_task(task, ExportConfig(**call.keywords))


class ExportCommand(Command):
    """`export`."""

    def page(self) -> str:
        """Return the text of `--help`."""
        return command_help(self.name, self.fn, EXPORT)
