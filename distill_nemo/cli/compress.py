"""`nemo distill compress`: prune, distil, evaluate and report, as one experiment of stages on any executor."""

import contextlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import fiddle as fdl
import nemo_run as run

from distill_nemo.checkpoint.hub_models import downloaded, pinned
from distill_nemo.cli.arguments import check_complete, override, parse_arguments
from distill_nemo.cli.entrypoint import Command
from distill_nemo.cli.help import COMPRESS, COMPRESS_PLAN, command_help, config_help, summary
from distill_nemo.cli.launch import TrainContext, made_recipe, registered_recipes
from distill_nemo.cli.layout import SECTIONS, check_one_node, executor_of, split_layout_arguments
from distill_nemo.cli.plan import ANY_DATA
from distill_nemo.config import StudentConfig
from distill_nemo.executors import WatchedExperiment, check_launch, detached, local
from distill_nemo.executors.known import descriptor_of
from distill_nemo.executors.preflight import check_fits_nodes
from distill_nemo.executors.worker_config import job_config_of
from distill_nemo.fields import fields_named, require, takes_fields_of
from distill_nemo.planning.gpus import UTILISATION, find_gpu
from distill_nemo.pruning.entry import prune
from distill_nemo.pruning.stages import CompressConfig, check_compress, fewest_nodes
from distill_nemo.reports.compressed import evaluate_run, read_rows, report_rounds
from distill_nemo.runtime.imports import megatron_imports
from distill_nemo.training.entry import distill

if TYPE_CHECKING:
    from distill_nemo.pruning.foreseen import Round

DEFAULT_RECIPE = "minitron"
# Fields of the stages' configs, and those of a compression that they come from.
TYPED = {"model": "teacher", "output_dir": "output", "data": "data.train"}
OF_STAGES = {"student.checkpoint": "teacher", "teacher.checkpoint": "teacher"}


@dataclass(frozen=True)
class Place:
    """Executors of one kind, of the size that a stage needs.

    Args:
        make: returns the executor of a number of nodes and of ranks on each.
        nodes: of the distillation.
        devices: ranks on each node.
    """

    make: Callable[[int, int], run.Executor] = lambda nodes, devices: local(devices)
    nodes: int = 1
    devices: int = 1


@dataclass(frozen=True)
class Stage:
    """One job of the experiment."""

    name: str
    task: run.Partial
    executor: run.Executor


@takes_fields_of(CompressConfig)
def compress(**values: Any) -> None:
    r"""Cut a student out of its teacher, distil it, evaluate it, and report: one command on any executor.

    Sizes or a target say how small the student becomes, as for `prune`. It is distilled by the settings of the Minitron
    papers (arXiv:2407.14679, arXiv:2408.11796). The result is the Hugging Face directory OUTPUT/student and the page
    OUTPUT/report/report.html. All that can be refused is refused at the start.

    Example:
        nemo distill compress teacher=/models/Qwen3-8B output=runs/q6b target_params=6e9 data.train='["corpus"]' \
            gpus=32 gpu=h100 run.executor=slurm run.executor.nodes=4 run.executor.devices=8 run.executor.time=12:00:00
        nemo distill compress teacher=/models/Qwen3-8B output=runs/q4b target_params=4e9 rounds=2 \
            data.train='["corpus"]' gpus=8

    Args:
        **values: the fields of `CompressConfig`; None stands for a field's default.

    Raises:
        ValueError: for stages that cannot run, before the first one.
    """
    launch(CompressConfig(**{name: value for name, value in values.items() if value is not None}))


def launch(
    config: CompressConfig | run.Partial,
    place: Place | None = None,
    name: str = "compress",
    dryrun: bool = False,
    detach: bool = False,
    plugins: list[Any] | None = None,
) -> None:
    """Check every stage, and run those that are left one after the other.

    Args:
        config: a config, or a recipe.
        place: executors of the stages; None: one process on this machine.
        name: of the experiment.
        dryrun: print what would run.
        detach: return once a scheduler has all jobs, each waiting for the one before it.
        plugins: NeMo-Run's, for every job.

    Raises:
        ValueError: for stages that cannot run.
    """
    place = place or Place()
    config = config_of(config) if isinstance(config, run.Partial) else config
    executor = place.make(place.nodes, place.devices)
    pins = not dryrun and descriptor_of(executor).work_dir(executor).is_current
    config = with_commits(config) if pins else config
    stages = checked_stages(config, place, dryrun)
    chain = descriptor_of(stages[0].executor).chain
    if dryrun and descriptor_of(stages[0].executor).manifest is None:
        for stage in stages:
            run.dryrun_fn(stage.task, executor=stage.executor)
        return
    require(
        not detach or chain is not None or isinstance(stages[0].executor, run.LocalExecutor),
        "--detach: this scheduler does not start a stage after another one, so this command submits each in its turn: "
        "leave it running",
    )
    if pins:
        downloaded(config)
    with WatchedExperiment.titled(name) as experiment:
        before: list[str] = []
        for stage in stages:
            if before and chain is not None:
                chain(stage.executor)
            job = {"name": stage.name, "tail_logs": True, "plugins": plugins, "dependencies": before}
            before = [experiment.add(stage.task, executor=stage.executor, **job)]
        if dryrun:
            experiment.show()
            return
        experiment.run(detach=detach)
        if detach:
            detached.print_submitted(experiment)
    if not detach:
        _conclude(config)


