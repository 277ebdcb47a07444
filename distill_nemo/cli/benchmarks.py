"""The job that measures a run's saved steps beside it, which `nemo distill train benchmarks.tasks=...` starts, too."""

import shlex
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import nemo_run as run

from distill_nemo.benchmark_config import TasksConfig
from distill_nemo.benchmarks.entry import evaluate
from distill_nemo.benchmarks.tasks import check_names, check_tasks
from distill_nemo.config import RunConfig
from distill_nemo.executors import check_launch
from distill_nemo.executors.known import descriptor_of
from distill_nemo.executors.worker_config import job_config_of
from distill_nemo.fields import fields_named, require
from distill_nemo.job_config import EvaluateConfig
from distill_nemo.models.sources import has_tokenizer

AS_TYPED = {name: f"benchmarks.{name}" for name in ("tasks needs", "include_path", "num_fewshot", "allow_code")}
AS_TYPED |= {"steps_of": "output_dir"}


def job_beside(
    config: RunConfig, executor: run.Executor, make: Callable[[int], run.Executor], dryrun: bool
) -> tuple[run.Partial, run.Executor]:
    """Return task and executor of the job that measures the steps of a run.

    Args:
        config: of the run, which has `benchmarks.tasks`.
        executor: of the run.
        make: returns an executor of the same kind, of one node with this many ranks.
        dryrun: nothing will be submitted.

    Raises:
        ValueError: for tasks that cannot be measured, as far as they can be seen from here; if no GPU is left.
    """
    settings, descriptor = config.benchmarks, descriptor_of(executor)
    given = {each.name: vars(settings)[each.name] for each in fields(TasksConfig)}
    task = run.Partial(evaluate, steps_of=config.output_dir, until_step=config.training.steps, **given)
    beside = descriptor.beside(executor, make, settings.devices)
    job = job_config_of(task, EvaluateConfig)
    with fields_named(AS_TYPED):
        check_launch(job, beside, dryrun)
        if (here := descriptor.work_dir(executor).here) is not None:
            check_tasks(job, here)
            check_names(job, here)
            _check_tokenizer(config, here)
    return task, beside


def advice(config: RunConfig) -> str:
    """Return what to do if the benchmarks of a run have failed."""
    typed = " ".join(shlex.quote(f"{name}={value}") for name, value in _changed(config.benchmarks))
    return (
        f"{config.output_dir} itself is not affected. The same command measures what is missing, or `nemo distill "
        f"evaluate steps_of={shlex.quote(config.output_dir)} {typed}`"
    )


def _changed(settings: TasksConfig) -> Iterator[tuple[str, Any]]:
    """Yield the settings of an evaluation that have not their defaults."""
    given = ((each, vars(settings)[each.name]) for each in fields(TasksConfig))
    yield from ((each.name, value) for each, value in given if value != each.default)


def _check_tokenizer(config: RunConfig, here: Path) -> None:
    """Refuse a student whose exported steps would have no tokenizer, if that can be seen."""
    student = config.student.checkpoint
    seen = student is None or (here / student / "config.json").is_file()
    require(
        config.data.tokenizer is not None or not seen or (student is not None and has_tokenizer(here / student)),
        "benchmarks.tasks needs a tokenizer, and the student has none: set data.tokenizer",
    )
