"""Qwen3, dense."""

import nemo_run as run

from distill_nemo.training.entry import distill
from recipes.base import base


@run.cli.factory(target=distill)
def qwen3_8b_to_1p7b(teacher: str = "Qwen3-8B", student: str = "Qwen3-1.7B") -> run.Partial:
    """Qwen3 8B into 1.7B, tensor parallel 4. Both are local Hugging Face directories.

    nemo distill train --factory qwen3_8b_to_1p7b data.train='["corpus"]' run.executor=local run.executor.processes=8
    """
    recipe = base("qwen3_8b_to_1p7b")
    recipe.teacher.checkpoint = teacher
    recipe.student.checkpoint = student
    recipe.parallelism.tensor_model_parallel_size = 4
    recipe.parallelism.sequence_parallel = True
    recipe.optimizer.warmup_steps = 100
    recipe.training.steps = 5000
    return recipe
