"""The commands of `nemo distill`. Light at import: torch's and Megatron's work happens in the worker.

A recipe is a `run.Partial(distill, ...)`. `train` launches one through NeMo-Run and, unlike NeMo-Run's own task
commands, exits non-zero when a rank fails.
"""

import re
import warnings
from collections.abc import Callable
from typing import Any

import fiddle as fdl
import nemo_run as run
import typer
from nemo_run.cli.api import Entrypoint, list_factories
from nemo_run.config import get_type_namespace

from distill_nemo.cli_arguments import (
    RECIPE,
    called_recipe,
    check_complete,
    override,
    parse_arguments,
    split_run_arguments,
)
from distill_nemo.cli_help import Group, command_class, command_help, summary, train_help
from distill_nemo.cli_launch import check_launch, parse_executor, set_field
from distill_nemo.executors import EXECUTORS, Stages, experiments, local, passing_on_signals, run_config_of
from distill_nemo.training.entry import distill, errors_in_one_screen

NAMESPACE = "distill"
# NeMo-Run gives -y to two of its options, and older versions of typer have click say so on every command.
warnings.filterwarnings("ignore", message=r"The parameter -y is used more than once")
NAME = re.compile(r"\w[\w.-]{,63}", re.ASCII)  # NeMo-Run makes directories, files and an address of it


class TrainContext(run.cli.RunContext):
    """NeMo-Run's task command, with a true exit code, our messages, and checks before anything starts."""

    def cli_execute(self, fn: Callable[..., Any], args: list[str], entrypoint_type: Any = "task") -> None:
        """Run the command; what the user did wrong is one `error:` on stderr."""
        with errors_in_one_screen(), passing_on_signals():
            for option in ("load", "yaml", "repl", "to_yaml", "to_toml", "to_json"):
                if getattr(self, option):
                    raise ValueError(
                        f"--{option.replace('_', '-')} is not supported. Every run writes its complete config to "
                        "<output_dir>/config.yaml; `torchrun --rdzv-backend loopback --nproc-per-node N -m "
                        "distill_nemo CONFIG.yaml` runs that"
                    )
            if self.direct:
                raise ValueError("--direct is not supported: without run.executor= a run is one process of its own")
            if not NAME.fullmatch(self.name):
                raise ValueError(
                    '--name must be at most 64 letters, digits, ".", "_" or "-", the first a letter, digit or "_", got '
                    f'"{self.name}"'
                )
            given, others = split_run_arguments(args)
            self.executor = fdl.build(parse_executor(given.executor, given.of_executor)) if given.executor else None
            self.plugins = self.parse_plugin(given.plugins, *given.of_plugins) if given.plugins else []
            execute = self._execute_task if entrypoint_type == "task" else self._execute_experiment
            execute(fn, others)

    def parse_plugin(self, name: str, *args: str) -> Any:
        """Return the plugins that `run.plugins=NAME run.plugins.FIELD=VALUE` means: the user's own code."""
        try:
            config = super().parse_plugin(name)
        except ValueError as error:
            raise ValueError(f"run.plugins: {error}") from None
        for argument in args:
            field, _, value = argument.partition("=")
            set_field("run.plugins", config, field, value)
        plugins = fdl.build(config)
        return plugins if isinstance(plugins, list) else [plugins]

    def parse_fn(self, fn: Any, args: list[str], **default_kwargs: Any) -> Any:
        """The recipe that `--factory` or the first word names, or an experiment, with the overrides applied."""
        if fn is not distill:
            return run.Partial(fn, **parse_arguments(fn, args, self.name), **default_kwargs)
        args = self.without_recipe(args)
        if self.factory is None:
            known = ", ".join(recipe.__name__ for recipe in registered_recipes())
            raise ValueError(f"name a recipe, as the first word or by --factory. Known: {known}")
        recipe = called_recipe(self.factory, registered_recipes())
        if not isinstance(recipe, fdl.Partial) or recipe.__fn_or_cls__ is not distill:
            raise ValueError(f"recipe {self.factory}: must return run.Partial(distill, ...), got {recipe!r:.80}")
        override(recipe, parse_arguments(fn, args, "train"))
        return recipe

    def without_recipe(self, args: list[str]) -> list[str]:
        """The arguments without a first word that names the recipe, as `--factory` would."""
        if self.factory is None and args and RECIPE.fullmatch(args[0]):
            self.factory, *args = args
        return args

    def built_executor(self) -> run.Executor:
        """The one that was asked for; without, one process of this machine."""
        return self.executor or local()

    def _execute_task(self, fn: Callable[..., Any], task_args: list[str]) -> None:
        task = self.parse_fn(fn, task_args)
        executor = self.built_executor()
        check_launch(run_config_of(task), executor, self.dryrun)
        if self.dryrun and isinstance(executor, run.LocalExecutor):
            run.dryrun_fn(task, executor=executor)
            return
        self.executor = executor
        with Stages.titled(self.name) as experiment:
            experiment.add(task, executor=executor, name=self.name, tail_logs=True, plugins=self.plugins or None)
            if self.dryrun:
                experiment.show()
                return
            self.launch(experiment)
            if self.detach:
                experiments.tell_detached(experiment)

    def _execute_experiment(self, fn: Callable[..., Any], experiment_args: list[str]) -> None:
        fdl.build(self.parse_fn(fn, experiment_args))(ctx=self)  # building would copy the context, without its executor

    def launch(self, experiment: run.Experiment, sequential: bool = False) -> None:
        """As NeMo-Run's, but without `run.executor=` too the tasks run in processes of their own."""
        self.executor = self.executor or run.LocalExecutor()
        super().launch(experiment, sequential)


