"""The complete config that the workers get, built from a recipe, and the paths in it."""

from collections.abc import Iterator
from typing import Any

import fiddle as fdl

from distill_nemo.config import ExportConfig, JobConfig, PruneConfig, RunConfig, from_dict, to_dict


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


def job_config_of[C: JobConfig](task: fdl.Buildable, kind: type[C]) -> C:
    """Return the config of a task whose arguments are the fields of `kind`, with every type checked."""
    return from_dict(to_dict(kind(**_given(task))), kind)


def _given(task: fdl.Buildable) -> dict[str, Any]:
    return {name: value for name, value in fdl.build(task).keywords.items() if value is not None}


def paths_of(config: JobConfig) -> Iterator[tuple[str, str]]:
    """Yield the field and value of every path in a config, the output's first."""
    if isinstance(config, ExportConfig):
        yield from (("output", config.output), ("checkpoint", config.checkpoint))
        if config.tokenizer is not None:
            yield "tokenizer", config.tokenizer
        return
    if isinstance(config, PruneConfig):
        yield from (("output", config.output), ("model", config.model), ("data", config.data))
        return
    yield "output_dir", config.output_dir
    for role, model in (("student", config.student), ("teacher", config.teacher)):
        if model is not None and model.checkpoint is not None:
            yield f"{role}.checkpoint", model.checkpoint
    for name, values in (("data.train", config.data.train), ("data.valid", config.data.valid)):
        yield from ((name, value) for value in values if not _is_number(value))
    if config.data.tokenizer is not None:
        yield "data.tokenizer", config.data.tokenizer


def _is_number(value: str) -> bool:
    try:
        float(value)
    except ValueError:
        return False
    return True
