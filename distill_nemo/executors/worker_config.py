"""The complete config that the workers get, built from a recipe, and the paths in it."""

from collections.abc import Iterator
from typing import Any

import fiddle as fdl

from distill_nemo.config import DataConfig, ExportConfig, PruneConfig, RunConfig, StoreConfig
from distill_nemo.config_files import from_dict, to_dict
from distill_nemo.job_config import EvaluateConfig, JobConfig, VerifyConfig
from distill_nemo.pruning.stages import CompressConfig


def run_config_of(recipe: fdl.Buildable) -> RunConfig:
    """Return the config that the workers will get, with every type checked.

    Raises:
        ValueError: for a field of the wrong type, or a recipe without a student.
    """
    given = _given(recipe)
    for name in ("output_dir", "student"):
        if name not in given:
            raise ValueError(f"{name} is not set; every run needs it")
    return from_dict(to_dict(RunConfig(**given)))


def job_config_of[C: JobConfig | CompressConfig](task: fdl.Buildable, kind: type[C]) -> C:
    """Return the config of a task whose arguments are the fields of `kind`, with every type checked."""
    return from_dict(to_dict(kind(**_given(task))), kind)


def _given(task: fdl.Buildable) -> dict[str, Any]:
    return {name: value for name, value in fdl.build(task).keywords.items() if value is not None}


def paths_of(config: JobConfig) -> Iterator[tuple[str, str]]:
    """Yield the field and value of every path in a config, the output's first."""
    named: dict[str, str | None] = {}
    data: DataConfig | None = None
    match config:
        case ExportConfig():
            named = {"output": config.output, "checkpoint": config.checkpoint, "tokenizer": config.tokenizer}
        case PruneConfig():
            named = {"output": config.output, "model": config.model, "data": config.data}
        case StoreConfig():
            named = {"output": config.output, "teacher.checkpoint": config.teacher.checkpoint}
            data = config.data
        case VerifyConfig():
            named = {"store": config.store, "teacher.checkpoint": config.teacher.checkpoint}
        case EvaluateConfig():
            named = {"output": config.output, "steps_of": config.steps_of, **config.models}
            named |= {"include_path": config.include_path, "tokenizer": config.tokenizer}
            yield from (("data", prefix) for prefix in config.domains.values())
        case RunConfig():
            named = {"output_dir": config.output_dir, "student.checkpoint": config.student.checkpoint}
            named["teacher.checkpoint"] = config.teacher and config.teacher.checkpoint
            data = config.data
    yield from ((name, path) for name, path in named.items() if path is not None)
    if data is None:
        return
    for name, values in (("data.train", data.train), ("data.valid", data.valid)):
        yield from ((name, value) for value in values if not _is_number(value))
    if data.tokenizer is not None:
        yield "data.tokenizer", data.tokenizer


def _is_number(value: str) -> bool:
    try:
        float(value)
    except ValueError:
        return False
    return True