class Command(Entrypoint):
    """One command of `nemo distill`: teaches in its `--help`, and shows the user's errors in one screen."""

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
                values = parse_arguments(self.fn, ctx.args, self.name)
                check_complete(self.fn, values, self.name)
                self.fn(**values)

    def page(self) -> str:
        """What `--help` shows."""
        return train_help(self.fn, EXECUTORS) if self.fn is distill else command_help(self.name, self.fn)


def registered_recipes() -> list[Callable[..., Any]]:
    """Every function registered as a recipe, by name."""
    return sorted(list_factories(get_type_namespace(distill)), key=lambda factory: factory.__name__)


run.cli.entrypoint(distill, name="train", namespace=NAMESPACE, run_ctx_cls=TrainContext, entrypoint_cls=Command)


@run.cli.entrypoint(namespace=NAMESPACE, enable_executor=False, entrypoint_cls=Command)
def prepare(
    inputs: str, output: str, tokenizer: str, text_key: str = "text", num_workers: int = 0, max_bad_records: int = 0
) -> None:
    """Tokenise text into the .bin/.idx files that training reads.

    Several processes work on it, and what an interrupted job has done is kept: the same command goes on.
    Documents, tokens and tokens per second are stated at the end, and bad records with file and line.

    Example:
        nemo distill prepare inputs='text/*.jsonl,more/' output=data/corpus tokenizer=/models/Llama-3.2-1B

    Args:
        inputs: files, directories or globs of text, JSON lines, CSV or parquet, compressed or not, separated by commas.
        output: prefix of the files written.
        tokenizer: a Hugging Face tokenizer directory.
        text_key: JSON key or column that holds the text.
        num_workers: processes; 0 takes one per core.
        max_bad_records: how many unreadable records to skip before giving up.
    """
    from distill_nemo.data.inputs import split_inputs
    from distill_nemo.data.prepare import prepare as prepare_files

    prepare_files(
        split_inputs(inputs),
        output,
        tokenizer,
        text_key=text_key,
        num_workers=num_workers or None,
        max_bad_records=max_bad_records,
    )


@run.cli.entrypoint(namespace=NAMESPACE, enable_executor=False, entrypoint_cls=Command)
def export(checkpoint: str, output: str, tokenizer: str = "") -> None:
    """Write a saved step as a Hugging Face directory, and check that it gives the same logits.

    Every run that ends does this by itself (`checkpoint.export`); this is for other steps and interrupted runs.

    Example:
        nemo distill export checkpoint=runs/quickstart/distilled output=student
        nemo distill export checkpoint=runs/big/checkpoints/step_00004000 output=student_4000 tokenizer=/models/tok

    Args:
        checkpoint: a run's output directory, its checkpoints directory, or one step_* directory.
        output: the Hugging Face directory to write.
        tokenizer: tokenizer directory to copy beside the weights.
    """
    from distill_nemo.checkpoint.export import export as export_checkpoint

    export_checkpoint(checkpoint, output, tokenizer or None)