@contextlib.contextmanager
def _fields_as_typed() -> Iterator[None]:
    """Name the fields of a compression in errors of its stages: short ones stand at the beginning alone."""
    try:
        with fields_named(OF_STAGES):
            yield
    except ValueError as error:
        field = re.match(r"\w+(?=:| = )", str(error))
        raise ValueError(f"{TYPED.get(field[0], field[0])}{str(error)[field.end() :]}" if field else error) from None


def config_of(recipe: fdl.Partial) -> CompressConfig:
    """Return the config of a recipe, with every type checked."""
    return job_config_of(recipe, CompressConfig)


def with_commits(config: CompressConfig) -> CompressConfig:
    """Return a config whose names on the hub have commits: those of the first round's run, if it has begun."""
    run = pinned(replace(config.run(1), student=StudentConfig()))
    assert run.teacher is not None and run.teacher.checkpoint is not None, "a compression has a teacher"
    return replace(config, teacher=run.teacher.checkpoint, data=run.data)


@_fields_as_typed()
def checked_stages(config: CompressConfig, place: Place, dryrun: bool = False) -> list[Stage]:
    """Return the stages that are left: those before the first one without its results are finished.

    Raises:
        ValueError: for a stage that cannot run, as far as its inputs can be seen from here.
    """
    check_compress(config)
    few = fewest_nodes(config.parallelism, place.nodes, place.devices)
    executor, smaller = place.make(place.nodes, place.devices), place.make(few, place.devices)
    check_launch(config.cut(1), smaller, dryrun)
    check_launch(replace(config.run(config.rounds), student=StudentConfig()), executor, dryrun)
    rounds: list[Round] = []
    if descriptor_of(executor).work_dir(executor).is_current:
        rounds = foreseen(config)
        for each in rounds:
            check_fits_nodes(each.run, executor)
    require(
        config.rounds == 1 or bool(rounds),
        f"rounds = {config.rounds}: the targets between follow from the teacher's config.json, which must be seen from "
        "here; run compress once for each target",
    )
    stages = []
    for number in range(1, config.rounds + 1):
        ending = f"-{number}" if config.rounds > 1 else ""
        cut = rounds[number - 1].cut if rounds else config.cut(number)
        stages.append(Stage(f"prune{ending}", _task(prune, cut), smaller))
        stages.append(Stage(f"distil{ending}", _task(distill, config.run(number)), executor))
    directories = [config.directory(number) for number in range(1, config.rounds + 1)]
    stages.append(Stage("evaluate", run.Partial(evaluate_run, output=config.output), smaller))
    page = run.Partial(report_rounds, directories=directories, prompts=config.prompts)
    stages.append(Stage("report", page, place.make(1, 1)))
    if not rounds:
        return stages
    from distill_nemo.pruning.finished import finished_stages

    count = finished_stages(config, rounds)
    if count:
        print(f"finished before: {', '.join(stage.name for stage in stages[:count])}")
    return stages[count:]


@_fields_as_typed()
def foreseen(config: CompressConfig, has_data: bool = True) -> "list[Round]":
    """Return the rounds with their models, from the teacher's config.json.

    Raises:
        ValueError: as `pruning.foreseen.foresee`.
    """
    with megatron_imports():
        from distill_nemo.pruning.foreseen import foresee

    return foresee(config, has_data)


def _task(function: Callable[..., Any], config: Any) -> run.Partial:
    values = {each.name: vars(config)[each.name] for each in fields(config)}
    parts = {name: run.Config(type(value), **vars(value)) for name, value in values.items() if is_dataclass(value)}
    stated: dict[str, Any] = values | parts
    return run.Partial(function, **stated)


def _conclude(config: CompressConfig) -> None:
    """Print the table, if it can be seen from here, and the places of the results."""
    from rich.console import Console

    from distill_nemo.reports.comparison import render_table

    output = Path(config.output)
    if rows := read_rows(output):
        Console().print(render_table(rows))
    print(f"student  {output}/student (Hugging Face)\nreport   {output}/report/report.html")


