"""Launch a recipe from a command line: its overrides, and `run.executor=NAME run.executor.FIELD=VALUE`."""

import inspect
import re
import typing
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import fiddle as fdl
import nemo_run as run
from nemo_run.cli.api import list_factories
from nemo_run.config import get_type_namespace

from distill_nemo.checkpoint.hub_models import downloaded, models_of, pinned
from distill_nemo.cli.arguments import (
    RECIPE,
    RunArguments,
    called_recipe,
    override,
    parse_arguments,
    split_run_arguments,
)
from distill_nemo.cli.benchmarks import advice, job_beside
from distill_nemo.cli.layout import check_one_node, choose_layout, executor_of, split_layout_arguments
from distill_nemo.cli.values import parse
from distill_nemo.config import RunConfig
from distill_nemo.executors import (
    EXECUTORS,
    WatchedExperiment,
    check_launch,
    detached,
    local,
    passing_on_signals,
    run_config_of,
)
from distill_nemo.executors.known import descriptor_of
from distill_nemo.fields import suggest
from distill_nemo.job_config import JobConfig
from distill_nemo.training.entry import distill, errors_in_one_screen

EXPERIMENT_NAME = re.compile(r"\w[\w.-]{,63}", re.ASCII)  # NeMo-Run uses it in paths and in an address


class TrainContext(run.cli.RunContext):
    """NeMo-Run's task command with a correct exit code, our error messages, and checks before anything starts."""

    given: RunArguments

    def cli_execute(self, fn: Callable[..., Any], args: list[str], entrypoint_type: Any = "task") -> None:
        """Run the command. A user's mistake is one `error:` on stderr."""
        with errors_in_one_screen(), passing_on_signals():
            for option in ("load", "yaml", "repl", "to_yaml", "to_toml", "to_json"):
                if getattr(self, option):
                    raise ValueError(
                        f"--{option.replace('_', '-')} is not supported. Every run writes its complete config to "
                        "<output_dir>/config.yaml; `torchrun --rdzv-backend loopback --nproc-per-node N -m "
                        "distill_nemo CONFIG.yaml` runs that"
                    )
            if self.direct:
                raise ValueError("--direct is not supported; without run.executor= a run is one process of its own")
            if not EXPERIMENT_NAME.fullmatch(self.name):
                raise ValueError(
                    '--name must be at most 64 letters, digits, ".", "_" or "-", the first a letter, digit or "_", got '
                    f'"{self.name}"'
                )
            given, others = split_run_arguments(args)
            self.given = given
            self.executor = fdl.build(parse_executor(given.executor, given.of_executor)) if given.executor else None
            self.plugins = self.parse_plugin(given.plugins, *given.of_plugins) if given.plugins else []
            execute = self._execute_task if entrypoint_type == "task" else self._execute_experiment
            execute(fn, others)

    def parse_plugin(self, name: str, *args: str) -> Any:
        """Return the user's plugins that `run.plugins=NAME run.plugins.FIELD=VALUE` names."""
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
        """Return the recipe that `--factory` or the first argument names, or an experiment, with its overrides."""
        if fn is not distill:
            return run.Partial(fn, **parse_arguments(fn, args, self.name), **default_kwargs)
        args = self.without_recipe(args)
        if self.factory is None:
            raise ValueError("name a recipe, as the first argument or by --factory; `nemo distill recipes` lists them")
        recipe = made_recipe(self.factory, distill)
        layout, args = split_layout_arguments(args)
        values = parse_arguments(fn, args, "train")
        override(recipe, values)
        if layout.gpus is not None:
            self.executor = executor_of(layout.gpus, self.executor)
            choose_layout(recipe, layout.gpus, layout.gpu, values)
        return recipe

    def without_recipe(self, args: list[str]) -> list[str]:
        """Return the arguments without the first one if it names the recipe; it then stands for `--factory`."""
        if self.factory is None and args and RECIPE.fullmatch(args[0]):
            self.factory, *args = args
        return args

    def built_executor(self) -> run.Executor:
        """Return the requested executor; the default is one process on this machine."""
        return self.executor or local()

    def _execute_task(self, fn: Callable[..., Any], task_args: list[str]) -> None:
        here = self.executor is None
        task = self.parse_fn(fn, task_args)
        if here:
            check_one_node(self.built_executor().nproc_per_node())
        self.launch_task(task, run_config_of(task))

    def executor_of_size(self, nodes: int, devices: int) -> run.Executor:
        """Return the requested kind of executor, with this many nodes and ranks on each."""
        name = self.given.executor or "local"
        return fdl.build(parse_executor(name, [*self.given.of_executor, *EXECUTORS[name].size(nodes, devices)]))

    def launch_task(self, task: run.Partial, config: JobConfig) -> None:
        """Check `config`, which describes the task, and run the task on the executor; beside a run, its benchmarks."""
        executor = self.built_executor()
        check_launch(config, executor, self.dryrun)
        beside: tuple[run.Partial, run.Executor] | None = None
        if isinstance(config, RunConfig) and config.benchmarks.tasks is not None:
            beside = job_beside(config, executor, partial(self.executor_of_size, 1), self.dryrun)
        if not self.dryrun:
            pin_models(task, config, executor)
        if self.dryrun and descriptor_of(executor).manifest is None:
            for each, its_executor in [(task, executor), beside] if beside else [(task, executor)]:
                run.dryrun_fn(each, executor=its_executor)
            return
        self.executor = executor
        options: dict[str, Any] = {"tail_logs": True, "plugins": self.plugins or None}
        with WatchedExperiment.titled(self.name) as experiment:
            experiment.add(task, executor=executor, name=self.name, **options)
            if beside is not None:
                assert isinstance(config, RunConfig), "only runs have jobs beside them"
                experiment.add_beside(*beside, f"{self.name}-benchmarks", advice(config), **options)
            if self.dryrun:
                experiment.show()
                return
            self.launch(experiment)
            if self.detach:
                detached.print_submitted(experiment)

    def _execute_experiment(self, fn: Callable[..., Any], experiment_args: list[str]) -> None:
        fdl.build(self.parse_fn(fn, experiment_args))(ctx=self)  # building would copy the context, without its executor

    def launch(self, experiment: run.Experiment, sequential: bool = False) -> None:
        """Launch as NeMo-Run does, but always in separate processes, even without `run.executor=`."""
        self.executor = self.executor or run.LocalExecutor()
        super().launch(experiment, sequential)