@run.cli.entrypoint(namespace=NAMESPACE, enable_executor=False, entrypoint_cls=Command)
def convert(checkpoint: str, output: str, allow_pickle: bool = False) -> None:
    """Make safetensors, which training reads, of an old Hugging Face checkpoint, whose weights are pickles.

    Example:
        nemo distill convert checkpoint=/models/old output=/models/new allow_pickle=true

    Args:
        checkpoint: directory with config.json and pytorch_model*.bin.
        output: the directory to write.
        allow_pickle: you trust these weights; a pickle can run code when it is opened.
    """
    from distill_nemo.runtime.device import setup_device

    setup_device()  # before Megatron is imported
    from distill_nemo.models.checkpoints.pickled import convert as convert_weights

    convert_weights(checkpoint, output, allow_pickle)


@run.cli.entrypoint(namespace=NAMESPACE, enable_executor=False, entrypoint_cls=Command)
def evaluate(
    student: str, data: str, teacher: str = "", sequence_length: int = 1024, samples: int = 64, vocab_size: int = 0
) -> None:
    r"""Held-out LM loss of a checkpoint and, with a teacher, forward KL, top-1 agreement and teacher entropy.

    Token means in nats, in one process, on the GPU where there is one.

    Example:
        nemo distill evaluate student=runs/quickstart/student data=runs/quickstart/data/valid \
            teacher=runs/quickstart/teacher/student sequence_length=128

    Args:
        student: checkpoint directory, of any kind that `train` reads.
        data: prefix of the held-out .bin/.idx files.
        teacher: checkpoint directory; empty for none.
        sequence_length: tokens per sample.
        samples: how many; more than the data holds repeats it.
        vocab_size: ids that both models keep, where the checkpoints have more; 0 for the student's.
    """
    from distill_nemo.config import StudentConfig, TeacherConfig
    from distill_nemo.runtime.device import setup_device

    for name, value in (("sequence_length", sequence_length), ("samples", samples)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    setup_device()  # before Megatron is imported
    from distill_nemo.training.evaluate import evaluate_student

    rows = vocab_size or None
    reference = TeacherConfig(checkpoint=teacher, vocab_size=rows) if teacher else None
    model = StudentConfig(checkpoint=student, vocab_size=rows)
    means = evaluate_student(model, data, reference, sequence_length, samples)
    for name, value in means.items():
        print(f"{name:18} {value:,.0f}" if name == "tokens" else f"{name:18} {value:.4f}")


@run.cli.entrypoint(namespace=NAMESPACE, enable_executor=False, entrypoint_cls=Command)
def recipes() -> None:
    """List the recipes, a line each.

    Example:
        nemo distill recipes
    """
    for recipe in registered_recipes():
        print(f"{recipe.__name__:22} {summary(recipe)}")


@run.cli.entrypoint(namespace=NAMESPACE, enable_executor=False, entrypoint_cls=Command)
def status(experiment: str) -> None:
    """How the jobs of a run on a cluster are: a line each.

    Exit code: 0 while they wait or run, and when they completed; 1 when one ended otherwise, with the reason.

    Example:
        nemo distill status experiment=train_1764030000000000000

    Args:
        experiment: the id that `train` printed.
    """
    experiments.status(experiment)


@run.cli.entrypoint(namespace=NAMESPACE, enable_executor=False, entrypoint_cls=Command)
def logs(experiment: str, follow: bool = False) -> None:
    """What the ranks of a run on a cluster have said, of every attempt.

    Example:
        nemo distill logs experiment=train_1764030000000000000 follow=true

    Args:
        experiment: the id that `train` printed.
        follow: go on until the jobs have ended, and exit as `train` does.
    """
    experiments.logs(experiment, follow)


@run.cli.entrypoint(namespace=NAMESPACE, enable_executor=False, entrypoint_cls=Command)
def cancel(experiment: str) -> None:
    """End the jobs of a run on a cluster. The same `train` command goes on from the last checkpoint.

    Example:
        nemo distill cancel experiment=train_1764030000000000000

    Args:
        experiment: the id that `train` printed.
    """
    experiments.cancel(experiment)