class CompressContext(TrainContext):
    """Context of `compress` and `compress plan`."""

    planned: "tuple[CompressConfig, Place]"

    def _execute_task(self, fn: Callable[..., Any], task_args: list[str]) -> None:
        if task_args[:1] == ["plan"]:
            self._plan(task_args[1:])
            return
        config, place = self._config(task_args, [])
        if self.executor is None:
            check_one_node(place.devices)
        launch(config, place, self.name, self.dryrun, self.detach, self.plugins or None)

    def _plan(self, arguments: list[str]) -> None:
        names = ("utilisation", "transformer_engine")
        of_plan = [each for each in arguments if each.partition("=")[0] in names]
        own = parse_arguments(plan_compress, of_plan, "compress")
        others = [each for each in arguments if each not in of_plan]
        gpu = next((each.partition("=")[2] for each in others if each.startswith("gpu=")), "h100")
        if not any(each.startswith("gpus=") for each in others):
            others = [each for each in others if not each.startswith("gpu=")]
        self.planned = self._config(others, ANY_DATA)
        plan_compress(self, gpu=gpu, **own)

    def _config(self, arguments: list[str], data: list[str]) -> tuple[CompressConfig, Place]:
        """Return the config that a command line describes, and its executors. `data` stands for `data.train`."""
        arguments = self.without_recipe(arguments)
        recipe = made_recipe(self.factory or DEFAULT_RECIPE, compress)
        layout, arguments = split_layout_arguments(arguments)
        values = parse_arguments(compress, arguments, "compress")
        override(recipe, values)
        check_complete(compress, {str(name): value for name, value in recipe.__arguments__.items()}, "compress")
        config = config_of(recipe)
        config.data.train = config.data.train or data
        place = self._place(layout.gpus)
        if layout.gpus is not None:
            fixed = [name.partition(".")[2] for name in values if name.partition(".")[0] in SECTIONS]
            config = with_layout(config, layout.gpus, layout.gpu, fixed)
        return config, place

    def _place(self, gpus: int | None) -> Place:
        if self.executor is None:
            return Place(devices=gpus or 1)
        executor = executor_of(gpus, self.executor) if gpus is not None else self.executor
        return Place(self.executor_of_size, executor.nnodes(), executor.nproc_per_node())


def with_layout(config: CompressConfig, gpus: int, gpu: str, fixed: list[str]) -> CompressConfig:
    """Return the config at the layout that the planner chooses for the first round's distillation; say which and why.

    Raises:
        ValueError: if nothing fits, with the least number of GPUs that would do.
    """
    found, first = find_gpu(gpu), foreseen(config, has_data=False)[0]
    from distill_nemo.planning import plan
    from distill_nemo.planning.layouts import CHOSEN

    chosen, why = plan.with_layout(first.run, gpus, found, [name for name in fixed if name in CHOSEN])
    print(f"layout for {gpus} x {found.name}: {why}")
    config = replace(config, parallelism=chosen.parallelism, training=chosen.training)
    try:
        foreseen(config, has_data=False)
    except ValueError as error:
        advice = "parallelism.tensor_model_parallel_size=1 leaves more sizes"
        raise ValueError(f"{error}. This layout leaves no student: {advice}") from None
    return config


def plan_compress(
    ctx: run.cli.RunContext,
    gpus: int | None = None,
    gpu: str = "h100",
    utilisation: float = UTILISATION,
    transformer_engine: bool = True,
) -> None:
    """Print memory, hours and GPU-hours of every stage, and then all that `plan` says of each distillation.

    Everything is computed from the config and the teacher's config.json, without GPU, weights or data.

    Example:
        nemo distill compress plan teacher=/models/Qwen3-8B output=runs/q6b target_params=6e9 gpus=32 gpu=h100

    Args:
        ctx: NeMo-Run's context.
        gpus: choose the fastest layout of this many GPUs that fits, as `compress` does.
        gpu: a100-80gb, h100, h200 or b200; one per rank.
        utilisation: share of the GPU's peak that a pass is assumed to reach.
        transformer_engine: use Transformer Engine's layers; false means Megatron's own, without its fused kernels.

    Raises:
        ValueError: for stages that cannot run; after printing, for one that does not fit, with changes that would.
    """
    found = find_gpu(gpu)
    assert isinstance(ctx, CompressContext), "which calls it"
    config, place = ctx.planned
    check_compress(config)
    few = fewest_nodes(config.parallelism, place.nodes, place.devices)
    check_fits_nodes(config.cut(1), place.make(few, place.devices))
    rounds = foreseen(config, has_data=False)
    for each in rounds:
        check_fits_nodes(each.run, place.make(place.nodes, place.devices))
    from distill_nemo.pruning.plan import print_compress_plan

    ranks = place.nodes * place.devices
    print_compress_plan(config, rounds, few * place.devices, ranks, found, utilisation, transformer_engine)


class CompressCommand(Command):
    """`compress`."""

    def page(self) -> str:
        """Return the text of `--help`."""
        known = "".join(f"  {name:24} {summary(each)}\n" for name, each in registered_recipes(compress).items())
        written = config_help("compress", self.fn, CompressConfig, COMPRESS.format(recipes=known.rstrip("\n")))
        return f"{written}\n\n{command_help('compress plan', plan_compress, COMPRESS_PLAN)}"
