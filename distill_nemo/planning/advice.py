"""Suggest changes that would make a run fit."""

from collections.abc import Iterator
from typing import Any

import torch

from distill_nemo.checks import check
from distill_nemo.models.checkpoints.exportable import check_exportable
from distill_nemo.models.megatron import transformer_config
from distill_nemo.planning.memory import fullest
from distill_nemo.planning.planned import PlannedRun

MAX_SUGGESTIONS = 3


def what_would_fit(planned: PlannedRun, memory_bytes: float) -> list[str]:
    """Return a few overrides that make the run fit on the same ranks, simplest first. None contains another."""
    found: list[dict[str, Any]] = []
    for changes in _changes(planned):
        if len(found) == MAX_SUGGESTIONS:
            break
        changed = planned.with_fields(**changes)
        known = any(other.keys() <= changes.keys() for other in found)
        if not known and allowed(changed) and fullest(changed).total <= memory_bytes:
            found.append(changes)
    return [" ".join(f"{name.replace('__', '.')}={value}" for name, value in changes.items()) for changes in found]


def allowed(planned: PlannedRun) -> bool:
    """Return True if a run with these settings would be accepted."""
    try:
        check_setting(planned)
    except ValueError:
        return False
    return True


def check_setting(planned: PlannedRun) -> None:
    """Refuse settings that a run would refuse, such as sizes that the layout does not divide.

    Raises:
        ValueError: from `checks.check`, `models.megatron.transformer_config` and `check_exportable`.
    """
    config = planned.config
    check(config, planned.world_size)
    dtype = torch.bfloat16 if planned.item == 2 else torch.float32
    for model in planned.models:
        if model is not None:
            transformer_config(model, config.parallelism, dtype, config.training.recompute)
    if config.checkpoint.export:
        check_exportable(planned.models.student, config.checkpoint.quantized, config.parallelism)


def _changes(planned: PlannedRun) -> Iterator[dict[str, Any]]:
    par, train, optimizer = planned.config.parallelism, planned.config.training, planned.config.optimizer
    tensor, pipeline = par.tensor_model_parallel_size, par.pipeline_model_parallel_size
    split = {} if par.sequence_parallel else {"parallelism__sequence_parallel": True}
    sharded = {} if optimizer.use_distributed_optimizer else {"optimizer__use_distributed_optimizer": True}
    again = {} if train.recompute == "full" else {"training__recompute": "full"}
    small = {"training__micro_batch_size": 1} if train.micro_batch_size > 1 else {}
    yield from (changes for changes in (sharded, split) if changes)
    size = train.micro_batch_size
    while size := size // 2:
        yield {"training__micro_batch_size": size}
    wider = [{"parallelism__tensor_model_parallel_size": times * tensor} | split for times in (2, 4, 8)]
    deeper = [{"parallelism__pipeline_model_parallel_size": times * pipeline} for times in (2, 4, 8)]
    saving = sharded | small | again
    away = planned.config.teacher is not None and not planned.config.distillation.offload_teacher
    host = {"distillation__offload_teacher": True} if away else {}
    more = (host, sharded | again | host) if host else ()  # keeps the micro batch size, to hide the copies behind
    changed = (again, saving, *wider[:1], *deeper[:1], wider[0] | saving, *more)
    yield from (changes for changes in changed if changes)
    for wide, deep in zip(wider, deeper, strict=True):
        yield wide | deep | saving
