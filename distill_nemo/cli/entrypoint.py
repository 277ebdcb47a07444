"""Base class of the commands of `nemo distill`, and their registration with NeMo-Run."""

from collections.abc import Callable
from typing import Any, Literal

import nemo_run as run
import typer
from nemo_run.cli.api import Entrypoint

from distill_nemo.cli.arguments import check_complete, parse_arguments
from distill_nemo.cli.help import Group, command_class, command_help, summary
from distill_nemo.runtime.errors import errors_in_one_screen


class Command(Entrypoint):
    """A command with a help page of its own, which prints a user's error as one line instead of a traceback.

    Attributes:
        words: field that takes the arguments without "="; None: they are refused.
    """

    words: str | None = None

    def cli(self, parent: Any) -> None:
        """Add the command to the group `distill`."""
        parent.info.cls = Group
        self._add_command(parent)

    def _add_executor_command(self, parent: Any, is_main: bool = False, cmd_defaults: Any = None) -> Any:
        options: dict[str, Any] = {"type": self.type, "is_main": is_main, "cmd_defaults": cmd_defaults}
        about = {"help": summary(self.fn), "cls": command_class(self.page)}
        return self.run_ctx_cls.cli_command(parent, self.name, self.fn, command_kwargs=about, **options)

    def _add_simple_command(self, typer_instance: Any, is_main: bool = False) -> None:
        settings = {"allow_extra_args": True, "ignore_unknown_options": True}

        @typer_instance.command(
            self.name, help=summary(self.fn), cls=command_class(self.page), context_settings=settings
        )
        def command(ctx: typer.Context) -> None:
            with errors_in_one_screen():
                values = parse_arguments(self.fn, ctx.args, self.name, self.words)
                check_complete(self.fn, values, self.name)
                self.fn(**values)

    def page(self) -> str:
        """Return the text of `--help`."""
        return command_help(self.name, self.fn)


def register(
    function: Callable[..., Any],
    name: str | None = None,
    context: type[run.cli.RunContext] | None = None,
    kind: Literal["task", "experiment"] = "task",
    command: type[Command] = Command,
) -> None:
    """Make a function a command of `nemo distill`.

    Args:
        function: its arguments are the command's fields.
        name: name of the command; None for the function's.
        context: launches what the function describes; None calls the function in this process.
        kind: "task" launches the function itself, "experiment" calls it with the context.
        command: provides the page of `--help`.
    """
    run.cli.entrypoint(
        function,
        name=name,
        namespace="distill",
        type=kind,
        enable_executor=context is not None,
        run_ctx_cls=context,
        entrypoint_cls=command,
    )
