"""What would make a run fit."""

from collections.abc import Iterator
from typing import Any

import torch

from distill_nemo.checks import check
from distill_nemo.models.architecture import transformer_config
from distill_nemo.planning.memory import fullest
from distill_nemo.planning.setting import Setting

MOST = 3


def what_would_fit(setting: Setting, memory_bytes: float) -> list[str]:
    """Overrides that make the run fit on as many ranks, those that cost least time first; a few at most."""
    found = []
    for changes in _changes(setting):
        if len(found) == MOST:
            break
        changed = setting.with_fields(**changes)
        if allowed(changed) and fullest(changed).total <= memory_bytes:
            found.append(" ".join(f"{name.replace('__', '.')}={value}" for name, value in changes.items()))
    return found


def allowed(setting: Setting) -> bool:
    """Whether such a run would be let through."""
    try:
        check_setting(setting)
    except ValueError:
        return False
    return True


def check_setting(setting: Setting) -> None:
    """Refuse what a run would refuse: sizes that the layout does not divide.

    Raises:
        ValueError: as `checks.check` and `architecture.transformer_config`.
    """
    config = setting.config
    check(config, setting.world_size)
    dtype = torch.bfloat16 if setting.item == 2 else torch.float32
    for model in (config.student, config.teacher):
        if model is not None:
            transformer_config(model, config.parallelism, dtype, config.training.recompute)


def _changes(setting: Setting) -> Iterator[dict[str, Any]]:
    par, train = setting.config.parallelism, setting.config.training
    split = {} if par.sequence_parallel else {"parallelism__sequence_parallel": True}
    tensor = {"parallelism__tensor_model_parallel_size": 2 * par.tensor_model_parallel_size} | split
    pipeline = {"parallelism__pipeline_model_parallel_size": 2 * par.pipeline_model_parallel_size}
    small = {"training__micro_batch_size": 1} if train.micro_batch_size > 1 else {}
    again = {"training__recompute": "full"} if train.recompute != "full" else {}
    sharded = (
        {"optimizer__use_distributed_optimizer": True} if not setting.config.optimizer.use_distributed_optimizer else {}
    )
    for changes in (sharded, split, small, again, sharded | small | again, tensor, pipeline, tensor | small | again):
        if changes:
            yield changes
    for times in (2, 4, 8):
        wide = {"parallelism__tensor_model_parallel_size": times * par.tensor_model_parallel_size} | split
        deep = {"parallelism__pipeline_model_parallel_size": times * par.pipeline_model_parallel_size}
        yield wide | deep | small | again | sharded
