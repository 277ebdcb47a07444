"""Commands that work in this process, or on the ranks of an executor."""

import inspect
from collections.abc import Callable
from typing import Any, ClassVar

import fiddle as fdl
import nemo_run as run

from distill_nemo.cli.arguments import check_complete, override, parse_arguments
from distill_nemo.cli.entrypoint import Command
from distill_nemo.cli.help import EVALUATE, ON_RANKS, STORE, STORE_PLAN, VERIFY, command_help, config_help
from distill_nemo.cli.launch import TrainContext
from distill_nemo.cli.layout import executor_of
from distill_nemo.cli.plan import ANY_DATA
from distill_nemo.config import ExportConfig, PruneConfig, StoreConfig
from distill_nemo.executors.preflight import check_fits_nodes
from distill_nemo.executors.worker_config import job_config_of
from distill_nemo.job_config import EvaluateConfig, JobConfig, VerifyConfig
from distill_nemo.planning.gpus import UTILISATION, find_gpu
from distill_nemo.runtime.imports import megatron_imports
from distill_nemo.teacher_store_jobs.entry import verify


class JobContext(TrainContext):
    """Context of `train` for a function whose arguments are the fields of another config than a run's."""

    config: ClassVar[type[JobConfig]]

    def _execute_task(self, fn: Callable[..., Any], task_args: list[str]) -> None:
        self.launch_job(fn, task_args, fn.__name__, self.config)

    def launch_job(self, fn: Callable[..., Any], arguments: list[str], command: str, kind: type[JobConfig]) -> None:
        """Call `fn` in this process if no executor is named, else on its ranks."""
        task = _task(fn, arguments, command)
        config = job_config_of(task, kind)
        if self.executor is None and not self.dryrun:
            fdl.build(task)()
        else:
            self.launch_task(task, config)


def _task(fn: Callable[..., Any], arguments: list[str], command: str) -> run.Partial:
    values = parse_arguments(fn, arguments, command)
    check_complete(fn, values, command)
    task = run.Partial(fn)
    override(task, values)
    return task


class ExportContext(JobContext):
    """Context of `export`."""

    config = ExportConfig


class TeacherContext(JobContext):
    """Context of `teacher`, `teacher plan` and `teacher verify`."""

    planned: tuple[StoreConfig, int]  # and its ranks

    def _execute_task(self, fn: Callable[..., Any], task_args: list[str]) -> None:
        if task_args[:1] == ["verify"]:
            self.launch_job(verify, task_args[1:], "teacher", VerifyConfig)
        elif task_args[:1] == ["plan"]:
            self._plan(fn, task_args[1:])
        else:
            self.launch_job(fn, task_args, "teacher", StoreConfig)

    def _plan(self, fn: Callable[..., Any], arguments: list[str]) -> None:
        names = inspect.signature(plan_store).parameters
        of_plan = [argument for argument in arguments if argument.partition("=")[0] in names]
        own = parse_arguments(plan_store, of_plan, "teacher")
        task = _task(fn, [argument for argument in arguments if argument not in of_plan], "teacher")
        config = job_config_of(task, StoreConfig)
        config.data.train = config.data.train or (ANY_DATA if config.windows else [])
        executor = self.built_executor() if own.get("gpus") is None else executor_of(own["gpus"], self.executor)
        check_fits_nodes(config, executor)
        self.planned = config, executor.nnodes() * executor.nproc_per_node()
        plan_store(self, **own)


def plan_store(
    ctx: run.cli.RunContext,
    gpus: int | None = None,
    gpu: str = "h100",
    utilisation: float = UTILISATION,
    transformer_engine: bool = True,
) -> None:
    """Print what the writing of a store would need, and whether it fits: bytes and free disk, memory, hours.

    Everything is computed from the config, the teacher's config.json and the sizes of the data, without GPU or weights.

    Example:
        nemo distill teacher plan teacher.checkpoint=/models/Qwen3-8B data.train='["data/corpus"]' output=store gpus=8

    Args:
        ctx: NeMo-Run's context.
        gpus: their number, if no executor is named.
        gpu: a100-80gb, h100, h200 or b200; one per rank.
        utilisation: share of the GPU's peak that a forward pass is assumed to reach.
        transformer_engine: use Transformer Engine's layers; false means Megatron's own, without its fused kernels.
    """
    found = find_gpu(gpu)
    with megatron_imports():
        from distill_nemo.planning.stores import print_store_plan

    assert isinstance(ctx, TeacherContext), "which calls it"
    print_store_plan(*ctx.planned, found, utilisation, transformer_engine)


class TeacherCommand(Command):
    """`teacher`."""

    def page(self) -> str:
        """Return the text of `--help`."""
        written = config_help("teacher", self.fn, StoreConfig, STORE)
        sections = "teacher.*, parallelism.*, run.executor.*: as above"
        planned = command_help("teacher plan", plan_store, STORE_PLAN)
        return f"{written}\n\n{planned}\n\n{config_help('teacher verify', verify, VerifyConfig, VERIFY, sections)}"


class PruneContext(JobContext):
    """Context of `prune`."""

    config = PruneConfig


class PruneCommand(Command):
    """`prune`."""

    def page(self) -> str:
        """Return the text of `--help`."""
        return config_help(self.name, self.fn, PruneConfig, ON_RANKS)


class ExportCommand(Command):
    """`export`."""

    def page(self) -> str:
        """Return the text of `--help`."""
        return command_help(self.name, self.fn, ON_RANKS)


class EvaluateContext(JobContext):
    """Context of `evaluate`."""

    config = EvaluateConfig


class EvaluateCommand(Command):
    """`evaluate`."""

    def page(self) -> str:
        """Return the text of `--help`."""
        return config_help(self.name, self.fn, EvaluateConfig, EVALUATE)
