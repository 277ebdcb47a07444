"""`evaluate`, which an executor runs on every rank. Light at import, as `training.entry` is."""

import os
from pathlib import Path
from typing import Any

from distill_nemo.checks import check_evaluate
from distill_nemo.config_files import from_dict, to_dict
from distill_nemo.fields import takes_fields_of
from distill_nemo.job_config import EvaluateConfig
from distill_nemo.runtime.errors import errors_of_a_rank
from distill_nemo.runtime.imports import megatron_imports


@takes_fields_of(EvaluateConfig)
def evaluate(**fields: Any) -> None:
    r"""Measure models: held-out LM loss, forward KL and agreement; benchmarks with standard errors.

    A baseline and the teacher are measured beside the model.

    Example:
        nemo distill evaluate model=runs/quickstart/student data=runs/quickstart/data/valid \
            teacher=runs/quickstart/teacher/student sequence_length=128
        nemo distill evaluate model=runs/q6b/student tasks=mmlu,gsm8k,ifeval output=scores \
            baseline=/models/Qwen3-4B teacher=/models/Qwen3-8B run.executor=local run.executor.processes=8
        nemo distill evaluate model=runs/q6b/student tasks=ours include_path=tasks output=scores data=code,prose
        nemo distill evaluate steps_of=runs/q6b tasks=gsm8k

    Args:
        **fields: those of `EvaluateConfig`; None stands for a field's default.

    Raises:
        ValueError: for models, data or tasks that cannot be measured.
    """
    given = EvaluateConfig(**{name: value for name, value in fields.items() if value is not None})
    with errors_of_a_rank():
        config = from_dict(to_dict(given), EvaluateConfig)
        check_evaluate(config, int(os.environ.get("WORLD_SIZE", "1")))
        from distill_nemo.runtime.orphans import end_with_torchrun
        from distill_nemo.runtime.signals import end_at_sigurg

        end_at_sigurg()
        end_with_torchrun()
        with megatron_imports():
            from distill_nemo.benchmarks.evaluate import A_DAY, check_models, evaluate_models
            from distill_nemo.benchmarks.follow import follow
            from distill_nemo.checkpoint.hub_models import on_this_machine
            from distill_nemo.runtime.process_groups import world

        ready = on_this_machine(config)
        check_models(ready)
        with world(A_DAY):  # once, though models and tasks have layouts of their own
            if ready.steps_of is None:
                evaluate_models(ready)
            else:
                follow(ready, Path(ready.steps_of))
