"""`teacher` and `verify`, which an executor runs on every rank. Light at import, as `training.entry` is."""

import sys
from typing import Any

from distill_nemo.config import StoreConfig
from distill_nemo.fields import takes_fields_of
from distill_nemo.job_config import VerifyConfig
from distill_nemo.runtime.errors import errors_of_a_rank
from distill_nemo.runtime.imports import megatron_imports


@takes_fields_of(StoreConfig)
def teacher(**fields: Any) -> None:
    r"""Run a teacher once and store its targets, from which any run can train without it.

    The store is a data set: `data.train='["store"]' teacher=None` trains from it at any layout. Conversations and packs
    keep their masks and boundaries; tokens that do not count have no targets.

    Example:
        nemo distill teacher teacher.checkpoint=/models/Qwen3-8B data.train='["data/corpus"]' output=store
        nemo distill teacher teacher.checkpoint=/models/Qwen3-32B data.train='["data/corpus"]' output=store \
            temperature=2.0 parallelism.tensor_model_parallel_size=4 run.executor=local run.executor.processes=8

    Args:
        **fields: those of `StoreConfig`; None stands for a field's default.

    Raises:
        ValueError: for a config that cannot run, or another store than the one that was begun in `output`.
    """
    config = StoreConfig(**{name: value for name, value in fields.items() if value is not None})
    with errors_of_a_rank():
        with megatron_imports():
            from distill_nemo.teacher_store_jobs.write import run_store

        stopped = run_store(config)
    if stopped:
        sys.exit(128 + stopped)


@takes_fields_of(VerifyConfig)
def verify(**fields: Any) -> None:
    """Compare every shard with its checksum, and ask the teacher again for a sample of windows.

    Example:
        nemo distill teacher verify store=store samples=64

    Args:
        **fields: those of `VerifyConfig`; None stands for a field's default.

    Raises:
        ValueError: naming the shards that are damaged, or are not the teacher's.
    """
    config = VerifyConfig(**{name: value for name, value in fields.items() if value is not None})
    with errors_of_a_rank():
        with megatron_imports():
            from distill_nemo.teacher_store_jobs.verify import run_verify

        run_verify(config)
