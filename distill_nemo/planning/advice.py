"""Changes that would make a run fit."""

from collections.abc import Iterator
from typing import Any

import torch

from distill_nemo.checks import check
from distill_nemo.models.megatron import transformer_config
from distill_nemo.planning.memory import fullest
from distill_nemo.planning.setting import Setting

MOST = 3


def what_would_fit(setting: Setting, memory_bytes: float) -> list[str]:
    """Return a few overrides that make the run fit on as many ranks, the simplest first; none contains another."""
    found: list[dict[str, Any]] = []
    for changes in _changes(setting):
        if len(found) == MOST:
            break
        changed = setting.with_fields(**changes)
        known = any(other.keys() <= changes.keys() for other in found)
        if not known and allowed(changed) and fullest(changed).total <= memory_bytes:
            found.append(changes)
    return [" ".join(f"{name.replace('__', '.')}={value}" for name, value in changes.items()) for changes in found]


def allowed(setting: Setting) -> bool:
    """Return True if such a run would be accepted."""
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
    for model in setting.models:
        if model is not None:
            transformer_config(model, config.parallelism, dtype, config.training.recompute)


def _changes(setting: Setting) -> Iterator[dict[str, Any]]:
    par, train, optimizer = setting.config.parallelism, setting.config.training, setting.config.optimizer
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
    away = setting.config.teacher is not None and not setting.config.distillation.offload_teacher
    host = {"distillation__offload_teacher": True} if away else {}
    more = (host, sharded | again | host) if host else ()  # with all tokens there are to hide the copies behind
    changed = (again, saving, *wider[:1], *deeper[:1], wider[0] | saving, *more)
    yield from (changes for changes in changed if changes)
    for wide, deep in zip(wider, deeper, strict=True):
        yield wide | deep | saving