def pin_models(task: run.Partial, config: JobConfig, executor: run.Executor) -> None:
    """Pin the hub names of a task and download them, if its ranks will see the same directories.

    Raises:
        ValueError: as `hub.directory_of`.
    """
    if not descriptor_of(executor).work_dir(executor).is_current:
        return
    config = pinned(config)
    downloaded(config)
    override(task, models_of(config))


def made_recipe(call: str, target: Callable[..., Any]) -> fdl.Partial:
    """Return what a recipe of a target makes.

    Raises:
        ValueError: from `called_recipe`, and for a recipe of something else.
    """
    recipe = called_recipe(call, registered_recipes(target))
    if not isinstance(recipe, fdl.Partial) or recipe.__fn_or_cls__ is not target:
        raise ValueError(f"recipe {call}: must return run.Partial({target.__name__}, ...), got {recipe!r:.80}")
    return recipe


def registered_recipes(target: Callable[..., Any] = distill) -> dict[str, Callable[..., Any]]:
    """Return every function registered as a recipe of a target by its name, sorted."""
    found = {factory.__name__: factory for factory in list_factories(get_type_namespace(target))}
    return dict(sorted(found.items()))


def parse_executor(name: str, arguments: Iterable[str]) -> run.Config:
    """Return the executor for a name and FIELD=VALUE arguments, such as `slurm` and `["nodes=2", "qos=high"]`.

    Fields are the arguments of our factory and the fields of NeMo-Run's executor.

    Raises:
        ValueError: for an unknown executor or field, with close matches, or a value that is not allowed.
    """
    if name not in EXECUTORS:
        base, called, _ = name.partition("(")
        advice = f" Write run.executor={base} run.executor.FIELD=VALUE." if called else suggest(base, EXECUTORS)
        raise ValueError(f'run.executor: unknown executor "{name}".{advice}')
    descriptor = EXECUTORS[name]
    own = typing.get_type_hints(descriptor.arguments)
    del own["return"]
    others_known = _fields(descriptor.executor)
    known = {**own, **{field: hint for field, hint in others_known.items() if field not in descriptor.hidden}}
    call, others = {}, {}
    for argument in arguments:
        field, _, value = argument.partition("=")
        if field.partition(".")[0] not in known:
            raise ValueError(f'unknown field "run.executor.{field}".{suggest(field, known)}')
        if field in own:
            call[field] = parse(f"run.executor.{field}", value, own[field])
        else:
            others[field] = value
    config = descriptor.arguments(**call)
    for field, value in others.items():
        set_field("run.executor", config, field, value)
    return config


def _fields(cls: Callable[..., Any]) -> dict[str, Any]:
    """Return the fields of a NeMo-Run class with their types."""
    hints = typing.get_type_hints(cls)
    return {field: hints.get(field, Any) for field in inspect.signature(cls).parameters}


def set_field(name: str, config: Any, path: str, value: str) -> None:
    """Set a field. NeMo-Run's own messages would print the whole executor, environment included."""
    *sections, field = path.split(".")
    for section in sections:
        config = config.__arguments__.get(section) if isinstance(config, run.Config) else None
    known = _fields(config.__fn_or_cls__) if isinstance(config, run.Config) else {}
    if field not in known:
        raise ValueError(f'unknown field "{name}.{path}".{suggest(field, known) if known else " It has no fields."}')
    setattr(config, field, parse(f"{name}.{path}", value, known[field]))
